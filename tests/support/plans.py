"""Plans: what is to be answered to a request, before anything is sent."""

from __future__ import annotations

from selfheal.http.conditional import plan_of
from selfheal.http.headers import Head, Plan

MODIFIED_NS = 1_700_000_000_123_456_789
"""A time of last modification, in ns since the epoch."""
STATUSES = {200, 206, 304, 412, 416}
"""Every status that a plan may have."""


def plan(head: Head, size: int, *lines: tuple[bytes, bytes], is_head: bool = False) -> Plan:
    """Return the answer to a GET (or HEAD) with these header lines."""
    return plan_of(lines, head, size, is_head=is_head)
