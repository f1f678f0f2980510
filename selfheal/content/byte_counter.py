"""Counts bytes of large files while they are read, in memory that forked processes share: a run shows its progress."""

import mmap


class ByteCounter:
    """One number for each process that takes part."""

    def __init__(self) -> None:
        self._numbers = memoryview(bytearray(8)).cast("q")
        self._own = 0

    def share(self, processes: int) -> None:
        """Make a number for each of the processes that are forked next; each calls `choose`."""
        self._numbers = memoryview(mmap.mmap(-1, 8 * processes)).cast("q")

    def choose(self, process: int) -> None:
        """Count for this process from now on."""
        self._own = process

    def add(self, size: int) -> None:
        """Count bytes that were read."""
        self._numbers[self._own] += size

    def clear(self) -> None:
        """Forget the bytes of this process: their files are done."""
        self._numbers[self._own] = 0

    @property
    def total(self) -> int:
        """The bytes that all processes count now."""
        return sum(self._numbers)


BYTES_READ = ByteCounter()  # one for the process, as its descriptors are
