"""The three bulk runs, as async generators of results; nothing is printed here.

Each can be killed and run again: what is done stays done.
"""

from .migrate import migrate
from .restore import restore
from .verify import verify

__all__ = ["migrate", "restore", "verify"]
