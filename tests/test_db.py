"""The contract of the catalogue: records, tombstones, history, and what several do at once. Over every database."""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import random
import sys
import time
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import anyio
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from selfheal import ImageStorage, InvalidName, NotStored, Record, UploadStore
from selfheal.blobs.database import WRITE_AT_ONCE
from selfheal.content.digests import Digests
from selfheal.content.sources import CHUNK
from selfheal.db import GRACE
from selfheal.errors import Unsettled
from selfheal.sql.models import SmallFile
from tests.support import environment
from tests.support.postgres import PostgresServer
from tests.support.sides import sql

LARGE = WRITE_AT_ONCE * CHUNK + 12345
"""Bytes that are stored in more than one transaction."""
MONTH = timedelta(days=30)
ALL_TABLES = ("image_storage", "image_blob", "image_chunk", "image_history", "image_schema")


def digests_of(data: bytes) -> Digests:
    """The digests that bytes are known by."""
    return Digests.of(data[at : at + CHUNK] for at in range(0, len(data), CHUNK))


@pytest.fixture(scope="module")
def a_database(postgres: PostgresServer) -> Iterator[str]:
    """A PostgreSQL database for the tests of this file: to make one takes longer than most of them."""
    name = f"t{uuid4().hex[:12]}"
    postgres.sql(f"CREATE DATABASE {name}")
    yield name
    postgres.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture
def postgres_url(postgres: PostgresServer, a_database: str) -> Iterator[str]:
    """That database; it is emptied when the test is over."""
    yield postgres.url(a_database)
    postgres.sql("SET lock_timeout = '9s'; DROP SCHEMA public CASCADE; CREATE SCHEMA public", a_database)


@pytest.fixture
def images(store: UploadStore) -> ImageStorage:
    """The database half, its tables made."""
    return store.database


