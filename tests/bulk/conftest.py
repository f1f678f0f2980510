"""Fixtures of the bulk runs: SQL statements, and uploads that are damaged on disk or in the database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from selfheal import UploadStore, bulk
from tests.support.damage import (
    BYTES_DAMAGED,
    BYTES_WHOLE,
    RECORD_WRONG,
    DamagedDisk,
    damage_disk,
    damage_record,
    named_after,
)
from tests.support.files import noise, write_file
from tests.support.runs import SQL, report_of


@pytest.fixture
async def sql(database_url: str) -> AsyncIterator[SQL]:
    """A function that runs SQL statements in the database, as another program does."""
    engine = create_async_engine(database_url)

    async def run(statement: str, **values: Any) -> list[Any]:
        async with engine.begin() as connection:
            result = await connection.execute(text(statement), values)
            return [tuple(row) for row in result] if result.returns_rows else []

    yield run
    await engine.dispose()


@pytest.fixture
async def damaged_disk(store: UploadStore, directory: Path, tmp_path: Path) -> DamagedDisk:
    """Records whose files are damaged in every way, and entries on disk that are no uploads."""
    return await damage_disk(store, directory, tmp_path / "outside")


@pytest.fixture
async def damaged_database(store: UploadStore, directory: Path, sql: SQL) -> dict[str, bytes]:
    """Good files; each record but that of `good.png` is damaged in the way that its name says."""
    images = named_after(BYTES_DAMAGED, BYTES_WHOLE, RECORD_WRONG)
    for name, data in [("good.png", noise(7)), *images.items()]:
        write_file(directory / name, data)
    assert (await report_of(bulk.migrate(store))).counts == {"migrated": len(images) + 1}
    for name, data in images.items():
        await damage_record(sql, name, data)
    return images
