"""For tests of migrate, verify and restore: what a run reported, and what is on disk and in the database."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from selfheal import UploadStore
from selfheal.bulk.outcomes import Result
from tests.support.disk_files import paths_below
from tests.support.store_state import set_aside

SQL = Callable[..., Awaitable[list[Any]]]
TABLES = ("image_storage", "image_blob", "image_chunk", "image_history", "image_schema")


@dataclass(frozen=True)
class Report:
    """Everything that a run reported."""

    results: list[Result]

    @property
    def counts(self) -> dict[str, int]:
        """The number of names by outcome."""
        counts: Counter[str] = Counter()
        for result in self.results:
            counts[result.outcome.value] += result.count
        return dict(counts)

    @property
    def outcomes(self) -> dict[str, str]:
        """The outcome of every name."""
        return {result.name: result.outcome.value for result in self.results}

    @property
    def problems(self) -> dict[str, str]:
        """The outcome of every name that something is wrong with after the run."""
        return {result.name: result.outcome.value for result in self.results if result.is_problem}


async def report_of(run: AsyncGenerator[Result, None]) -> Report:
    """Let a run finish and return its report; assert that no name is reported twice and each problem has a detail."""
    async with aclosing(run):
        results = [result async for result in run]
    names = [result.name for result in results if result.name]
    assert len(names) == len(set(names)), f"reported twice: {[name for name in names if names.count(name) > 1]}"
    assert all(result.detail for result in results if result.is_problem), "a problem without a detail"
    return Report(results)


def outcomes(**names: tuple[str, ...]) -> dict[str, str]:
    """Return the outcome of every name, from the names of every outcome."""
    return {name: outcome for outcome, those in names.items() for name in those}


def after_listing(store: UploadStore, monkeypatch: pytest.MonkeyPatch, change: Callable[[], Awaitable[object]]) -> None:
    """Let `change` happen after a run has read live names and before it looks at them."""
    names_in = store.database.catalogue.names_in

    async def and_change(key_range: Any, **which: Any) -> Any:
        names = await names_in(key_range, **which)
        await change()
        return names

    monkeypatch.setattr(store.database.catalogue, "names_in", and_change)


# -- disk and database ------------------------------------------------------------------------------------------------


async def rows(sql: SQL) -> dict[str, list[Any]]:
    """Return every row of every table."""
    return {table: sorted(await sql(f"SELECT * FROM {table}"), key=repr) for table in TABLES}


async def all_set_aside(store: UploadStore) -> list[tuple[str, bytes]]:
    """Return the names and bytes of all copies that were set aside as versions."""
    names = [record.name async for page in store.database.pages(deleted=None) for record in page]
    return sorted([(name, data) for name in names for data in await set_aside(store, name)])


def quarantine_of(store: UploadStore) -> list[tuple[str, bytes]]:
    """Return the names and bytes of the files in quarantine."""
    base = store.disk.quarantine_path
    found = [path for path in paths_below(base) if path.is_file()]
    return sorted((str(Path(*path.relative_to(base).parts[1:])), path.read_bytes()) for path in found)


def remove_tree(directory: Path) -> None:
    """Remove a directory with everything below it; `shutil.rmtree` fails on names of 512 bytes."""
    for path in sorted(paths_below(directory), key=lambda path: len(path.parts), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    directory.rmdir()
