"""One flipped bit, in a file, its chunks, their digests or its record: no visitor gets a wrong byte from the database,
`verify` reports the name, and no bulk run writes the damaged bytes.

A round flips one bit in each of many files, and every one of them must be reported. Chunks are small.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from selfheal import CorruptBlob, SelfHealMiddleware, UploadStore, bulk
from selfheal.bulk.outcomes import Outcome
from selfheal.sql.backends import backend_of
from tests.support.asgi import Answer, Wrapped, scope_of
from tests.support.constants import set_constants
from tests.support.store_state import files_below, in_quarantine, set_aside

SMALL = 4096
LARGE = 40_000
CHUNK = 16_384
"""A large file has three of them."""
Times = Callable[[int, int], int]
Record = Callable[[str, object], None]


@dataclass(frozen=True)
class StoredFiles:
    """Files with different bytes, all on disk and in the database."""

    store: UploadStore
    files: dict[str, bytes]

    async def get(self, name: str) -> tuple[int, bytes]:
        """Return the status and bytes that a visitor gets; the status is 0 if the answer breaks off."""
        answer = Answer()

        async def send(message: Message) -> None:
            answer.take(message)

        async def receive() -> Message:
            await asyncio.Event().wait()  # the client stays
            return {}

        try:
            await SelfHealMiddleware(Wrapped(), self.store)(scope_of(f"/static/uploads/{name}"), receive, send)
        except CorruptBlob:
            assert not answer.is_over, "an answer that broke off looks whole"
            answer.status = 0
        await self.store.tasks.drain(30)
        return answer.status, answer.body

    async def run(self, run: Any) -> dict[str, Outcome]:
        """Return the outcome of a bulk run for each name."""
        return {result.name: result.outcome async for result in run}

    def path(self, name: str) -> Path:
        """Return the path of a name's file."""
        return self.store.disk.path_of(name)

    def lose_disk(self) -> None:
        """Delete the whole uploads directory."""
        shutil.rmtree(self.store.disk.path, ignore_errors=True)

    def flip_on_disk(self, name: str, bit: int) -> None:
        """Flip one bit of a file, and keep its size and time."""
        measured = self.path(name).stat()
        self.path(name).write_bytes(flipped(self.files[name], bit))
        os.utime(self.path(name), ns=(measured.st_mtime_ns, measured.st_mtime_ns))

    def column(self, table: str, column: str, position: int = 0) -> dict[str, tuple[int, Any]]:
        """Return the row id and the value of a column for each name."""
        join = "" if table == "image_storage" else f"JOIN {table} ON {table}.sha256 = image_storage.sha256"
        where = f"WHERE position = {position}" if table == "image_chunk" else ""
        with closing(self._connect()) as connection:
            query = f"SELECT image_storage.name, {table}.rowid, {table}.{column} FROM image_storage {join} {where}"
            return {name: (row, value) for name, row, value in connection.execute(query)}

    def write(self, table: str, column: str, values: Sequence[tuple[Any, int]]) -> None:
        """Overwrite a column without the store; each item is a value and a row id."""
        with closing(self._connect()) as connection, connection:
            connection.executemany(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", values)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(str(backend_of(self.store.database.url).file(self.store.database.url)))
        connection.execute("PRAGMA synchronous = OFF")
        return connection


@pytest.fixture
def stored_files(directory: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A context manager that stores `count` files of one size."""
    set_constants(monkeypatch, CHUNK=CHUNK, READ_AT_ONCE=2, SETTLED_AFTER=0.0)

    @asynccontextmanager
    async def make(count: int, size: int, **options: Any) -> AsyncIterator[StoredFiles]:
        async with UploadStore(directory, sqlite_url, settled_after=0.0) as store:
            await store.database.create_tables()
            files = {f"{number:04}.jpg": random.Random(number).randbytes(size) for number in range(count)}
            directory.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                (directory / name).write_bytes(data)
            assert set((await StoredFiles(store, files).run(bulk.migrate(store))).values()) == {Outcome.MIGRATED}
        # a busy machine must not cause a timeout
        async with UploadStore(directory, sqlite_url, deadline=60.0, settled_after=0.0, **options) as store:
            yield StoredFiles(store, files)

    return make


def flipped(value: Any, bit: int) -> Any:
    """Return a value with one bit flipped."""
    if isinstance(value, bytes):
        data = bytearray(value)
        data[bit // 8] ^= 1 << bit % 8
        return bytes(data)
    if isinstance(value, str):
        return value[: bit // 8] + chr(ord(value[bit // 8]) ^ 1 << bit % 8) + value[bit // 8 + 1 :]
    return int.from_bytes(flipped(value.to_bytes(8, "little", signed=True), bit), "little", signed=True)


def bits_of(size: int, how_many: int) -> list[int]:
    """Return random bits of `size` bytes, each once if there are enough."""
    every = range(size * 8)
    if how_many <= len(every):
        return random.Random(size).sample(every, how_many)
    return random.Random(size).choices(every, k=how_many)


def rounds(bits: Sequence[int], names: Sequence[str]) -> Iterator[dict[str, int]]:
    """Yield a bit for each name, until every bit was used."""
    for start in range(0, len(bits), len(names)):
        yield dict(zip(names, bits[start:], strict=False))


# -- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "quick", "campaign"), [(SMALL, 768, SMALL * 8), (LARGE, 768, 100_000)])
async def test_bits_of_files(
    stored_files: Any, times: Times, record_property: Record, size: int, quick: int, campaign: int
) -> None:
    """`verify` reports every file of which one bit is flipped, by its name."""
    bits = bits_of(size, times(quick, campaign))
    async with stored_files(256, size) as stored:
        all_ok = dict.fromkeys(stored.files, Outcome.OK)
        for bit_of in rounds(bits, list(stored.files)):
            for name, bit in bit_of.items():
                stored.flip_on_disk(name, bit)
            assert await stored.run(bulk.verify(stored.store)) == all_ok | dict.fromkeys(bit_of, Outcome.DIFFERS)
            for name in bit_of:
                stored.path(name).write_bytes(stored.files[name])
    record_property("bits flipped", f"{len(bits):,}")


async def test_bits_of_files_are_healed(stored_files: Any, times: Times) -> None:
    """`restore --verify` restores every damaged file with its time, and keeps the damaged copies as versions."""
    async with stored_files(64, SMALL) as stored:
        for bit_of in rounds(bits_of(SMALL, times(64, 1024)), list(stored.files)):
            before = {name: stored.path(name).stat().st_mtime_ns for name in bit_of}
            for name, bit in bit_of.items():
                stored.flip_on_disk(name, bit)
            assert set((await stored.run(bulk.restore(stored.store, verify=True))).values()) == {Outcome.RESTORED}
            assert {name: stored.path(name).read_bytes() for name in stored.files} == stored.files
            assert {name: stored.path(name).stat().st_mtime_ns for name in bit_of} == before
            for name, bit in bit_of.items():
                assert flipped(stored.files[name], bit) in await set_aside(stored.store, name)
            assert in_quarantine(stored.store) == []


# -- the bytes in the database ----------------------------------------------------------------------------------------

WAYS = {
    "restored whole": ({}, {}),
    "restored while it is sent": ({"WHOLE_FIRST": 20_000}, {}),
    "sent from the database": ({}, {"require_marker": True}),
}


async def check_never_served(stored: StoredFiles, names: Sequence[str]) -> None:
    """Fail if a visitor gets one of these names whole: they are damaged in the database and missing on disk."""
    for name in names:
        status, body = await stored.get(name)
        if status:
            assert (status, body) == (500, b"Internal Server Error\n"), name
        else:
            assert len(body) < len(stored.files[name])
            assert stored.files[name].startswith(body), name
    assert files_below(stored.store.disk.path) == []


async def check_reported_and_never_written(stored: StoredFiles, names: Sequence[str]) -> None:
    """Fail unless `verify` and `restore` report exactly these damaged names, and `restore` restores all others."""
    corrupt = dict.fromkeys(names, Outcome.CORRUPT_IN_DATABASE)
    missing = dict.fromkeys(stored.files, Outcome.MISSING_ON_DISK)
    assert await stored.run(bulk.verify(stored.store)) == missing | corrupt
    if not stored.store.disk._root.require_marker:
        assert await stored.run(bulk.restore(stored.store)) == dict.fromkeys(stored.files, Outcome.RESTORED) | corrupt
        assert files_below(stored.store.disk.path) == sorted(stored.files.keys() - corrupt.keys())
        stored.lose_disk()


async def test_bits_of_a_small_file_in_the_database(stored_files: Any, times: Times, record_property: Record) -> None:
    """A file of one chunk with any bit flipped in the database is reported, never served and never written."""
    bits = bits_of(SMALL, times(256, SMALL * 8))
    async with stored_files(128, SMALL) as stored:
        stored.lose_disk()
        good = stored.column("image_chunk", "data")
        for bit_of in rounds(bits, list(stored.files)):
            stored.write("image_chunk", "data", [(flipped(good[n][1], bit), good[n][0]) for n, bit in bit_of.items()])
            await check_never_served(stored, list(bit_of))
            await check_reported_and_never_written(stored, list(bit_of))
            stored.write("image_chunk", "data", [(value, row) for row, value in good.values()])
    record_property("bits flipped", f"{len(bits):,}")


@pytest.mark.parametrize("way", WAYS)
async def test_bits_of_large_files_in_the_database(
    stored_files: Any, times: Times, record_property: Record, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A file of many chunks with any bit flipped in the database is never served whole, whatever the way."""
    sizes, options = WAYS[way]
    bits = bits_of(LARGE, times(340, 34_000))
    async with stored_files(20, LARGE, **options) as stored:
        set_constants(monkeypatch, **sizes)
        stored.lose_disk()
        good = [stored.column("image_chunk", "data", position) for position in range(3)]
        for bit_of in rounds(bits, list(stored.files)):
            where = [(name, *divmod(bit, CHUNK * 8)) for name, bit in bit_of.items()]
            damaged = [(flipped(good[at][name][1], bit), good[at][name][0]) for name, at, bit in where]
            stored.write("image_chunk", "data", damaged)
            await check_never_served(stored, list(bit_of))
            await check_reported_and_never_written(stored, list(bit_of))
            stored.write("image_chunk", "data", [(good[at][name][1], good[at][name][0]) for name, at, _ in where])
    record_property("bits flipped", f"{len(bits):,}")


async def test_bits_in_the_database_while_the_disk_is_good(stored_files: Any, times: Times) -> None:
    """A good copy on disk is served, and `migrate` mends the database from it."""
    async with stored_files(64, SMALL) as stored:
        good = stored.column("image_chunk", "data")
        for bit_of in rounds(bits_of(SMALL, times(64, 4096)), list(stored.files)):
            stored.write("image_chunk", "data", [(flipped(good[n][1], bit), good[n][0]) for n, bit in bit_of.items()])
            for name in bit_of:
                assert await stored.get(name) == (200, stored.files[name])
            assert set((await stored.run(bulk.migrate(stored.store))).values()) == {Outcome.MIGRATED}
            assert stored.column("image_chunk", "data") == good
            assert set((await stored.run(bulk.verify(stored.store))).values()) == {Outcome.OK}


# -- the columns beside the bytes -------------------------------------------------------------------------------------

COLUMNS = [
    ("image_chunk", "digest", range(32 * 8)),
    ("image_chunk", "sha256", range(64 * 8)),
    ("image_chunk", "position", range(2, 31)),
    ("image_blob", "sha256", range(64 * 8)),
    ("image_blob", "size", range(64)),
    ("image_storage", "sha256", range(64 * 8)),
    ("image_storage", "size", range(64)),
]


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize(
    ("table", "column", "bits"), COLUMNS, ids=lambda value: value if isinstance(value, str) else ""
)
async def test_bits_of_columns(
    stored_files: Any, times: Times, record_property: Record, table: str, column: str, bits: range, size: int
) -> None:
    """If a digest, key, position or size is damaged, `verify` reports the name, and only right bytes are served."""
    every = random.Random(0).sample(bits, min(len(bits), times(64, 512)))
    async with stored_files(64, size) as stored:
        stored.lose_disk()
        good = stored.column(table, column)
        for bit_of in rounds(every, list(stored.files)):
            stored.write(table, column, [(flipped(good[name][1], bit), good[name][0]) for name, bit in bit_of.items()])
            found = await stored.run(bulk.verify(stored.store))
            assert {name for name in bit_of if found[name] != Outcome.CORRUPT_IN_DATABASE} == set()
            for name in bit_of:
                status, body = await stored.get(name)
                is_right = status == 200 and body == stored.files[name]
                assert is_right or status == 500 or (status == 0 and stored.files[name].startswith(body))
            stored.lose_disk()
            await stored.run(bulk.restore(stored.store))
            for name in files_below(stored.store.disk.path):
                assert stored.path(name).read_bytes() == stored.files[name]
            stored.lose_disk()
            stored.write(table, column, [(value, row) for row, value in good.values()])
    record_property("bits flipped", f"{len(every):,}")


async def test_bits_of_the_time(stored_files: Any) -> None:
    """A record with any bit of its time flipped is answered with the right bytes: no digest covers the time."""
    async with stored_files(64, SMALL) as stored:
        stored.lose_disk()
        good = stored.column("image_storage", "modified_ns")
        damaged = [(flipped(value, bit), row) for bit, (row, value) in enumerate(good.values())]
        stored.write("image_storage", "modified_ns", damaged)
        for name, data in stored.files.items():
            assert await stored.get(name) == (200, data)