async def contents(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table."""
    return {table: sorted(await sql(url, f"SELECT * FROM {table}"), key=repr) for table in ALL_TABLES}


async def whole(images: ImageStorage, record: Record) -> bytes:
    """All bytes of a record."""
    return b"".join([chunk async for chunk in images.read(record)])


async def saved(images: ImageStorage, name: str) -> bytes | None:
    """The bytes that a name has now; None if it has none."""
    record = await images.find(name)
    return None if record is None or record.is_deleted else await whole(images, record)


def digest_of(data: bytes) -> str:
    """The SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def small_file(name: str, data: bytes, modified_ns: int = 7) -> SmallFile:
    """A file as a bulk run hands it over."""
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    return SmallFile(name, len(data), modified_ns, chunks, Digests.of(chunks))


def is_recent(moment: datetime) -> bool:
    """Whether a time is of now, give or take the difference of two clocks; it must know its zone."""
    return abs(datetime.now(UTC) - moment) < timedelta(minutes=5)


# -- records --------------------------------------------------------------------------------------------------------


async def test_a_new_record(images: ImageStorage) -> None:
    """A record says everything about its bytes, in UTC, and is found again."""
    before = time.time_ns()
    record = await images.store_image("cats/tom.png", b"meow")
    assert (record.name, record.sha256, record.size) == ("cats/tom.png", digest_of(b"meow"), 4)
    assert (record.content_type, record.generation) == ("image/png", 1)
    assert before <= record.modified_ns <= time.time_ns()
    assert is_recent(record.created_at)
    assert is_recent(record.changed_at)
    assert not record.is_deleted
    assert record.deleted_at is None
    assert await images.find("cats/tom.png") == record


async def test_what_the_caller_says(images: ImageStorage) -> None:
    """A time and a content type that the caller gives are kept, to the nanosecond."""
    for number, modified_ns in enumerate((0, 1, 1_700_000_000_123_456_789, -1, 2**62)):
        name = f"{number}.bin"
        record = await images.store_image(name, b"x", content_type="image/x-own", modified_ns=modified_ns)
        assert (record.content_type, record.modified_ns) == ("image/x-own", modified_ns)
        assert await images.find(name) == record


async def test_names_outside_the_grammar(images: ImageStorage, database_url: str) -> None:
    """A name that is not in the grammar is refused, and nothing of it reaches the database."""
    before = await contents(database_url)
    for name in ("", "../x", "a/../b", "a\\b", "/a", "a//b", ".hidden", "a\x00b", "x" * 600):
        with pytest.raises(InvalidName):
            await images.store_image(name, b"x")
        with pytest.raises(InvalidName):
            await images.store_many([small_file("good.png", b"y"), small_file(name, b"x")])
    assert await contents(database_url) == before


async def test_an_unknown_name(images: ImageStorage) -> None:
    """The database answers that there is no such name."""
    await images.store_image("a.png", b"x")
    assert await images.find("b.png") is None
    assert await images.find_many(["b.png", "c.png"]) == {}
    assert await images.fetch(["b.png"]) == {}
    assert await images.history("b.png") == []


@pytest.mark.parametrize("data", [b"", b"same", bytes(LARGE)], ids=["nothing", "small", "large"])
async def test_the_same_bytes_again(images: ImageStorage, data: bytes) -> None:
    """Storing the bytes that a name has changes nothing of its record, and makes no history."""
    record = await images.store_image("a.png", data, modified_ns=1)
    again = await images.store_image("a.png", data, modified_ns=2, content_type="image/webp")
    assert again == record
    assert await images.find("a.png") == record
    assert await images.history("a.png") == []


async def test_an_overwrite(images: ImageStorage) -> None:
    """Other bytes are the next generation, and the history keeps what the name was."""
    first = await images.store_image("a.png", b"one", modified_ns=1)
    second = await images.store_image("a.png", b"two", modified_ns=2, content_type="image/webp")
    third = await images.store_image("a.png", b"three", modified_ns=3)
    assert [record.generation for record in (first, second, third)] == [1, 2, 3]
    assert (second.sha256, second.size) == (digest_of(b"two"), 3)
    assert (second.modified_ns, second.content_type) == (2, "image/webp")
    assert third.created_at == first.created_at
    assert third.changed_at >= second.changed_at >= first.changed_at
    assert await saved(images, "a.png") == b"three"
    versions = await images.history("a.png")
    for version, was in zip(versions, (second, first), strict=True):
        assert (version.name, version.generation) == ("a.png", was.generation)
        assert (version.sha256, version.size) == (was.sha256, was.size)
        assert (version.content_type, version.modified_ns) == (was.content_type, was.modified_ns)
        assert is_recent(version.replaced_at)


async def test_bytes_of_before_again(images: ImageStorage) -> None:
    """Bytes that the name once had are a change as any other."""
    for data in (b"one", b"two", b"one"):
        record = await images.store_image("a.png", data)
    assert record.generation == 3
    assert await saved(images, "a.png") == b"one"
    assert [version.sha256 for version in await images.history("a.png")] == [digest_of(b"two"), digest_of(b"one")]


# -- deleting -------------------------------------------------------------------------------------------------------


async def test_burying(images: ImageStorage) -> None:
    """A deletion leaves a tombstone of the next generation, and the history keeps what the name was."""
    record = await images.store_image("a.png", b"one")
    await images.store_image("b.png", b"other")
    tombstone = await images.bury("a.png")
    assert tombstone is not None
    assert tombstone.is_deleted
    assert tombstone.deleted_at is not None
    assert is_recent(tombstone.deleted_at)
    assert (tombstone.generation, tombstone.created_at) == (2, record.created_at)
    assert await images.find("a.png") == tombstone
    assert await images.find_many(["a.png"]) == {"a.png": tombstone}
    assert [version.sha256 for version in await images.history("a.png")] == [record.sha256]
    assert await images.count() == 1


async def test_burying_twice(images: ImageStorage, database_url: str) -> None:
    """What is deleted is not deleted again: nothing changes."""
    await images.store_image("a.png", b"one")
    tombstone = await images.bury("a.png")
    before = await contents(database_url)
    assert await images.bury("a.png") == tombstone
    assert await contents(database_url) == before


async def test_burying_an_unknown_name(images: ImageStorage, database_url: str) -> None:
    """Where there is no record there is nothing to delete, and no tombstone is made."""
    assert await images.bury("a.png") is None
    assert await images.find("a.png") is None
    assert (await contents(database_url))["image_storage"] == []


@pytest.mark.parametrize("data", [b"one", b"two"], ids=["the same bytes", "other bytes"])
async def test_saving_anew_after_a_deletion(images: ImageStorage, data: bytes) -> None:
    """Whoever saves a deleted name anew brings it back, as its next generation."""
    first = await images.store_image("a.png", b"one")
    await images.bury("a.png")
    record = await images.store_image("a.png", data, modified_ns=5)
    assert (record.generation, record.deleted_at, record.modified_ns) == (3, None, 5)
    assert await saved(images, "a.png") == data
    assert [version.sha256 for version in await images.history("a.png")] == [first.sha256]


@pytest.mark.parametrize("data", [b"one", b"two", bytes(LARGE)], ids=["the same bytes", "other bytes", "large"])
async def test_only_new(images: ImageStorage, data: bytes) -> None:
    """`only_new` stores what has no record, and leaves what has one, tombstones included, as it is."""
    alive = await images.store_image("alive.png", b"one", modified_ns=1)
    await images.store_image("dead.png", b"one", modified_ns=1)
    dead = await images.bury("dead.png")
    assert await images.store_image("alive.png", data, modified_ns=2, only_new=True) == alive
    assert await images.store_image("dead.png", data, modified_ns=2, only_new=True) == dead
    new = await images.store_image("new.png", data, modified_ns=2, only_new=True)
    assert (await images.find("alive.png"), await images.find("dead.png")) == (alive, dead)
    assert (new.generation, new.modified_ns, await saved(images, "new.png")) == (1, 2, data)
    assert await images.history("alive.png") == []


# -- undoing --------------------------------------------------------------------------------------------------------


async def test_undoing_an_overwrite_twice(images: ImageStorage) -> None:
    """An overwrite that is undone can be done again by undoing once more: back and forth."""
    first = await images.store_image("a.png", b"one", modified_ns=1, content_type="image/webp")
    second = await images.store_image("a.png", b"two", modified_ns=2)
    back = await images.undo("a.png")
    assert await saved(images, "a.png") == b"one"
    assert (back.generation, back.sha256, back.size) == (3, first.sha256, first.size)
    assert (back.content_type, back.modified_ns, back.created_at) == ("image/webp", 1, first.created_at)
    forth = await images.undo("a.png")
    assert (forth.generation, forth.sha256, forth.modified_ns) == (4, second.sha256, 2)
    assert await saved(images, "a.png") == b"two"
    assert (await images.undo("a.png")).sha256 == first.sha256
    assert await images.find("a.png") == replace(first, generation=5, changed_at=(await now(images)).changed_at)


async def now(images: ImageStorage) -> Record:
    """The record of `a.png`."""
    record = await images.find("a.png")
    assert record is not None
    return record


async def test_undoing_a_deletion(images: ImageStorage) -> None:
    """A deletion that is undone leaves the name as it was, alive, with the same bytes and times."""
    first = await images.store_image("a.png", b"one", modified_ns=1)
    await images.bury("a.png")
    record = await images.undo("a.png")
    assert not record.is_deleted
    assert (record.generation, record.sha256, record.modified_ns) == (3, first.sha256, 1)
    assert await images.find("a.png") == record
    assert await saved(images, "a.png") == b"one"


async def test_undoing_a_deletion_after_an_overwrite(images: ImageStorage) -> None:
    """Undoing goes back step by step: first the deletion, then the overwrite before it."""
    await images.store_image("a.png", b"one")
    await images.store_image("a.png", b"two")
    await images.bury("a.png")
    await images.undo("a.png")
    assert await saved(images, "a.png") == b"two"
    await images.undo("a.png")
    assert await saved(images, "a.png") == b"one"


async def test_undoing_to_a_generation(images: ImageStorage) -> None:
    """A name can be made what it was as any generation that its history holds, alive or deleted."""
    for data in (b"one", b"two", b"three"):
        await images.store_image("a.png", data)
    assert (await images.undo("a.png", 1)).generation == 4
    assert await saved(images, "a.png") == b"one"
    assert (await images.undo("a.png", 3)).generation == 5
    assert await saved(images, "a.png") == b"three"
    await images.bury("a.png")
    assert (await images.undo("a.png", 2)).generation == 7
    assert await saved(images, "a.png") == b"two"
    kept = {version.generation: version.sha256 for version in await images.history("a.png")}
    assert [kept[generation] for generation in (1, 2, 3)] == [digest_of(data) for data in (b"one", b"two", b"three")]


async def test_nothing_to_undo(images: ImageStorage, database_url: str) -> None:
    """Where there is nothing to go back to the caller is told so, and nothing changes."""
    await images.store_image("a.png", b"one")
    before = await contents(database_url)
    for name, generation in (("unknown.png", None), ("unknown.png", 1), ("a.png", None), ("a.png", 1), ("a.png", 9)):
        with pytest.raises(NotStored):
            await images.undo(name, generation)
    assert await contents(database_url) == before


@pytest.mark.parametrize("generation", [None, 1])
@pytest.mark.parametrize("deleted", [True, False], ids=["deleted", "overwritten"])
async def test_undo_after_a_purge(
    images: ImageStorage, database_url: str, deleted: bool, generation: int | None
) -> None:
    """What a purge has dropped cannot be undone; the name stays what it is."""
    await images.store_image("a.png", b"one")
    await (images.bury("a.png") if deleted else images.store_image("a.png", b"two"))
    await age(database_url, 31)
    await images.purge(MONTH)
    record = await images.find("a.png")
    with pytest.raises(NotStored):
        await images.undo("a.png", generation)
    assert await images.find("a.png") == record


async def test_undo_when_the_bytes_are_gone(images: ImageStorage, database_url: str) -> None:
    """A version whose bytes somebody dropped cannot come back; the name stays what it is."""
    first = await images.store_image("a.png", b"one")
    second = await images.store_image("a.png", b"two")
    await sql(database_url, "DELETE FROM image_chunk WHERE sha256 = :key", key=first.sha256)
    await sql(database_url, "DELETE FROM image_blob WHERE sha256 = :key", key=first.sha256)
    with pytest.raises(NotStored):
        await images.undo("a.png")
    assert await images.find("a.png") == second


# -- purging --------------------------------------------------------------------------------------------------------

AGO = {
    "sqlite": "datetime('now', '-' || :days || ' days')",
    "postgresql": "now() - CAST(:days AS text)::interval * 86400",
}


async def age(url: str, days: int, where: str = "1 = 1") -> None:
    """Make everything in the database older by days: history, blobs, chunks."""
    ago = AGO[url.partition("+")[0]]
    for table, column in (("image_history", "replaced_at"), ("image_blob", "stored_at"), ("image_chunk", "stored_at")):
        await sql(url, f"UPDATE {table} SET {column} = {ago} WHERE {where}", days=str(days))


async def stored_bytes(url: str) -> list[bytes]:
    """The data of all chunks."""
    return sorted(bytes(row[0]) for row in await sql(url, "SELECT data FROM image_chunk"))


async def test_purging_history(images: ImageStorage, database_url: str) -> None:
    """History older than `keep` goes, and its bytes with it; what is younger stays and can be undone."""
    for data in (b"oldest", b"old", b"now"):
        await images.store_image("a.png", data)
    await age(database_url, 31)
    await images.store_image("a.png", b"later")
    purged = await images.purge(MONTH)
    assert (purged.versions, purged.blobs, purged.size) == (2, 2, len(b"oldest") + len(b"old"))
    assert await stored_bytes(database_url) == [b"later", b"now"]
    assert [version.sha256 for version in await images.history("a.png")] == [digest_of(b"now")]
    await images.undo("a.png")
    assert await saved(images, "a.png") == b"now"


async def test_purging_keeps_what_is_young(images: ImageStorage, database_url: str) -> None:
    """Right after changes of every kind a purge drops nothing."""
    await images.store_image("a.png", b"one")
    await images.store_image("a.png", b"two")
    await images.store_image("b.png", b"three")
    await images.bury("b.png")
    before = await contents(database_url)
    purged = await images.purge(MONTH)
    assert (purged.versions, purged.blobs, purged.size) == (0, 0, 0)
    assert await contents(database_url) == before


async def test_a_purge_never_drops_what_is_wanted(images: ImageStorage, database_url: str) -> None:
    """Bytes that a living record or a young history refers to stay, however old they are."""
    await images.store_image("living.png", b"living")
    await images.store_image("shared.png", b"shared")
    await images.store_image("other.png", b"shared")
    await images.bury("other.png")
    await age(database_url, 400)
    await images.store_image("overwritten.png", b"before")
    await images.store_image("overwritten.png", b"after")
    await images.store_image("deleted.png", b"deleted")
    await images.bury("deleted.png")
    await age(database_url, 400, "sha256 IN (SELECT sha256 FROM image_blob) AND 1 = 1")
    await sql(database_url, "UPDATE image_history SET replaced_at = CURRENT_TIMESTAMP WHERE name <> 'other.png'")
    purged = await images.purge(MONTH, grace=timedelta(0))
    assert (purged.versions, purged.blobs, purged.size) == (1, 0, 0)
    assert await stored_bytes(database_url) == [b"after", b"before", b"deleted", b"living", b"shared"]
    await images.undo("overwritten.png")
    await images.undo("deleted.png")
    for name, data in (("living.png", b"living"), ("shared.png", b"shared")):
        assert await saved(images, name) == data
    assert await saved(images, "overwritten.png") == b"before"
    assert await saved(images, "deleted.png") == b"deleted"


async def test_a_purge_keeps_tombstones(images: ImageStorage, database_url: str) -> None:
    """A purge drops the bytes of a deleted name, and never its tombstone: deleted stays deleted."""
    await images.store_image("a.png", b"one")
    tombstone = await images.bury("a.png")
    await age(database_url, 31)
    purged = await images.purge(MONTH)
    assert (purged.versions, purged.blobs, purged.size) == (1, 1, 3)
    assert await stored_bytes(database_url) == []
    assert await images.find("a.png") == tombstone
    assert await images.store_image("a.png", b"one", only_new=True) == tombstone
    assert (await images.store_image("a.png", b"one")).generation == 3
    assert await saved(images, "a.png") == b"one"


async def test_a_dry_purge(images: ImageStorage, database_url: str) -> None:
    """A dry run says what a purge would drop, and drops nothing; a second purge finds nothing more."""
    for number in range(3):
        await images.store_image("a.png", b"%d" % number)
        await images.store_image(f"{number}.png", bytes(number))
        await images.bury(f"{number}.png")
    await age(database_url, 31)
    before = await contents(database_url)
    would = await images.purge(MONTH, dry_run=True)
    assert await contents(database_url) == before
    assert await images.purge(MONTH) == would
    assert (would.versions, would.blobs, would.size) == (5, 5, 1 + 1 + 0 + 1 + 2)
    again = await images.purge(MONTH)
    assert (again.versions, again.blobs, again.size) == (0, 0, 0)


async def break_off(images: ImageStorage, name: str, *, promise: bool = False) -> None:
    """Begin a large upload, and go away when its first chunks stand in the database."""
    data = random.Random(name).randbytes(4 * LARGE + CHUNK)

    async def breaking() -> AsyncIterator[bytes]:
        yield data
        raise EOFError

    with pytest.raises(EOFError):
        await images.store_image(name, breaking(), known=digests_of(data) if promise else None)


@pytest.mark.parametrize("promise", [False, True], ids=["digest unknown", "digest promised"])
async def test_chunks_of_aborted_uploads(images: ImageStorage, database_url: str, promise: bool) -> None:
    """The chunks of an upload that broke off are swept, but not before the grace period is over."""
    await images.store_image("good.png", bytes(LARGE))
    good = await stored_bytes(database_url)
    await break_off(images, "broken.png", promise=promise)
    assert len(await stored_bytes(database_url)) > len(good)
    await age(database_url, 2 * GRACE.days)
    await break_off(images, "young.png", promise=promise)
    both = len(await stored_bytes(database_url)) - len(good)
    await images.purge(MONTH)
    young = len(await stored_bytes(database_url)) - len(good)
    assert 0 < young == both - young
    await images.purge(MONTH, grace=timedelta(days=-1))
    assert await stored_bytes(database_url) == good
    assert await saved(images, "good.png") == bytes(LARGE)


async def test_grace_for_bytes_without_a_record(images: ImageStorage, database_url: str) -> None:
    """Bytes that nothing refers to are left alone for as long as the grace says."""
    await images.store_image("a.png", b"one")
    await sql(database_url, "DELETE FROM image_storage")
    await age(database_url, 3)
    assert (await images.purge(MONTH, grace=timedelta(days=4))).blobs == 0
    assert await stored_bytes(database_url) == [b"one"]
    assert (await images.purge(MONTH, grace=timedelta(days=2))).blobs == 1
    assert await stored_bytes(database_url) == []


async def test_a_purge_while_old_bytes_are_saved_anew(images: ImageStorage, database_url: str) -> None:
    """A purge never takes bytes from under a save that goes on at the same time, and neither of them fails."""
    for turn in range(8):
        name, data = f"{turn}.png", b"%d" % turn * CHUNK
        await images.store_image(name, data)
        await images.bury(name)
        await age(database_url, 31)
        await asyncio.gather(
            images.store_image(name, data),
            images.purge(MONTH),
            images.store_image(f"other-{turn}.png", data),
        )
        assert await saved(images, name) == data
        assert await saved(images, f"other-{turn}.png") == data


# -- many at once ---------------------------------------------------------------------------------------------------


async def stored_many(images: ImageStorage, files: list[SmallFile]) -> dict[str, Record]:
    """Store a batch; the records that its names have then."""
    stored = await images.store_many(files)
    records = await images.find_many(file.name for file in files)
    assert stored == {
        file.name
        for file in files
        if (records[file.name].sha256, records[file.name].deleted_at) == (file.digests.whole, None)
    }
    return records


async def test_store_many(images: ImageStorage) -> None:
    """A batch of files is stored whole, each with its own time, equal bytes among them."""
    files = {f"{number:03}.jpg": b"%d" % (number // 2) for number in range(200)}
    files |= {"empty.png": b"", "three.bin": bytes(2 * CHUNK + 1)}
    batch = [small_file(name, data, modified_ns=number) for number, (name, data) in enumerate(files.items())]
    records = await stored_many(images, batch)
    assert sorted(records) == sorted(files)
    assert records == await images.find_many(files)
    for number, (name, data) in enumerate(files.items()):
        record = records[name]
        assert (record.sha256, record.size, record.modified_ns) == (digest_of(data), len(data), number)
        assert (record.generation, record.is_deleted) == (1, False)
    assert records["000.jpg"].content_type == "image/jpeg"
    for name in ("000.jpg", "001.jpg", "199.jpg", "empty.png", "three.bin"):
        assert await whole(images, records[name]) == files[name]


async def test_store_many_leaves_what_has_a_record(images: ImageStorage) -> None:
    """A batch changes no name that has a record, and brings no deleted one back; it says what they are."""
    alive = await images.store_image("alive.png", b"one")
    await images.store_image("dead.png", b"one")
    dead = await images.bury("dead.png")
    batch = [small_file(name, b"other") for name in ("alive.png", "dead.png", "new.png")]
    records = await stored_many(images, batch)
    assert (records["alive.png"], records["dead.png"]) == (alive, dead)
    assert records["new.png"].generation == 1
    assert await saved(images, "alive.png") == b"one"
    assert await saved(images, "new.png") == b"other"
    assert await stored_many(images, batch) == records


async def test_store_nothing(images: ImageStorage, database_url: str) -> None:
    """An empty batch is stored at once: nothing changes."""
    before = await contents(database_url)
    assert await stored_many(images, []) == {}
    assert await images.find_many([]) == {}
    assert await images.fetch([]) == {}
    assert await contents(database_url) == before


async def test_two_batches_at_once(images: ImageStorage) -> None:
    """Batches of the same files from two sides, in different order, both succeed."""
    batch = [small_file(f"{number}.png", b"%d" % (number % 40)) for number in range(100)]
    results = await asyncio.gather(*(stored_many(images, order) for order in (batch, batch[::-1], batch[50:])))
    assert results[0] == results[1]
    assert len(results[0]) == 100
    assert {record.generation for record in results[0].values()} == {1}


async def test_two_batches_of_the_same_names(images: ImageStorage) -> None:
    """Batches that bring other bytes for the same names, in opposite order, both succeed; one of them is first."""
    names = [f"{number:03}.png" for number in range(300)]
    one = [small_file(name, b"one" + name.encode()) for name in names]
    two = [small_file(name, b"two" + name.encode()) for name in reversed(names)]
    for_one, for_two = await asyncio.gather(stored_many(images, one), stored_many(images, two))
    assert for_one == for_two == await images.find_many(names)
    assert {record.sha256 for record in for_one.values()} <= {file.digests.whole for file in one + two}


async def test_fetch(images: ImageStorage) -> None:
    """One question brings the records of many names with the first chunk of each; a tombstone has none."""
    large = random.randbytes(CHUNK + 10)
    files = {"small.png": b"small", "empty.png": b"", "large.png": large, "chunk.png": large[:CHUNK]}
    for name, data in files.items():
        await images.store_image(name, data)
    await images.store_image("dead.png", b"dead")
    await images.bury("dead.png")
    found = await images.fetch([*files, "dead.png", "unknown.png"])
    assert sorted(found) == sorted([*files, "dead.png"])
    assert {name: found[name].record for name in found} == await images.find_many(found)
    assert found["small.png"].first == b"small"
    assert found["large.png"].first == found["chunk.png"].first == large[:CHUNK]
    assert not found["empty.png"].first
    assert found["dead.png"].first is None
    assert found["dead.png"].record.is_deleted


async def test_one_name_is_answered_as_many_are(images: ImageStorage) -> None:
    """A name asked for alone, alive, deleted or unknown, gets what it gets among others."""
    asked = [*DISTINCT, "dead.png", "unknown.png"]
    for name in asked[:-1]:
        await images.store_image(name, name.encode())
    await images.bury("dead.png")
    together, generations = await images.fetch(asked), await images.generations(asked)
    assert len(together) == len(generations) == len(asked) - 1
    for name in asked:
        assert await images.fetch([name]) == {key: found for key, found in together.items() if key == name}
        assert await images.generations([name]) == {key: it for key, it in generations.items() if key == name}


async def test_many_names_in_one_question(images: ImageStorage) -> None:
    """However many names are asked for at once, there is an answer for each that has a record."""
    files = [small_file(f"{number}.png", b"%d" % number) for number in range(300)]
    await images.store_many(files)
    asked = [f"{number}.png" for number in range(40_000)]
    assert sorted(await images.find_many(asked)) == sorted(file.name for file in files)
    found = await images.fetch(asked)
    assert {name: what.first for name, what in found.items()} == {file.name: file.chunks[0] for file in files}


# -- names and pages ------------------------------------------------------------------------------------------------

NFC, NFD = unicodedata.normalize("NFC", "café.png"), unicodedata.normalize("NFD", "café.png")
DISTINCT = [
    "a.png", "A.png", "a.PNG", "Ä.png", "ä.png", "æ.png", "ae.png", NFC, NFD, "cafe.png", "Café.png", "CAFÉ.PNG",
    "straße.png", "strasse.png", "ı.png", "i.png", "I.png", "İ.png", "ﬁ.png", "fi.png", "a b.png", "a_b.png",
    "a-b.png", "ab.png", "a%b.png", "10.png", "9.png", "2.png", "a/b.png", "a/B.png", "A/b.png", "日本.png", "😀.png",
    "\uffed.png", "\u2126.png", "\u03a9.png", "a'b.png", 'a"b.png', "a[b]@2x.png", "a;b.png", "null", "a\u200bb.png",
]  # fmt: skip


async def test_names_that_only_look_alike(images: ImageStorage) -> None:
    """Case, accents, compositions and signs count: each is a name of its own, with its own bytes."""
    for name in DISTINCT:
        await images.store_image(name, name.encode())
    assert await images.count() == len(DISTINCT)
    assert {name: found.first for name, found in (await images.fetch(DISTINCT)).items()} == {
        name: name.encode() for name in DISTINCT
    }
    for name in DISTINCT:
        record = await images.find(name)
        assert record is not None
        assert (record.name, record.sha256, record.generation) == (name, digest_of(name.encode()), 1)
    await images.bury("a.png")
    records = await images.find_many(DISTINCT)
    assert [name for name in DISTINCT if records[name].is_deleted] == ["a.png"]


@pytest.mark.parametrize("size", [1, 7, len(DISTINCT), 1000])
async def test_pages(images: ImageStorage, size: int) -> None:
    """Pages bring every record once, in the order of the bytes of the names, no page larger than asked."""
    await images.store_many([small_file(name, name.encode()) for name in DISTINCT])
    pages = [page async for page in images.pages(size=size)]
    assert all(0 < len(page) <= size for page in pages)
    got = [record for page in pages for record in page]
    assert [record.name for record in got] == sorted(DISTINCT, key=str.encode)
    assert {record.name: record for record in got} == await images.find_many(DISTINCT)


async def test_pages_of_text_that_is_no_utf8(sqlite_url: str) -> None:
    """SQLite keeps names that are no UTF-8, and names that are no text: each is told once, and those after it come."""
    async with UploadStore("uploads", sqlite_url) as store:
        images = store.database
        await images.create_tables()
        for name in ("a", "b", "c", "d", "e", "é"):
            await images.store_image(name, b"x")
        for name, value in {"b": "CAST(x'61ff' AS TEXT)", "c": "CAST(x'61fe' AS TEXT)", "d": "x'61ff'"}.items():
            await sql(sqlite_url, f"UPDATE image_storage SET name = {value} WHERE name = '{name}'")
        records = [record.name async for page in images.pages(size=1) for record in page]
        names = [name async for key_range in images.key_ranges(1) for name, _ in await images.names_in(key_range)]
    assert records == names == ["a", "a\udcfe", "a\udcff", "e", "é", "a\ufffd"]


async def test_pages_of_the_living_and_the_dead(images: ImageStorage) -> None:
    """Pages bring the living, the deleted, or all."""
    for name in "abcdef":
        await images.store_image(name, b"x")
    for name in "bdf":
        await images.bury(name)
    for deleted, wanted in ((False, "ace"), (True, "bdf"), (None, "abcdef")):
        got = [record.name for record in [r async for page in images.pages(deleted=deleted, size=2) for r in page]]
        assert got == list(wanted)


async def test_pages_without_bytes(images: ImageStorage, database_url: str) -> None:
    """Listing and counting read no bytes: they go on when there are none."""
    for name in "abc":
        await images.store_image(name, b"x")
    await sql(database_url, "DROP TABLE image_chunk")
    await sql(database_url, "DROP TABLE image_blob")
    assert [[record.name for record in page] async for page in images.pages(size=2)] == [["a", "b"], ["c"]]
    assert await images.count() == 3


async def test_pages_while_records_change(images: ImageStorage) -> None:
    """What changes while pages are read neither stops them nor doubles a name."""
    names = [f"{number:02}" for number in range(20)]
    await images.store_many([small_file(name, b"x") for name in names])
    got = []
    async for page in images.pages(size=3):
        got += [record.name for record in page]
        await images.bury(page[0].name)
        await images.store_image(f"0-{page[-1].name}", b"y")
        await images.store_image("99", b"z")
    assert [name for name in got if name in names] == names
    assert len(set(got)) == len(got)


async def test_no_pages(images: ImageStorage) -> None:
    """An empty catalogue has no page."""
    assert [page async for page in images.pages()] == []
    assert await images.count() == 0


# -- in the caller's transaction ------------------------------------------------------------------------------------

Caller = Callable[[str, Callable[[Any], Awaitable[None]]], Awaitable[None]]


async def with_connection(url: str, work: Callable[[Any], Awaitable[None]]) -> None:
    """Run work in a transaction of an AsyncConnection; it is rolled back if work fails."""
    engine = create_async_engine(url, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            await work(connection)
    finally:
        await engine.dispose()


async def with_session(url: str, work: Callable[[Any], Awaitable[None]]) -> None:
    """Run work in a transaction of an AsyncSession; it is rolled back if work fails."""
    engine = create_async_engine(url, poolclass=NullPool)
    try:
        async with AsyncSession(engine) as session, session.begin():
            await work(session)
    finally:
        await engine.dispose()


CALLERS = pytest.mark.parametrize("caller", [with_connection, with_session])
APP_TABLE = "CREATE TABLE app_cat (name varchar(99) PRIMARY KEY)"


@CALLERS
@pytest.mark.parametrize("data", [b"new", b"", bytes(LARGE)], ids=["small", "nothing", "large"])
async def test_in_a_transaction_that_commits(
    images: ImageStorage, database_url: str, caller: Caller, data: bytes
) -> None:
    """What was stored inside the caller's transaction is there with its commit, together with the app's own rows."""
    await sql(database_url, APP_TABLE)
    await images.store_image("old.png", b"old")
    returned: list[Record] = []

    async def work(connection: AsyncConnection | AsyncSession) -> None:
        await connection.execute(text("INSERT INTO app_cat VALUES ('tom')"))
        for name in ("new.png", "old.png"):
            returned.append(await images.store_image(name, data, connection=connection))

    await caller(database_url, work)
    assert await sql(database_url, "SELECT name FROM app_cat") == [("tom",)]
    assert [await images.find(name) for name in ("new.png", "old.png")] == returned
    assert [record.generation for record in returned] == [1, 2]
    assert [await saved(images, name) for name in ("new.png", "old.png")] == [data, data]
    assert [version.sha256 for version in await images.history("old.png")] == [digest_of(b"old")]


@CALLERS
@pytest.mark.parametrize("data", [b"new", bytes(LARGE)], ids=["small", "large"])
async def test_in_a_transaction_that_is_rolled_back(
    images: ImageStorage, database_url: str, caller: Caller, data: bytes
) -> None:
    """Of what was stored inside the caller's transaction nothing at all is left if that is rolled back."""
    await sql(database_url, APP_TABLE)
    await images.store_image("old.png", b"old")
    before = await contents(database_url)

    async def work(connection: AsyncConnection | AsyncSession) -> None:
        await connection.execute(text("INSERT INTO app_cat VALUES ('tom')"))
        for name in ("new.png", "old.png"):
            await images.store_image(name, data, connection=connection)
        raise EOFError("the app thought better of it")

    with pytest.raises(EOFError):
        await caller(database_url, work)
    assert await contents(database_url) == before
    assert await sql(database_url, "SELECT name FROM app_cat") == []
    assert await saved(images, "old.png") == b"old"
    assert await images.find("new.png") is None


@CALLERS
async def test_a_transaction_sees_its_own_saves(images: ImageStorage, database_url: str, caller: Caller) -> None:
    """Saves of one name inside one transaction are generations that follow each other."""
    generations: list[int] = []

    async def work(connection: AsyncConnection | AsyncSession) -> None:
        for data in (b"one", b"two", b"two", b"three"):
            generations.append((await images.store_image("a.png", data, connection=connection)).generation)

    await caller(database_url, work)
    assert generations == [1, 2, 2, 3]
    assert await saved(images, "a.png") == b"three"
    assert [version.generation for version in await images.history("a.png")] == [2, 1]


@CALLERS
async def test_a_refusal_inside_a_transaction(images: ImageStorage, database_url: str, caller: Caller) -> None:
    """A save that is refused leaves the caller's transaction usable, and nothing of itself in it."""

    async def work(connection: AsyncConnection | AsyncSession) -> None:
        with pytest.raises(InvalidName):
            await images.store_image("../a.png", b"x", connection=connection)
        with pytest.raises(Unsettled):
            await images.store_image("a.png", b"x", known=digests_of(b"y"), connection=connection)
        await images.store_image("b.png", b"good", connection=connection)

    await caller(database_url, work)
    assert await images.find("a.png") is None
    assert await saved(images, "b.png") == b"good"


# -- at the same time -----------------------------------------------------------------------------------------------


async def test_parallel_saves_of_one_name(images: ImageStorage) -> None:
    """Of many saves of one name at once none fails and none is lost: generations follow each other."""
    wanted = [b"picture %d" % number for number in range(20)]
    records = await asyncio.gather(*(images.store_image("a.png", data) for data in wanted))
    assert sorted(record.generation for record in records) == list(range(1, 21))
    last = await now(images)
    assert last.generation == 20
    assert last in records
    versions = await images.history("a.png")
    assert [version.generation for version in versions] == list(range(19, 0, -1))
    by_generation = {record.generation: record.sha256 for record in records}
    assert [version.sha256 for version in versions] == [by_generation[generation] for generation in range(19, 0, -1)]
    assert sorted([last.sha256, *(version.sha256 for version in versions)]) == sorted(map(digest_of, wanted))


async def test_parallel_changes_of_one_name(images: ImageStorage) -> None:
    """Saves, deletions and undos of one name at once never fail, and every change is a generation of its own."""
    one, two = b"one" * 1000, b"two" * 1000
    await images.store_image("a.png", one)
    await images.store_image("a.png", two)
    work: list[Awaitable[Any]] = []
    for _ in range(8):
        work += [images.store_image("a.png", one), images.undo("a.png"), images.store_image("a.png", two)]
        work += [images.bury("a.png"), images.undo("a.png")]
    await asyncio.gather(*work)
    record = await now(images)
    generations = [version.generation for version in await images.history("a.png")]
    assert len(generations) == len(set(generations))
    assert all(generation < record.generation for generation in generations)
    if not record.is_deleted:
        assert await whole(images, record) in (one, two)


async def test_many_names_at_the_same_time(images: ImageStorage) -> None:
    """More saves at once than there are connections wait for each other, and all succeed."""
    records = await asyncio.gather(*(images.store_image(f"{n}.png", b"%d" % (n // 2)) for n in range(40)))
    assert [record.name for record in records] == [f"{n}.png" for n in range(40)]
    assert await images.count() == 40
    for number in (0, 1, 39):
        assert await saved(images, f"{number}.png") == b"%d" % (number // 2)


@pytest.mark.parametrize(("size", "times"), [(4000, 90), (LARGE, 10)], ids=["small", "large"])
async def test_cancelled_saves(store: UploadStore, size: int, times: int) -> None:
    """A save that is cancelled at any moment is either all there or not at all, and repeating it is harmless."""
    images = store.database
    usual = 0.0
    for name in ("cold.png", "warm.png"):
        began = time.monotonic()
        await images.store_image(name, random.randbytes(size))
        usual = time.monotonic() - began
    for number in range(times):
        name, data = f"{number}.png", random.randbytes(size)
        task = asyncio.create_task(images.store_image(name, data))
        await asyncio.sleep(random.uniform(0, 1.3) * usual)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.tasks.settle(20)
        found = await images.find(name)
        assert await saved(images, name) in ((None,) if found is None else (data,))
        again = await images.store_image(name, data)
        assert again.generation == 1
        assert found in (None, again)
        assert await saved(images, name) == data
        assert await images.history(name) == []


async def test_cancelled_overwrites(store: UploadStore) -> None:
    """An overwrite that is cancelled leaves the old version or the new one, with its bytes and its history."""
    images = store.database
    await images.store_image("a.png", b"0")
    done = [b"0"]
    for number in range(1, 31):
        data = b"%d" % number
        task = asyncio.create_task(images.store_image("a.png", data))
        await asyncio.sleep(random.uniform(0, 0.02))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.tasks.settle(20)
        got = await saved(images, "a.png")
        assert got in (done[-1], data)
        done += [data] if got == data else []
    assert (await now(images)).generation == len(done)
    versions = await images.history("a.png")
    assert [version.sha256 for version in reversed(versions)] == [digest_of(data) for data in done[:-1]]


# -- several processes ----------------------------------------------------------------------------------------------

PROCESSES = 8
TURNS = 4


def crowd(work: str, url: str) -> None:
    """Run a coroutine function of this file in several processes at the same moment; run by `in_processes`."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(PROCESSES)

    def member(number: int) -> None:
        barrier.wait(60)
        asyncio.run(globals()[work](url, number))

    members = [context.Process(target=member, args=(number,)) for number in range(PROCESSES)]
    for process in members:
        process.start()
    for process in members:
        process.join()
    sys.exit(sum(process.exitcode != 0 for process in members))


async def in_processes(work: Callable[[str, int], Awaitable[None]], url: str) -> None:
    """Run `work(url, number)` in several processes at once; fail with what the first of them to fail says."""
    program = f"import sys, {__name__} as tests; tests.crowd({work.__name__!r}, sys.argv[1])"
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", program, url]
    done = await anyio.run_process(command, check=False, env=environment())
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert "Warning" not in said, said


async def make_tables(url: str, number: int) -> None:
    """What one of several processes does that start together."""
    images = ImageStorage(url)
    await images.create_tables()
    await images.store_image(f"{number}.png", b"%d" % number)
    await images.close()


async def upload(url: str, number: int) -> None:
    """What one of several processes does that upload together: files of its own, a shared name, shared bytes."""
    images = ImageStorage(url)
    for turn in range(TURNS):
        await images.store_image(f"{number}/{turn}.png", random.Random(f"{number}/{turn}").randbytes(200_000))
        await images.store_image("shared.png", b"%d of %d" % (turn, number))
        await images.store_image(f"{number}/same.png", b"same" * turn)
    await images.close()


async def test_tables_made_by_several_processes(database_url: str) -> None:
    """Processes that start together may all make the tables; none of them fails, and each can store at once."""
    await in_processes(make_tables, database_url)
    images = ImageStorage(database_url)
    assert await images.count() == PROCESSES
    await images.close()
    assert len((await contents(database_url))["image_schema"]) == 1


async def test_several_processes_upload(images: ImageStorage, database_url: str) -> None:
    """Processes that upload into one database at once wait for each other; none is told that it is locked."""
    await in_processes(upload, database_url)
    for number in range(PROCESSES):
        for turn in range(TURNS):
            data = random.Random(f"{number}/{turn}").randbytes(200_000)
            assert await saved(images, f"{number}/{turn}.png") == data
        assert await saved(images, f"{number}/same.png") == b"same" * (TURNS - 1)
    shared = await images.find("shared.png")
    assert shared is not None
    assert shared.generation == TURNS * PROCESSES
    versions = await images.history("shared.png")
    assert [version.generation for version in versions] == list(range(shared.generation - 1, 0, -1))
