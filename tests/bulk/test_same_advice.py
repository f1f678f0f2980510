"""`verify` and `migrate` say the same about a file that differs; a dry migration finds what the real one finds."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from selfheal import SchemaError, UploadStore, bulk
from tests.support.files import write_file
from tests.support.raw_sql import sql
from tests.support.runs import report_of

HOUR = 3600


async def test_a_file_that_differs(store: UploadStore, directory: Path) -> None:
    """Both say which side is newer and which command keeps it, in the same words; a dry migration does, too."""
    for name, ago in (("old.png", 9 * HOUR), ("new.png", -1)):
        await store.save(name, b"recorded")
        write_file(directory / name, b"other bytes")
        modified = time.time() - ago
        os.utime(directory / name, (modified, modified))
    runs = (bulk.verify(store), bulk.migrate(store, dry_run=True), bulk.migrate(store))
    verified, dry, migrated = [
        {one.name: (one.outcome.value, one.detail) for one in (await report_of(run)).results} for run in runs
    ]
    assert verified == dry == migrated
    assert {outcome for outcome, _ in verified.values()} == {"differs"}
    assert "recorded bytes are newer" in verified["old.png"][1]
    assert "`selfheal restore --verify`" in verified["old.png"][1]
    assert "disk's bytes are newer" in verified["new.png"][1]
    assert "`selfheal migrate --prefer disk`" in verified["new.png"][1]
    assert (await report_of(bulk.migrate(store, prefer_disk=True))).problems == {}
    assert (await report_of(bulk.verify(store))).problems == {}


async def test_a_dry_migration_of_newer_tables(store: UploadStore, directory: Path, database_url: str) -> None:
    """Tables of a newer selfheal stop a dry migration as they stop the real one."""
    write_file(directory / "a.png", b"a")
    await sql(database_url, "UPDATE image_schema SET version = 99")
    async with UploadStore(directory, database_url) as other:
        for dry_run in (True, False):
            with pytest.raises(SchemaError, match="upgrade selfheal"):
                await report_of(bulk.migrate(other, dry_run=dry_run))
