"""Two nodes over one database agree with a model, whatever happens to them in whatever order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from selfheal import CorruptBlob, SelfHealMiddleware, UploadStore
from tests.support.asgi import Wrapped, ask
from tests.support.constants import set_constants
from tests.support.raw_sql import execute
from tests.support.two_nodes import NAMES, SIZES, TIMES, run_machine
from tests.support.waiting import eventually


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 bytes, answers that stream from 600 bytes on, and no delay before anything is checked."""
    set_constants(monkeypatch, **SIZES, **TIMES)
    monkeypatch.setattr("selfheal.healing.pace.FIRST", 0.0)
    monkeypatch.setattr("selfheal.healing.pace.LONGEST", 0.0)


@pytest.mark.timeout(7200)  # Hypothesis shrinks a failure before it reports it
def test_two_nodes_over_sqlite(
    sqlite_url: str, small_parts: None, times: Callable[[int, int], int], record_property: Callable[[str, object], None]
) -> None:
    """After any steps in any order, both disks and the database hold what the model says, and nothing else."""
    record_property("steps", f"{run_machine(sqlite_url, times(1_500, 45_000)):,}")


@pytest.mark.timeout(7200)
def test_two_nodes_over_postgres(
    postgres_url: str,
    small_parts: None,
    times: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """The same holds over PostgreSQL."""
    record_property("steps", f"{run_machine(postgres_url, times(100, 10_000)):,}")


@pytest.mark.parametrize("change", ["delete", "save"])
async def test_a_change_reaches_every_node(sqlite_store: UploadStore, tmp_path: Path, change: str) -> None:
    """A name that is deleted or overwritten on one node changes on another node within seconds."""
    name, path = NAMES[0], f"/static/uploads/{NAMES[0]}"
    async with UploadStore(tmp_path / "elsewhere", sqlite_store.database.url) as other:
        app = SelfHealMiddleware(Wrapped(), other)
        await sqlite_store.save(name, b"old")
        for _ in range(2):
            assert (await ask(app, path)).body == b"old"
            await other.tasks.drain(30)
        await (sqlite_store.delete(name) if change == "delete" else sqlite_store.save(name, b"new"))

        async def has_changed() -> bool:
            return (await ask(app, path)).body == {"delete": b"wrapped", "save": b"new"}[change]

        await eventually(has_changed)


async def test_an_undo_to_damaged_bytes_changes_nothing(sqlite_store: UploadStore) -> None:
    """An undo to damaged bytes raises an error, and the record stays as it is."""
    name = NAMES[0]
    await sqlite_store.save(name, b"first")
    now = await sqlite_store.save(name, b"second")
    (version,) = await sqlite_store.database.history(name)
    await execute(sqlite_store, "UPDATE image_chunk SET data = x'00' WHERE sha256 = :sha256", sha256=version.sha256)
    with pytest.raises(CorruptBlob):
        await sqlite_store.undo(name)
    record = await sqlite_store.database.find(name)
    assert record is not None
    assert (record.sha256, record.generation) == (now.sha256, now.generation)
