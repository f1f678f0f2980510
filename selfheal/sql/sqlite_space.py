"""The space of a SQLite file: what is free in it, and how the disk gets that back."""

from pathlib import Path
from typing import Any

from sqlalchemy.pool import PoolProxiedConnection

FREED_AT_ONCE = 1024  # pages (16 MiB) in one transaction: other writers get the lock in between


def prepare(file: Path, connection: Any, _record: PoolProxiedConnection) -> None:
    """Set what only a new file can have; on an old one these are writes."""
    if not file.exists() or file.stat().st_size == 0:
        cursor = connection.cursor()
        cursor.execute("PRAGMA page_size=16384")  # a quarter of the writes that 4 KiB pages take
        cursor.execute("PRAGMA auto_vacuum=INCREMENTAL")  # so that `free_some` works
        cursor.close()


async def space(driver: Any) -> tuple[int, int]:
    """Return the bytes of the file, and how many of them are free."""
    counts = "FROM pragma_page_size, pragma_page_count, pragma_freelist_count"
    ((size, pages, free),) = await driver.execute_fetchall(f"SELECT page_size, page_count, freelist_count {counts}")
    return size * pages, size * free


async def free_some(driver: Any) -> int:
    """Give some free pages back to the disk, in a transaction; return their bytes."""
    before, _ = await space(driver)
    await driver.execute_fetchall(f"PRAGMA incremental_vacuum({FREED_AT_ONCE})")
    return before - (await space(driver))[0]


async def shrink(driver: Any) -> None:
    """Cut a file in WAL mode after `free_some`."""
    await driver.execute_fetchall("PRAGMA wal_checkpoint")


async def vacuum(driver: Any) -> int:
    """Write the file anew, from now on with pages that `free_some` can free; return the bytes that it lost."""
    before, _ = await space(driver)
    await driver.execute_fetchall("PRAGMA auto_vacuum=INCREMENTAL")
    await driver.execute_fetchall("VACUUM")
    await shrink(driver)
    return before - (await space(driver))[0]
