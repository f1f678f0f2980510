"""One bit at a time: of a file, of its chunks, of their digests, of its record. No visitor ever gets a wrong byte of it
from the database, `verify` finds it on either side, and no run writes it.

Many files are damaged together, each in a bit of its own, and every one of them must be told. Chunks are made small.
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
from selfheal.settings import sqlite_file
from tests.support.asgi import Answer, Wrapped, scope_of
from tests.support.sides import files_below, in_quarantine, resize

SMALL = 4096
LARGE = 40_000
CHUNK = 16_384
"""So that a large file is three of them."""
Times = Callable[[int, int], int]
Record = Callable[[str, object], None]


@dataclass(frozen=True)
class Shelf:
    """Files that are on both sides, each with bytes of its own."""

    store: UploadStore
    files: dict[str, bytes]

    async def asked(self, name: str) -> tuple[int, bytes]:
        """The status and bytes that a visitor gets; an answer that breaks off has the status 0."""
        answer = Answer()

        async def send(message: Message) -> None:
            answer.take(message)

        async def receive() -> Message:
            await asyncio.Event().wait()  # nobody hangs up
            return {}

        try:
            await SelfHealMiddleware(Wrapped(), self.store)(scope_of(f"/static/uploads/{name}"), receive, send)
        except CorruptBlob:
            assert not answer.is_over, "an answer that broke off looks whole"
            answer.status = 0
        await self.store.tasks.settle(30)
        return answer.status, answer.body

    async def run(self, run: Any) -> dict[str, Outcome]:
        """What a bulk run says of each name."""
        return {result.name: result.outcome async for result in run}

    def path(self, name: str) -> Path:
        return self.store.disk.path_of(name)

    def lose(self) -> None:
        """The whole disk."""
        shutil.rmtree(self.store.disk.path, ignore_errors=True)

    def flip_on_disk(self, name: str, bit: int) -> None:
        """Nothing but the bit changes: not the size, not the time."""
        measured = self.path(name).stat()
        self.path(name).write_bytes(flipped(self.files[name], bit))
        os.utime(self.path(name), ns=(measured.st_mtime_ns, measured.st_mtime_ns))

    def column(self, table: str, column: str, position: int = 0) -> dict[str, tuple[int, Any]]:
        """What a column holds of each name, and the number of its row."""
        join = "" if table == "image_storage" else f"JOIN {table} ON {table}.sha256 = image_storage.sha256"
        where = f"WHERE position = {position}" if table == "image_chunk" else ""
        with closing(self._connect()) as connection:
            query = f"SELECT image_storage.name, {table}.rowid, {table}.{column} FROM image_storage {join} {where}"
            return {name: (row, value) for name, row, value in connection.execute(query)}

    def write(self, table: str, column: str, values: Sequence[tuple[Any, int]]) -> None:
        """Change a column behind everybody's back: (value, number of the row)."""
        with closing(self._connect()) as connection, connection:
            connection.executemany(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", values)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(str(sqlite_file(self.store.database.url)))
        connection.execute("PRAGMA synchronous = OFF")
        return connection


@pytest.fixture
def shelf_of(directory: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a shelf of so many files of such a size."""
    resize(monkeypatch, CHUNK=CHUNK, READ_AT_ONCE=2, SETTLED_AFTER=0.0)

    @asynccontextmanager
    async def make(count: int, size: int, **options: Any) -> AsyncIterator[Shelf]:
        async with UploadStore(directory, sqlite_url) as store:
            await store.database.create_tables()
            files = {f"{number:04}.jpg": random.Random(number).randbytes(size) for number in range(count)}
            directory.mkdir(parents=True)
            for name, data in files.items():
                (directory / name).write_bytes(data)
            assert set((await Shelf(store, files).run(bulk.migrate(store))).values()) == {Outcome.MIGRATED}
        # a machine that starves for 5 s is no damage
        async with UploadStore(directory, sqlite_url, deadline=60.0, **options) as store:
            yield Shelf(store, files)

    return make


def flipped(value: Any, bit: int) -> Any:
    """A value with one bit the other way round."""
    if isinstance(value, bytes):
        data = bytearray(value)
        data[bit // 8] ^= 1 << bit % 8
        return bytes(data)
    if isinstance(value, str):
        return value[: bit // 8] + chr(ord(value[bit // 8]) ^ 1 << bit % 8) + value[bit // 8 + 1 :]
    return int.from_bytes(flipped(value.to_bytes(8, "little", signed=True), bit), "little", signed=True)


def bits_of(size: int, how_many: int) -> list[int]:
    """As many different bits of `size` bytes as that, in no order; all of them, if there are no more."""
    every = range(size * 8)
    if how_many <= len(every):
        return random.Random(size).sample(every, how_many)
    return random.Random(size).choices(every, k=how_many)


def rounds(bits: Sequence[int], names: Sequence[str]) -> Iterator[dict[str, int]]:
    """A bit for each name, until every bit had its turn."""
    for start in range(0, len(bits), len(names)):
        yield dict(zip(names, bits[start:], strict=False))


# -- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "quick", "campaign"), [(SMALL, 768, SMALL * 8), (LARGE, 768, 100_000)])
async def test_bits_of_files(
    shelf_of: Any, times: Times, record_property: Record, size: int, quick: int, campaign: int
) -> None:
    """Every damaged file is found by `verify`, by its name, though nothing but one bit of it changed."""
    bits = bits_of(size, times(quick, campaign))
    async with shelf_of(256, size) as shelf:
        everything = dict.fromkeys(shelf.files, Outcome.OK)
        for bit_of in rounds(bits, list(shelf.files)):
            for name, bit in bit_of.items():
                shelf.flip_on_disk(name, bit)
            assert await shelf.run(bulk.verify(shelf.store)) == everything | dict.fromkeys(bit_of, Outcome.DIFFERS)
            for name in bit_of:
                shelf.path(name).write_bytes(shelf.files[name])
    record_property("bits flipped", f"{len(bits):,}")


async def test_bits_of_files_are_healed(shelf_of: Any, times: Times) -> None:
    """A restore that verifies brings every damaged file back as it was, and keeps the damaged copies aside."""
    async with shelf_of(64, SMALL) as shelf:
        for bit_of in rounds(bits_of(SMALL, times(64, 1024)), list(shelf.files)):
            before = {name: shelf.path(name).stat().st_mtime_ns for name in bit_of}
            for name, bit in bit_of.items():
                shelf.flip_on_disk(name, bit)
            assert set((await shelf.run(bulk.restore(shelf.store, verify=True))).values()) == {Outcome.RESTORED}
            assert {name: shelf.path(name).read_bytes() for name in shelf.files} == shelf.files
            assert {name: shelf.path(name).stat().st_mtime_ns for name in bit_of} == before
            aside = sorted(in_quarantine(shelf.store))
            assert aside == sorted(flipped(shelf.files[name], bit) for name, bit in bit_of.items())
            shutil.rmtree(shelf.store.disk.quarantine_path)


# -- the bytes in the database ----------------------------------------------------------------------------------------

WAYS = {
    "restored whole": ({}, {}),
    "restored while it is sent": ({"WHOLE_FIRST": 20_000}, {}),
    "sent from the database": ({}, {"require_marker": True}),
}


async def is_never_served(shelf: Shelf, names: Sequence[str]) -> None:
    """Of these names, which are damaged in the database and lost on the disk, nobody gets anything whole."""
    for name in names:
        status, body = await shelf.asked(name)
        if status:
            assert (status, body) == (500, b"Internal Server Error\n"), name
        else:
            assert len(body) < len(shelf.files[name])
            assert shelf.files[name].startswith(body), name
    assert files_below(shelf.store.disk.path) == []


async def is_found_and_never_written(shelf: Shelf, names: Sequence[str]) -> None:
    """`verify` tells each of these damaged names, and so does `restore`, which brings back all the others."""
    corrupt = dict.fromkeys(names, Outcome.CORRUPT_IN_DATABASE)
    missing = dict.fromkeys(shelf.files, Outcome.MISSING_ON_DISK)
    assert await shelf.run(bulk.verify(shelf.store)) == missing | corrupt
    if not shelf.store.disk.require_marker:
        assert await shelf.run(bulk.restore(shelf.store)) == dict.fromkeys(shelf.files, Outcome.RESTORED) | corrupt
        assert files_below(shelf.store.disk.path) == sorted(shelf.files.keys() - corrupt.keys())
        shelf.lose()


async def test_bits_of_a_small_file_in_the_database(shelf_of: Any, times: Times, record_property: Record) -> None:
    """A record of one chunk with any bit of its bytes the other way round: found, refused, and not written."""
    bits = bits_of(SMALL, times(256, SMALL * 8))
    async with shelf_of(128, SMALL) as shelf:
        shelf.lose()
        good = shelf.column("image_chunk", "data")
        for bit_of in rounds(bits, list(shelf.files)):
            shelf.write("image_chunk", "data", [(flipped(good[n][1], bit), good[n][0]) for n, bit in bit_of.items()])
            await is_never_served(shelf, list(bit_of))
            await is_found_and_never_written(shelf, list(bit_of))
            shelf.write("image_chunk", "data", [(value, row) for row, value in good.values()])
    record_property("bits flipped", f"{len(bits):,}")


@pytest.mark.parametrize("way", WAYS)
async def test_bits_of_large_files_in_the_database(
    shelf_of: Any, times: Times, record_property: Record, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A record of many chunks with any bit the other way round never comes whole, in whatever way it would come."""
    sizes, options = WAYS[way]
    bits = bits_of(LARGE, times(340, 34_000))
    async with shelf_of(20, LARGE, **options) as shelf:
        resize(monkeypatch, **sizes)
        shelf.lose()
        good = [shelf.column("image_chunk", "data", position) for position in range(3)]
        for bit_of in rounds(bits, list(shelf.files)):
            where = [(name, *divmod(bit, CHUNK * 8)) for name, bit in bit_of.items()]
            damaged = [(flipped(good[at][name][1], bit), good[at][name][0]) for name, at, bit in where]
            shelf.write("image_chunk", "data", damaged)
            await is_never_served(shelf, list(bit_of))
            await is_found_and_never_written(shelf, list(bit_of))
            shelf.write("image_chunk", "data", [(good[at][name][1], good[at][name][0]) for name, at, _ in where])
    record_property("bits flipped", f"{len(bits):,}")


async def test_bits_in_the_database_while_the_disk_is_good(shelf_of: Any, times: Times) -> None:
    """While the disk has a good copy it is served, and a migration mends the database from it."""
    async with shelf_of(64, SMALL) as shelf:
        good = shelf.column("image_chunk", "data")
        for bit_of in rounds(bits_of(SMALL, times(64, 4096)), list(shelf.files)):
            shelf.write("image_chunk", "data", [(flipped(good[n][1], bit), good[n][0]) for n, bit in bit_of.items()])
            for name in bit_of:
                assert await shelf.asked(name) == (200, shelf.files[name])
            assert set((await shelf.run(bulk.migrate(shelf.store))).values()) == {Outcome.MIGRATED}
            assert shelf.column("image_chunk", "data") == good
            assert set((await shelf.run(bulk.verify(shelf.store))).values()) == {Outcome.OK}


# -- what is written beside the bytes ---------------------------------------------------------------------------------

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
    shelf_of: Any, times: Times, record_property: Record, table: str, column: str, bits: range, size: int
) -> None:
    """What says how the bytes are to be checked is damaged itself: found by `verify`; only right bytes are served."""
    every = random.Random(0).sample(bits, min(len(bits), times(64, 512)))
    async with shelf_of(64, size) as shelf:
        shelf.lose()
        good = shelf.column(table, column)
        for bit_of in rounds(every, list(shelf.files)):
            shelf.write(table, column, [(flipped(good[name][1], bit), good[name][0]) for name, bit in bit_of.items()])
            found = await shelf.run(bulk.verify(shelf.store))
            assert {name for name in bit_of if found[name] != Outcome.CORRUPT_IN_DATABASE} == set()
            for name in bit_of:
                status, body = await shelf.asked(name)
                is_right = status == 200 and body == shelf.files[name]
                assert is_right or status == 500 or (status == 0 and shelf.files[name].startswith(body))
            shelf.lose()
            await shelf.run(bulk.restore(shelf.store))
            for name in files_below(shelf.store.disk.path):
                assert shelf.path(name).read_bytes() == shelf.files[name]
            shelf.lose()
            shelf.write(table, column, [(value, row) for row, value in good.values()])
    record_property("bits flipped", f"{len(every):,}")


async def test_bits_of_the_time(shelf_of: Any) -> None:
    """A record whose time is damaged, in any bit, is answered with the right bytes; no digest is over the time."""
    async with shelf_of(64, SMALL) as shelf:
        shelf.lose()
        good = shelf.column("image_storage", "modified_ns")
        damaged = [(flipped(value, bit), row) for bit, (row, value) in enumerate(good.values())]
        shelf.write("image_storage", "modified_ns", damaged)
        for name, data in shelf.files.items():
            assert await shelf.asked(name) == (200, data)
