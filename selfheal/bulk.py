"""The three bulk runs, as async generators of what became of each name; nothing is printed here.

Each can be killed and run again: what is done stays done, and is only looked at.
"""

from __future__ import annotations

from .bulk_migrate import migrate
from .bulk_restore import restore
from .bulk_verify import verify

__all__ = ["migrate", "restore", "verify"]
