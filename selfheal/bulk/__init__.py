"""The three bulk runs, as async generators of what became of each name; nothing is printed here.

Each can be killed and run again: what is done stays done, and is only looked at.
"""

from __future__ import annotations

from .migrate import migrate
from .restore import restore
from .verify import verify

__all__ = ["migrate", "restore", "verify"]
