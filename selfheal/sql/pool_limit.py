"""How many connections this process may have: the size that was set, or what the server still allows."""

import time

from ..errors import SettingsError

POOL_SIZE = 10
MOST = 100
LEARNED_FOR = 5.0  # seconds in which no connection more is tried after the server refused one


def check_pool_size(size: int | str) -> int:
    """Return a pool size; raise `SettingsError` if it is not 1 to 100."""
    if not str(size).isascii() or not str(size).isdecimal() or not 1 <= int(size) <= MOST:
        raise SettingsError(f"the pool size {size!r} must be a number of connections from 1 to {MOST}")
    return int(size)


class PoolLimit:
    """The limit, for some seconds lower after the server refused a connection."""

    def __init__(self, size: int) -> None:
        self.size = check_pool_size(size)
        self._learned = size
        self._until = 0.0

    @property
    def kept(self) -> int:
        """The number of connections that stay open while idle."""
        return (self.size + 1) // 2

    @property
    def is_lower(self) -> bool:
        """Whether the server has just refused a connection."""
        return time.monotonic() < self._until

    @property
    def now(self) -> int:
        """The number of connections that can be open now."""
        return self._learned if self.is_lower else self.size

    def refused(self, existing: int) -> None:
        """Take over that the server allows no more than the `existing` connections of this process, if it has any."""
        if existing:
            self._learned, self._until = existing, time.monotonic() + LEARNED_FOR
