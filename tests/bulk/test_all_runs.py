"""The bulk runs, with damage planted on both sides: exact counts, what is on disk afterwards, and no second change."""

from __future__ import annotations

import errno
import hashlib
import os
import sqlite3
import stat
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, closing
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from selfheal import (
    DatabaseUnavailable,
    Record,
    SchemaError,
    SelfHealMiddleware,
    UploadStore,
    bulk,
)
from selfheal.bulk.outcomes import Result
from selfheal.content.digests import chunk_digest
from selfheal.content.sources import CHUNK
from selfheal.disk import listing, syscalls
from selfheal.disk.listing import Listing
from selfheal.healing import batch_restore as landing
from selfheal.names import to_path
from tests.support.asgi import Wrapped, ask
from tests.support.sides import resize
from tests.support.sockets import make_socket

bulk_restore = import_module("selfheal.bulk.restore")  # the package has a function of that name

SQL = Callable[..., Awaitable[list[Any]]]
TABLES = ("image_storage", "image_blob", "image_chunk", "image_history", "image_schema")
MTIME = 1_500_000_000_123_456_789
MIB = 1024 * 1024


# -- what a run said, and what there is --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """What a run said; no name may come twice."""

    results: list[Result]

    @property
    def counts(self) -> dict[str, int]:
        """How many names by outcome."""
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
        """The outcome of every name that is left wrong."""
        return {result.name: result.outcome.value for result in self.results if result.is_problem}

    def detail(self, name: str) -> str:
        """What was said of a name to people."""
        return next(result.detail for result in self.results if result.name == name)


async def told(run: AsyncGenerator[Result, None]) -> Told:
    """Run to the end."""
    async with aclosing(run):
        results = [result async for result in run]
    names = [result.name for result in results if result.name]
    assert len(names) == len(set(names)), f"told twice: {[name for name in names if names.count(name) > 1]}"
    assert all(result.detail for result in results if result.is_problem), "a problem without a word on what to do"
    return Told(results)


def tree(base: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below a directory, links as links: kind and mode, time, size, bytes."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in [base, *sorted(base.rglob("*"))] if base.exists() else []:
        measured = path.lstat()
        seen: tuple[Any, ...] = (measured.st_mode, measured.st_mtime_ns, measured.st_ino)
        if stat.S_ISREG(measured.st_mode):
            seen += (measured.st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        found[str(path)] = seen
    return found


async def rows(sql: SQL) -> dict[str, list[Any]]:
    """Every row of every table."""
    return {table: sorted(await sql(f"SELECT * FROM {table}"), key=repr) for table in TABLES}


def quarantined(store: UploadStore) -> list[tuple[str, bytes]]:
    """What is in quarantine: names and bytes."""
    place = store.disk.quarantine_path
    found = [path for path in place.rglob("*") if path.is_file()]
    return sorted((str(Path(*path.relative_to(place).parts[1:])), path.read_bytes()) for path in found)


def litter(directory: Path) -> list[str]:
    """Files of our own that a run has left below the uploads."""
    return [str(path) for path in directory.rglob(".selfheal*")]


def noise(size: int, seed: object = 0) -> bytes:
    """Bytes that are nothing in particular."""
    return Random(ascii((seed, size))).randbytes(size)


def lay(directory: Path, name: str, data: bytes, *, mtime: int = MTIME) -> Path:
    """Write a file as a deploy would, not through selfheal."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o644)
    os.utime(path, ns=(mtime, mtime))
    return path


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file, and leave its size and time as they are: a disk that rots."""
    measured = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(measured.st_mtime_ns, measured.st_mtime_ns))


@pytest.fixture
async def sql(database_url: str) -> AsyncIterator[SQL]:
    """Statements straight into the database, as somebody else would write them."""
    engine = create_async_engine(database_url)

    async def run(statement: str, **values: Any) -> list[Any]:
        async with engine.begin() as connection:
            result = await connection.execute(text(statement), values)
            return [tuple(row) for row in result] if result.returns_rows else []

    yield run
    await engine.dispose()


# -- everything comes back -------------------------------------------------------------------------------------------

SIZES = (0, 1, 255, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, MIB + 3, 3 * MIB, 4 * MIB, 4 * MIB + 1)
AWKWARD = (
    "with space.png",
    "ümläut.jpg",
    "日本/写真 1.jpg",
    "😀/👨‍👩‍👧.gif",
    "caf\u00e9.png",
    "cafe\u0301.png",
    "100%.png",
    "%41.png",
    "a+b&c=d;e.jpg",
    "[x]{y}(z).png",
    "icon@2x.png",
    "quote'\"`.png",
    "CASE.png",
    "case.png",
    "a/b/c/d/e/f/g/h.png",
    f"{'l' * 251}.png",
    f"{'d' * 250}/{'e' * 250}/{'f' * 6}.png",
    "no extension",
    "-rf",
    "~root",
    "two..dots.png",
    "*?.png",
    "$HOME.png",
    "#fragment?query.png",
    "\u00a0nbsp.png",
    "comet.png",
    "<b>&amp;.svg",
    "x.html",
)
TIMES = (MTIME, 0, 1, -1_000_000_001, 999_999_999, 4_102_444_800_000_000_001)


def gallery(directory: Path) -> dict[str, bytes]:
    """Files of every size and with every awkward name, laid below a directory; their bytes by name."""
    images = {f"sizes/{size}.bin": noise(size) for size in SIZES} | {"huge.bin": noise(20_000_001)}
    images |= {name: noise(100 + index) for index, name in enumerate(AWKWARD)}
    for index, (name, data) in enumerate(images.items()):
        lay(directory, name, data, mtime=TIMES[index % len(TIMES)])
    return images


async def test_everything_comes_back(store: UploadStore, directory: Path, sql: SQL) -> None:
    """After the directory is gone every name has the same bytes, time, mode and ETag, and no run changes any more."""
    images = gallery(directory)
    before = {name: (directory / name).stat() for name in images}
    etags = await _etags(store, images)

    migrated = await told(bulk.migrate(store))
    assert (migrated.counts, migrated.problems) == ({"migrated": len(images)}, {})
    assert sum(result.size for result in migrated.results) == sum(map(len, images.values()))

    _remove(directory)
    umask = os.umask(0o077)
    try:
        restored = await told(bulk.restore(store))
    finally:
        os.umask(umask)
    assert (restored.counts, restored.problems) == ({"restored": len(images)}, {})
    assert sum(result.size for result in restored.results) == sum(map(len, images.values()))
    for name, data in images.items():
        there = (directory / name).stat()
        assert (directory / name).read_bytes() == data, name
        assert (there.st_mtime_ns, there.st_mode) == (before[name].st_mtime_ns, before[name].st_mode), name
    assert {path.stat().st_mode & 0o777 for path in directory.rglob("*") if path.is_dir()} == {0o755}
    assert await _etags(store, images) == etags
    assert litter(directory) == []

    disk, database = tree(directory.parent), await rows(sql)
    for run in (bulk.migrate(store), bulk.restore(store, verify=True), bulk.verify(store, drill=True)):
        assert (await told(run)).counts == {"ok": len(images)}
    assert (tree(directory.parent), await rows(sql)) == (disk, database)


async def _etags(store: UploadStore, images: Mapping[str, bytes]) -> dict[str, tuple[str, str]]:
    app = SelfHealMiddleware(Wrapped(), store, adopt=False)
    answers = {name: await ask(app, to_path(name, "/static/uploads"), method="HEAD") for name in images}
    assert {answer.status for answer in answers.values()} == {200}
    return {name: (answer.headers["etag"], answer.headers["last-modified"]) for name, answer in answers.items()}


def _remove(directory: Path) -> None:
    """Remove a directory and all that is below it; `shutil.rmtree` will not do for names of 512 bytes."""
    for path in sorted(directory.rglob("*"), key=lambda path: len(path.parts), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    directory.rmdir()


async def test_equal_bytes_are_stored_once(store: UploadStore, directory: Path, sql: SQL) -> None:
    """Equal bytes under many names are one blob, and every name comes back with its own time."""
    for index in range(5):
        lay(directory, f"{index}.png", noise(CHUNK + 9), mtime=MTIME + index)
    assert (await told(bulk.migrate(store))).counts == {"migrated": 5}
    assert await sql("SELECT size, chunks FROM image_blob") == [(CHUNK + 9, 2)]
    _remove(directory)
    assert (await told(bulk.restore(store))).counts == {"restored": 5}
    assert [(directory / f"{index}.png").stat().st_mtime_ns - MTIME for index in range(5)] == [0, 1, 2, 3, 4]


async def test_batches_and_pages_have_no_seams(
    store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many more files than one batch or page holds each is told once, by every run."""
    resize(monkeypatch, FILES_AT_ONCE=8, ENTRIES_AT_ONCE=8, NAMES_AT_ONCE=20, LISTED_AT_MOST=9)
    resize(monkeypatch, SMALL_AT_ONCE=3 * CHUNK, LARGE_AT_ONCE=3 * CHUNK)
    for index in range(90):
        lay(directory, f"{index % 7}/{index:02}.png", noise(index % 50 + CHUNK * (index % 9 == 0), index))
    assert (await told(bulk.migrate(store))).counts == {"migrated": 90}
    _remove(directory)
    assert (await told(bulk.verify(store, jobs=1))).counts == {"missing_on_disk": 90}
    assert (await told(bulk.restore(store))).counts == {"restored": 90}
    assert (await told(bulk.verify(store, drill=True, jobs=64))).counts == {"ok": 90}
    assert (await told(bulk.migrate(store))).counts == {"ok": 90}


async def test_nothing_at_all(store: UploadStore, directory: Path) -> None:
    """Where there is nothing on either side nothing is told, and no run makes a directory."""
    for run in (bulk.migrate(store), bulk.restore(store), bulk.restore(store, verify=True), bulk.verify(store)):
        assert (await told(run)).results == []
    assert not directory.exists()


# -- damage on disk --------------------------------------------------------------------------------------------------

HEALTHY = ("good.png", "cats/tom.jpg", "large.bin", "empty.png")
DIFFERENT = ("truncated.png", "emptied.png", "longer.png", "flipped.png", "rotten.png", "large-rotten.bin")
BLOCKED = ("linked.png", "a directory.png", "fifo.png")
TOUCHED = "touched.png"
REMOVED = ("removed.png", "gone/removed.bin")
BURIED = ("buried.png", "buried-other.png")
EXTRA = ("extra.png", "new/extra.bin", "extra-empty.png")
INVALID = ("CON", "nul.png", "dot.", "space ", ".hidden", "cats/.htaccess", "back\\slash.png", "bell\a.png", "a::$DATA")
STRANGE = ("link.png", "dangling.png", "link to directory", "pipe", "socket", ".git")
UNDECODABLE = os.fsdecode(b"latin-\xe9.png")


@dataclass
class Disk:
    """Uploads whose disk half was damaged in every way."""

    images: dict[str, bytes]
    outside: Path


@pytest.fixture
async def damaged_disk(store: UploadStore, directory: Path, tmp_path: Path) -> Disk:
    """Records whose files were damaged in every way, and entries on disk that are no uploads."""
    recorded = (*HEALTHY, *DIFFERENT, *BLOCKED, TOUCHED, *REMOVED, *BURIED)
    sizes = {"empty.png": 0, "large.bin": 3 * CHUNK + 5, "large-rotten.bin": 3 * CHUNK, "gone/removed.bin": 5 * MIB}
    images = {name: noise(sizes.get(name, 5000), name) for name in recorded}
    for name, data in images.items():
        lay(directory, name, data)
    assert (await told(bulk.migrate(store))).counts == {"migrated": len(images)}
    outside = tmp_path / "outside"
    lay(outside, "secret.png", b"secret")

    os.truncate(directory / "truncated.png", 4000)
    os.truncate(directory / "emptied.png", 0)
    lay(directory, "longer.png", images["longer.png"] + b"x")
    lay(directory, "flipped.png", bytes([images["flipped.png"][0] ^ 1]) + images["flipped.png"][1:], mtime=MTIME + 1)
    flip(directory / "rotten.png")
    flip(directory / "large-rotten.bin")
    os.utime(directory / TOUCHED, ns=(MTIME + 7, MTIME + 7))
    for name in (*REMOVED, *BLOCKED):
        (directory / name).unlink()
    (directory / "linked.png").symlink_to(outside / "secret.png")
    (directory / "a directory.png").mkdir()
    os.mkfifo(directory / "fifo.png")
    for name in BURIED:
        await store.delete(name)
    lay(directory, "buried.png", images["buried.png"])
    lay(directory, "buried-other.png", b"other bytes")
    for name in (*EXTRA, *INVALID, UNDECODABLE):
        lay(directory, name, b"" if name == "extra-empty.png" else noise(70_000, name))
    (directory / "link.png").symlink_to(outside / "secret.png")
    (directory / "dangling.png").symlink_to(outside / "nothing")
    (directory / "link to directory").symlink_to(outside)
    os.mkfifo(directory / "pipe")
    make_socket(directory / "socket")
    lay(directory, ".git/config", b"[core]")
    for ignored in (".gitkeep", ".DS_Store", "cats/Thumbs.db"):
        lay(directory, ignored, b"")
    return Disk(images, outside)


def _outcomes(**names: tuple[str, ...]) -> dict[str, str]:
    return {name: outcome for outcome, those in names.items() for name in those}


NO_UPLOADS = _outcomes(invalid_name=(*INVALID, UNDECODABLE, ".git"), failed=STRANGE[:-1])


async def test_verify_sees_all_damage_on_disk(damaged_disk: Disk, store: UploadStore, directory: Path) -> None:
    """Every damaged, missing and extra file is told by name and by what is wrong with it, once."""
    said = await told(bulk.verify(store))
    problems = NO_UPLOADS | _outcomes(
        missing_on_disk=REMOVED,
        differs=DIFFERENT,
        failed=BLOCKED,
        missing_in_database=EXTRA,
        deleted=BURIED,
    )
    assert said.problems == problems
    assert said.counts == dict(Counter(problems.values())) | {"ok": len(HEALTHY) + 1}
    assert said.outcomes == problems | _outcomes(ok=(*HEALTHY, TOUCHED))
    drilled = await told(bulk.verify(store, drill=True))
    assert drilled.outcomes == said.outcomes


async def test_restore_brings_back_what_is_missing_only(
    damaged_disk: Disk, store: UploadStore, directory: Path, sql: SQL
) -> None:
    """A plain restore brings back missing files and removes deleted ones; it touches no other file, and no record."""
    before, database = tree(directory), await rows(sql)
    said = await told(bulk.restore(store))
    assert said.problems == _outcomes(failed=BLOCKED)
    assert said.counts == {
        "ok": len(HEALTHY) + len(DIFFERENT) + 1,
        "restored": len(REMOVED),
        "deleted": len(BURIED),
        "failed": len(BLOCKED),
    }
    for name in REMOVED:
        assert (directory / name).read_bytes() == damaged_disk.images[name]
        assert (directory / name).stat().st_mtime_ns == MTIME
    assert [name for name in BURIED if (directory / name).exists()] == []
    assert quarantined(store) == [("buried-other.png", b"other bytes")]
    changed = {str(directory / name) for name in (*REMOVED, *BURIED, "gone", "")} | {str(directory)}
    after = tree(directory)
    assert {path: seen for path, seen in after.items() if path not in changed} == {
        path: seen for path, seen in before.items() if path not in changed
    }
    assert await rows(sql) == database

    settled = tree(directory.parent)
    again = await told(bulk.restore(store))
    assert again.counts == {"ok": len(HEALTHY) + len(DIFFERENT) + 1 + len(REMOVED), "failed": len(BLOCKED)}
    assert (tree(directory.parent), await rows(sql)) == (settled, database)


async def test_restore_with_verify_heals_and_quarantines(
    damaged_disk: Disk, store: UploadStore, directory: Path, sql: SQL
) -> None:
    """What differs is restored, its bad copy goes to quarantine whatever its size and time; a second run is all ok."""
    bad = {name: (directory / name).read_bytes() for name in DIFFERENT}
    database = await rows(sql)
    said = await told(bulk.restore(store, verify=True))
    assert said.problems == _outcomes(failed=BLOCKED)
    assert said.outcomes == _outcomes(
        ok=(*HEALTHY, TOUCHED), restored=(*REMOVED, *DIFFERENT), deleted=BURIED, failed=BLOCKED
    )
    for name in (*HEALTHY, *DIFFERENT, *REMOVED, TOUCHED):
        there = (directory / name).stat()
        assert (directory / name).read_bytes() == damaged_disk.images[name], name
        assert (there.st_mtime_ns, there.st_mode & 0o777) == (MTIME, 0o644), name
    assert quarantined(store) == sorted([*bad.items(), ("buried-other.png", b"other bytes")])
    assert store.disk.quarantine_path.stat().st_mode & 0o777 == 0o700
    assert (damaged_disk.outside / "secret.png").read_bytes() == b"secret"
    assert litter(directory) == []

    settled = tree(directory.parent)
    again = await told(bulk.restore(store, verify=True))
    assert again.counts == {"ok": len(HEALTHY) + 1 + len(DIFFERENT) + len(REMOVED), "failed": len(BLOCKED)}
    assert (tree(directory.parent), await rows(sql)) == (settled, database)


async def test_migrate_adopts_and_guesses_nothing(
    damaged_disk: Disk, store: UploadStore, directory: Path, sql: SQL
) -> None:
    """Files that are only on disk are brought in; what differs and what was deleted is told, and left as it is."""
    before, records = tree(directory.parent), await sql("SELECT * FROM image_storage ORDER BY name")
    said = await told(bulk.migrate(store))
    seen = tuple(name for name in DIFFERENT if "rotten" not in name)  # same size, same time: verify's to see
    problems = NO_UPLOADS | _outcomes(differs=seen, deleted=BURIED, failed=("linked.png", "fifo.png"))
    assert said.problems == problems
    assert said.counts == dict(Counter(problems.values())) | {
        "migrated": len(EXTRA),
        "ok": len(HEALTHY) + 1 + len(DIFFERENT) - len(seen),
    }
    assert tree(directory.parent) == before
    adopted = await sql("SELECT name, size, modified_ns, generation FROM image_storage WHERE name LIKE '%extra%'")
    assert sorted(adopted) == sorted((name, (directory / name).stat().st_size, MTIME, 1) for name in EXTRA)
    known = {name for name, *_ in records}
    assert [row for row in await sql("SELECT * FROM image_storage ORDER BY name") if row[0] in known] == records

    database = await rows(sql)
    again = await told(bulk.migrate(store))
    assert (again.problems, again.counts.get("migrated")) == (problems, None)
    assert (tree(directory.parent), await rows(sql)) == (before, database)


async def test_migrate_prefers_disk_when_told(
    damaged_disk: Disk, store: UploadStore, directory: Path, sql: SQL
) -> None:
    """`--prefer disk` makes the disk's bytes the next generation, keeps the old in the history, and is done once."""
    before = tree(directory.parent)
    seen = tuple(name for name in DIFFERENT if "rotten" not in name)
    said = await told(bulk.migrate(store, prefer_disk=True))
    assert said.problems == NO_UPLOADS | _outcomes(deleted=BURIED, failed=("linked.png", "fifo.png"))
    assert said.counts["migrated"] == len(EXTRA) + len(seen)
    assert tree(directory.parent) == before
    for name in seen:
        record = await store.database.find(name)
        assert record is not None
        assert (record.sha256, record.generation) == (_sha256((directory / name).read_bytes()), 2)
        assert [version.sha256 for version in await store.database.history(name)] == [
            _sha256(damaged_disk.images[name])
        ]
    database = await rows(sql)
    again = await told(bulk.migrate(store, prefer_disk=True))
    assert (again.problems, again.counts.get("migrated")) == (said.problems, None)
    assert (tree(directory.parent), await rows(sql)) == (before, database)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("prefer_disk", [False, True])
async def test_deleted_stays_deleted(store: UploadStore, directory: Path, prefer_disk: bool) -> None:
    """No run brings a deleted name back, even if its file is laid back on disk; restore removes that file."""
    data = noise(5000)
    await store.save("a.png", data)
    await store.delete("a.png")
    assert (await told(bulk.restore(store))).results == []
    assert not (directory / "a.png").exists()
    lay(directory, "a.png", data)
    assert (await told(bulk.verify(store))).problems == {"a.png": "deleted"}
    assert (await told(bulk.migrate(store, prefer_disk=prefer_disk))).problems == {"a.png": "deleted"}
    said = await told(bulk.restore(store))
    assert (said.counts, said.problems) == ({"deleted": 1}, {})
    assert not (directory / "a.png").exists()
    record = await store.database.find("a.png")
    assert record is not None
    assert record.is_deleted
    assert (await told(bulk.verify(store, drill=True))).results == []


async def test_a_link_to_a_directory_is_not_followed(store: UploadStore, directory: Path, tmp_path: Path) -> None:
    """A record below a link to a directory elsewhere is told as failed; nothing is read or written through the link."""
    await store.save("cats/tom.jpg", noise(5000))
    outside = tmp_path / "outside"
    (directory / "cats").rename(outside)
    (directory / "cats").symlink_to(outside)
    await store.database.store_image("cats/new.jpg", noise(100))
    before = tree(outside)
    for run in (bulk.restore(store), bulk.restore(store, verify=True)):
        assert (await told(run)).problems == {"cats/tom.jpg": "failed", "cats/new.jpg": "failed"}
    said = await told(bulk.verify(store))
    assert said.problems == {"cats/tom.jpg": "failed", "cats/new.jpg": "failed", "cats": "failed"}
    assert (await told(bulk.migrate(store))).problems == {"cats": "failed"}
    assert tree(outside) == before


# -- damage in the database ------------------------------------------------------------------------------------------

FLIP = "UPDATE image_chunk SET data = :flipped WHERE sha256 = :sha256 AND position = :last"
BYTES_DAMAGED = {
    "data flipped": [FLIP],
    "data cut short": ["UPDATE image_chunk SET data = :cut WHERE sha256 = :sha256 AND position = :last"],
    "data emptied": ["UPDATE image_chunk SET data = :empty WHERE sha256 = :sha256 AND position = 0"],
    "data and digest": [
        FLIP,
        "UPDATE image_chunk SET digest = :redone WHERE sha256 = :sha256 AND position = :last",
    ],
    "chunk missing": ["DELETE FROM image_chunk WHERE sha256 = :sha256 AND position = :last"],
    "first chunk missing": ["DELETE FROM image_chunk WHERE sha256 = :sha256 AND position = 0"],
    "all chunks missing": ["DELETE FROM image_chunk WHERE sha256 = :sha256"],
    "nothing left": [
        "DELETE FROM image_chunk WHERE sha256 = :sha256",
        "DELETE FROM image_blob WHERE sha256 = :sha256",
    ],
    "order swapped": [
        "UPDATE image_chunk SET position = 1000 WHERE sha256 = :sha256 AND position = 0",
        "UPDATE image_chunk SET position = 0 WHERE sha256 = :sha256 AND position = 1",
        "UPDATE image_chunk SET position = 1 WHERE sha256 = :sha256 AND position = 1000",
    ],
}
"""What leaves no good bytes; `migrate` can mend all of it from a good disk copy."""
BYTES_FINE = {
    "blob row missing": ["DELETE FROM image_blob WHERE sha256 = :sha256"],
    "blob of another size": ["UPDATE image_blob SET size = size + 1 WHERE sha256 = :sha256"],
}
"""What is damaged, yet leaves the bytes whole: they can still be restored."""
RECORD_WRONG = {
    "negative size": ["UPDATE image_storage SET size = -1 WHERE name = :name"],
    "another size": ["UPDATE image_storage SET size = size + 1 WHERE name = :name"],
    "huge size": ["UPDATE image_storage SET size = 9000000000000000000 WHERE name = :name"],
}
"""A record that is wrong itself: the bytes on disk cannot mend it."""
SMALL, LARGE = 5000, 2 * CHUNK + 77


def damage_of(name: str) -> str:
    """The damage that a name is called after."""
    return name.partition("/")[0]


def hurt_names(*catalogues: Mapping[str, list[str]]) -> dict[str, bytes]:
    """Names, called after their damage, with the bytes that they had before it."""
    return {
        f"{damage}/{size}.png": noise(size, damage)
        for catalogue in catalogues
        for damage in catalogue
        for size in (SMALL, LARGE)
    }


async def hurt(sql: SQL, name: str, data: bytes) -> None:
    """Plant the damage that a name is called after."""
    last = (len(data) - 1) // CHUNK
    chunk = data[last * CHUNK :]
    flipped = bytes([chunk[0] ^ 1]) + chunk[1:]
    values = {
        "name": name,
        "sha256": _sha256(data),
        "last": last,
        "flipped": flipped,
        "cut": chunk[:-1],
        "empty": b"",
        "redone": hashlib.sha256(last.to_bytes(8, "big") + flipped).digest(),
    }
    for statement in (BYTES_DAMAGED | BYTES_FINE | RECORD_WRONG)[damage_of(name)]:
        wanted = {key: value for key, value in values.items() if f":{key}" in statement}
        await sql(statement, **wanted)


@pytest.fixture
async def damaged_database(store: UploadStore, directory: Path, sql: SQL) -> dict[str, bytes]:
    """Good files on disk, and `good.png`; every other record is damaged in the way that its name says."""
    images = hurt_names(BYTES_DAMAGED, BYTES_FINE, RECORD_WRONG)
    for name, data in [("good.png", noise(7)), *images.items()]:
        lay(directory, name, data)
    assert (await told(bulk.migrate(store))).counts == {"migrated": len(images) + 1}
    for name, data in images.items():
        await hurt(sql, name, data)
    return images


async def test_verify_sees_all_damage_in_the_database(
    damaged_database: dict[str, bytes], store: UploadStore, directory: Path, sql: SQL
) -> None:
    """Every damage is told by name while the disk is good as well as when it is empty, and nothing is changed."""
    database = await rows(sql)
    expected = dict.fromkeys(damaged_database, "corrupt_in_database")
    for _ in ("with the files", "without"):
        before = tree(directory.parent)
        for drill in (False, True):
            said = await told(bulk.verify(store, drill=drill))
            good = {"good.png": "ok" if directory.exists() else "missing_on_disk"}
            assert said.outcomes == expected | good
        assert (tree(directory.parent), await rows(sql)) == (before, database)
        if directory.exists():
            _remove(directory)


async def test_restore_writes_no_damaged_byte(
    damaged_database: dict[str, bytes], store: UploadStore, directory: Path, sql: SQL
) -> None:
    """Damaged records are told by name and skipped; the rest is restored, and what stands on disk then is whole."""
    _remove(directory)
    database = await rows(sql)
    whole = {name for name in damaged_database if damage_of(name) in BYTES_FINE}
    said = await told(bulk.restore(store))
    assert said.problems == dict.fromkeys(damaged_database.keys() - whole, "corrupt_in_database")
    assert {name for name, outcome in said.outcomes.items() if outcome == "restored"} == whole | {"good.png"}
    files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert files == {name: damaged_database[name] for name in whole} | {"good.png": noise(7)}
    assert await rows(sql) == database

    before = tree(directory)
    again = await told(bulk.restore(store))
    assert (again.problems, again.counts["ok"]) == (said.problems, len(whole) + 1)
    assert tree(directory) == before


async def test_restore_keeps_good_files_of_damaged_records(
    damaged_database: dict[str, bytes], store: UploadStore, directory: Path
) -> None:
    """A good disk copy, the last one there is, is never touched because its record is damaged."""
    data = {name: damaged_database[name] for name in damaged_database if damage_of(name) not in RECORD_WRONG}
    await told(bulk.restore(store, verify=True))
    assert {name: (directory / name).read_bytes() for name in data} == data
    assert quarantined(store) == []


async def test_restore_keeps_both_where_both_are_damaged(
    damaged_database: dict[str, bytes], store: UploadStore, directory: Path
) -> None:
    """A bad disk copy stays where it is until the database has good bytes to put in its place."""
    bad = {name for name in damaged_database if damage_of(name) in BYTES_DAMAGED}
    for name in bad:
        flip(directory / name)
    before = tree(directory)
    said = await told(bulk.restore(store, verify=True))
    assert {name for name, outcome in said.problems.items() if outcome == "corrupt_in_database"} >= bad
    assert {path: seen for path, seen in tree(directory).items() if path.endswith(".png")} == {
        path: seen for path, seen in before.items() if path.endswith(".png")
    }


async def test_migrate_mends_from_good_files(
    damaged_database: dict[str, bytes], store: UploadStore, directory: Path, sql: SQL
) -> None:
    """A damaged blob is written anew from the disk copy whose hash matches; a second run finds nothing to do."""
    records, files = await sql("SELECT * FROM image_storage ORDER BY name"), tree(directory.parent)
    wrong = {name: "corrupt_in_database" for name in damaged_database if damage_of(name) in RECORD_WRONG}
    said = await told(bulk.migrate(store))
    assert said.problems == wrong
    assert said.counts == {
        "migrated": len(damaged_database) - len(wrong),
        "corrupt_in_database": len(wrong),
        "ok": 1,
    }
    assert await sql("SELECT * FROM image_storage ORDER BY name") == records
    assert tree(directory.parent) == files

    database = await rows(sql)
    again = await told(bulk.migrate(store))
    assert (again.problems, again.counts.get("migrated")) == (wrong, None)
    assert (tree(directory.parent), await rows(sql)) == (files, database)

    _remove(directory)
    restored = await told(bulk.restore(store))
    assert restored.problems == wrong
    for name in damaged_database.keys() - wrong.keys():
        assert (directory / name).read_bytes() == damaged_database[name], name


async def test_migrate_mends_from_no_bad_file(
    damaged_database: dict[str, bytes], store: UploadStore, directory: Path, sql: SQL
) -> None:
    """Where the disk copy is no good either, both stay as they are and the name is told; `--prefer disk` takes it."""
    hurt = {name: data for name, data in damaged_database.items() if damage_of(name) in BYTES_DAMAGED}
    for name in hurt:
        flip(directory / name)
    files = tree(directory.parent)
    said = await told(bulk.migrate(store))
    assert said.problems.keys() >= hurt.keys()
    assert {said.outcomes[name] for name in hurt} == {"corrupt_in_database"}
    database = await rows(sql)
    assert (await told(bulk.migrate(store))).problems == said.problems
    assert (tree(directory.parent), await rows(sql)) == (files, database)

    told_to = await told(bulk.migrate(store, prefer_disk=True))
    assert {told_to.outcomes[name] for name in hurt} == {"migrated"}
    assert (await told(bulk.verify(store))).problems.keys() & hurt.keys() == set()
    assert tree(directory.parent) == files


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_a_damaged_chunk_digest_is_seen_and_mended(
    store: UploadStore, directory: Path, sql: SQL, size: int
) -> None:
    """A digest that no longer fits its chunk is told; the file that comes back, if one does, is whole."""
    data = noise(size)
    await store.save("a.png", data)
    await sql("UPDATE image_chunk SET digest = :digest WHERE position = :last", digest=b"\0" * 32, last=size // CHUNK)
    assert (await told(bulk.verify(store))).problems == {"a.png": "corrupt_in_database"}
    kept = (directory / "a.png").rename(directory.parent / "kept.png")
    said = await told(bulk.restore(store))
    if said.counts == {"restored": 1}:
        assert (directory / "a.png").read_bytes() == data
    else:
        assert said.problems == {"a.png": "corrupt_in_database"}
        assert not (directory / "a.png").exists()
        kept.rename(directory / "a.png")
    assert (await told(bulk.migrate(store))).counts == {"migrated": 1}
    assert (await told(bulk.verify(store))).counts == {"ok": 1}


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_text_in_place_of_bytes(sqlite_store: UploadStore, directory: Path, sqlite_url: str, size: int) -> None:
    """SQLite keeps what somebody else writes, even text as bytes: told by name and skipped; the run goes on."""
    await sqlite_store.save("a.png", noise(size))
    await sqlite_store.save("b.png", noise(10))
    engine = create_async_engine(sqlite_url, poolclass=NullPool)
    async with engine.begin() as connection:
        cut = "UPDATE image_chunk SET data = :data WHERE sha256 = :sha256 AND position = 0"
        await connection.execute(text(cut), {"data": "x" * min(size, CHUNK), "sha256": _sha256(noise(size))})
    await engine.dispose()
    assert (await told(bulk.verify(sqlite_store))).problems == {"a.png": "corrupt_in_database"}
    for path in directory.glob("*"):
        path.unlink()
    said = await told(bulk.restore(sqlite_store))
    assert (said.problems, said.counts["restored"]) == ({"a.png": "corrupt_in_database"}, 1)
    lay(directory, "a.png", noise(size))
    assert (await told(bulk.migrate(sqlite_store))).counts == {"migrated": 1, "ok": 1}
    assert (await told(bulk.verify(sqlite_store))).counts == {"ok": 2}


FOREIGN = (
    "../x",
    "../../../etc/cron.d/x",
    "/etc/x",
    "a/../../x",
    "a//b",
    "a/",
    ".",
    "..",
    ".hidden/x.png",
    ".selfheal-tmp/x",
    "NUL",
    "new\nline.png",
    "esc\x1b[2J.png",
    "back\\slash.png",
    "%2e%2e/x",
    "dot.",
    "n" * 256,
)


async def test_records_outside_the_grammar_are_never_written(
    store: UploadStore, directory: Path, tmp_path: Path, sql: SQL
) -> None:
    """A record whose name is no name is told and skipped by every run; nothing is ever written for it."""
    data = noise(100)
    await store.save("good.png", data)
    copied = "INSERT INTO image_storage SELECT :name, sha256, size, content_type, modified_ns, created_at, changed_at,"
    for name in FOREIGN:
        await sql(f"{copied} generation, deleted_at FROM image_storage WHERE name = 'good.png'", name=name)
    database, before = await rows(sql), tree(tmp_path / "app")
    expected = dict.fromkeys(FOREIGN, "invalid_name")
    runs = [
        bulk.restore(store),
        bulk.restore(store, verify=True),
        bulk.restore(store, dry_run=True),
        bulk.verify(store),
        bulk.verify(store, drill=True),
    ]
    for run in runs:
        said = await told(run)
        assert (said.problems, said.counts) == (expected, {"invalid_name": len(FOREIGN), "ok": 1})
    assert (await told(bulk.migrate(store))).counts == {"ok": 1}
    assert tree(tmp_path / "app") == before
    assert await rows(sql) == database


async def test_an_invalid_name_on_both_sides_is_told_once(store: UploadStore, directory: Path, sql: SQL) -> None:
    """A name outside the grammar that is on disk and in the database is one wrong name, not two."""
    await store.save("good.png", noise(100))
    await sql("UPDATE image_storage SET name = 'CON'")
    (directory / "good.png").rename(directory / "CON")
    for run in (bulk.verify(store), bulk.restore(store)):
        assert (await told(run)).problems == {"CON": "invalid_name"}


# -- dry runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run",
    [
        lambda store, dry_run: bulk.migrate(store, dry_run=dry_run),
        lambda store, dry_run: bulk.migrate(store, prefer_disk=True, dry_run=dry_run),
        lambda store, dry_run: bulk.restore(store, dry_run=dry_run),
        lambda store, dry_run: bulk.restore(store, verify=True, dry_run=dry_run),
    ],
    ids=["migrate", "migrate prefer disk", "restore", "restore verify"],
)
async def test_a_dry_run_says_what_will_be_and_changes_nothing(
    damaged_disk: Disk, store: UploadStore, tmp_path: Path, sql: SQL, run: Any
) -> None:
    """Not a byte, time or row changes on either side; and the real run that follows does what was said."""
    for damage in ("data flipped", "blob row missing"):
        lay(store.disk.path, f"{damage}/1.png", noise(5000, damage))
        await store.adopt(f"{damage}/1.png")
        await hurt(sql, f"{damage}/1.png", noise(5000, damage))
    before, database = tree(tmp_path), await rows(sql)
    said = await told(run(store, True))
    assert tree(tmp_path) == before  # the SQLite file is in there
    assert await rows(sql) == database
    real = await told(run(store, False))
    done = {name for name, outcome in said.outcomes.items() if outcome in ("restored", "migrated", "deleted")}
    assert {name: real.outcomes[name] for name in done} == {name: said.outcomes[name] for name in done}
    assert {name for name, outcome in real.outcomes.items() if outcome == "ok"} == {
        name for name, outcome in said.outcomes.items() if outcome == "ok"
    }


async def test_a_dry_migration_needs_no_tables(directory: Path, database_url: str, sql: SQL) -> None:
    """Before the first real run a dry one says what it would bring in, and makes no table; other runs refuse."""
    lay(directory, "a.png", noise(100))
    lay(directory, "b/huge.bin", noise(5 * MIB))
    async with UploadStore(directory, database_url) as store:
        said = await told(bulk.migrate(store, dry_run=True))
        assert (said.counts, said.problems) == ({"migrated": 2}, {})
        for run in (bulk.restore(store), bulk.verify(store)):
            with pytest.raises(SchemaError, match="selfheal migrate"):
                await told(run)
        with pytest.raises(Exception, match="image_storage"):
            await sql("SELECT 1 FROM image_storage")
        assert (await told(bulk.migrate(store))).counts == {"migrated": 2}


async def test_a_drill_leaves_nothing(
    damaged_disk: Disk, store: UploadStore, tmp_path: Path, sql: SQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drill restores into a directory of its own and throws it away; both sides stay as they are."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before, database = tree(tmp_path / "app"), await rows(sql)
    said = await told(bulk.verify(store, drill=True))
    assert said.counts["ok"] == len(HEALTHY) + 1
    assert (list(scratch.iterdir()), tree(tmp_path / "app")) == ([], before)
    assert await rows(sql) == database


async def test_a_drill_tells_what_cannot_be_restored(
    store: UploadStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the restored bytes would not be the recorded ones the drill says so, though both sides look fine."""
    await store.save("a.png", noise(100))
    await store.save("b.bin", noise(LARGE))
    publish = landing.Landing._publish

    def spoil(self: landing.Landing, record: Record, staged: Any) -> landing.Landed:
        landed = publish(self, record, staged)
        flip(self._disk.path_of(record.name))
        return landed

    monkeypatch.setattr(landing.Landing, "_publish", spoil)
    assert (await told(bulk.verify(store))).counts == {"ok": 2}
    assert (await told(bulk.verify(store, drill=True))).counts == {"corrupt_in_database": 2}


# -- a disk that takes no file, a database that goes away ------------------------------------------------------------


async def test_a_lost_mount_is_not_written_to(directory: Path, database_url: str) -> None:
    """Without its marker the mount may be lost: every name is told as failed, and nothing is written beneath it."""
    async with UploadStore(directory, database_url, require_marker=True) as store:
        await store.database.create_tables()
        for name in ("a.png", "b/b.png"):
            await store.database.store_image(name, noise(100, name))
        await store.database.store_image("large.bin", noise(LARGE))
        directory.mkdir(parents=True)
        said = await told(bulk.restore(store))
        assert said.problems == dict.fromkeys(["a.png", "b/b.png", "large.bin"], "failed")
        assert list(directory.iterdir()) == []
        store.disk.mark()
    async with UploadStore(directory, database_url, require_marker=True) as store:
        assert (await told(bulk.restore(store))).counts == {"restored": 3}


async def test_a_database_that_goes_away_ends_the_run(
    store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown is not absent: when the database stops answering the run raises, and reports no name as missing."""
    for index in range(4):
        await store.save(f"{index}.bin", noise(LARGE, index))
    await store.save("small.png", noise(10))
    _remove(directory)

    async def fail(*_: object, **__: object) -> Any:
        raise DatabaseUnavailable("gone")

    async def fail_reading(*_: object, **__: object) -> AsyncIterator[bytes]:
        raise DatabaseUnavailable("gone")
        yield b""

    for reading in ("read_handfuls", "read_whole"):
        monkeypatch.setattr(store.database, reading, fail_reading)
    for run in (bulk.restore(store), bulk.verify(store), bulk.verify(store, drill=True)):
        with pytest.raises(DatabaseUnavailable):
            await told(run)
    monkeypatch.setattr(store.database, "fetch", fail)
    for run in (bulk.restore(store), bulk.verify(store)):
        with pytest.raises(DatabaseUnavailable):
            await told(run)
    assert list(directory.rglob("*.bin")) == []
    assert litter(directory) == []


# -- others at work meanwhile ----------------------------------------------------------------------------------------


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one file, so that something can happen between two of them."""
    monkeypatch.setattr(landing, "FILES_AT_ONCE", 1)


def after_listing(store: UploadStore, monkeypatch: pytest.MonkeyPatch, change: Callable[[], Awaitable[object]]) -> None:
    """Let something change once the names of the living were read, and before anything is done about them."""
    names_in = store.database.names_in

    async def and_change(key_range: Any, **which: Any) -> Any:
        names = await names_in(key_range, **which)
        await change()
        return names

    monkeypatch.setattr(store.database, "names_in", and_change)


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_what_is_deleted_meanwhile_does_not_come_back(
    sqlite_store: UploadStore, directory: Path, one_by_one: None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is deleted while restore is under way is no damage, and its file does not stay."""
    for name in ("1.png", "2.png", "3.png"):
        await sqlite_store.database.store_image(name, noise(size, name))
    after_listing(sqlite_store, monkeypatch, lambda: sqlite_store.database.bury("2.png"))
    results = [result async for result in bulk.restore(sqlite_store)]
    assert [(one.name, one.outcome.value, one.is_problem) for one in results] == [
        ("1.png", "restored", False),
        ("2.png", "deleted", False),
        ("3.png", "restored", False),
    ]
    assert sorted(path.name for path in directory.iterdir()) == ["1.png", "3.png"]


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_what_is_overwritten_meanwhile_comes_back_new(
    sqlite_store: UploadStore, directory: Path, one_by_one: None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that another node overwrites while restore is under way is restored as it is now."""
    for name in ("1.png", "2.png"):
        await sqlite_store.database.store_image(name, noise(size, name))
    save = partial(sqlite_store.database.store_image, "2.png", noise(size, "new"), modified_ns=MTIME)
    after_listing(sqlite_store, monkeypatch, save)
    results = [result async for result in bulk.restore(sqlite_store)]
    assert {(one.name, one.outcome.value, one.is_problem) for one in results} == {
        ("1.png", "restored", False),
        ("2.png", "restored", False),
    }
    assert (directory / "2.png").read_bytes() == noise(size, "new")
    assert (directory / "2.png").stat().st_mtime_ns == MTIME


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("change", ["save", "delete", "overwrite elsewhere"])
async def test_a_change_after_the_file_has_its_name(
    sqlite_store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch, change: str, size: int
) -> None:
    """A change that falls between the file's publication and the last look at its record wins, whoever made it."""
    await sqlite_store.database.store_image("a.png", noise(size, "old"))
    generations, changes = sqlite_store.database.generations, [change]

    async def change_first(wanted: Any) -> dict[str, int]:
        if changes:
            changes.clear()
            if change == "save":
                await sqlite_store.save("a.png", noise(size, "new"))
            elif change == "delete":
                await sqlite_store.delete("a.png")
            else:
                await sqlite_store.database.store_image("a.png", noise(size, "new"))
        return await generations(wanted)

    monkeypatch.setattr(sqlite_store.database, "generations", change_first)
    assert (await told(bulk.restore(sqlite_store))).problems == {}
    assert changes == []
    if change == "delete":
        assert not (directory / "a.png").exists()
    else:
        assert (directory / "a.png").read_bytes() == noise(size, "new")
    assert quarantined(sqlite_store) == []


@pytest.mark.parametrize("change", ["overwrite", "delete"])
@pytest.mark.parametrize(
    "run",
    [
        bulk.verify,
        partial(bulk.verify, drill=True),
        bulk.migrate,
        bulk.restore,
        partial(bulk.restore, verify=True),
    ],
    ids=["verify", "drill", "migrate", "restore", "restore verify"],
)
async def test_a_change_under_way_is_no_damage(
    sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch, change: str, run: Any
) -> None:
    """What an app overwrites or deletes while a run looks at it is looked at again, and told as no problem."""
    store, changed = sqlite_store, set[str]()

    async def change_once(name: str) -> None:
        if name not in changed:
            changed.add(name)
            await (store.save(name, noise(LARGE, f"new {name}")) if change == "overwrite" else store.delete(name))

    async def old_records(wanted: Any) -> Any:
        found = await fetch(wanted)
        for name in found:
            await change_once(name)
        return found

    async def old_names(key_range: Any, **which: Any) -> list[tuple[str, int]]:
        found = await names_in(key_range, **which)
        for name, _ in found:
            if not which.get("deleted") and run not in (bulk.verify, bulk.migrate):
                await change_once(name)
        return found

    async def old_summary(key_range: Any) -> Any:
        found = await summary_of(key_range)
        for name in found.lines.split("\n"):
            await change_once(name)
        return found

    for name in ("small.png", "large.bin"):
        await store.save(name, noise(LARGE if name == "large.bin" else SMALL, name))
    fetch, names_in, summary_of = store.database.fetch, store.database.names_in, store.database.summary
    monkeypatch.setattr(store.database, "fetch", old_records)
    monkeypatch.setattr(store.database, "names_in", old_names)
    monkeypatch.setattr(store.database, "summary", old_summary)
    said = await told(run(store))
    assert said.problems == {}
    assert changed == {"small.png", "large.bin"}
    for name in changed:
        there = store.disk.path_of(name)
        assert not there.exists() if change == "delete" else there.read_bytes() == noise(LARGE, f"new {name}")
    assert quarantined(store) == []


async def test_an_empty_file_that_is_deleted_while_all_is_verified(
    sqlite_store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no bytes that could be gone, and still is told as deleted, once, if its file stays."""
    await sqlite_store.save("empty.gif", b"")
    after_listing(sqlite_store, monkeypatch, lambda: sqlite_store.database.bury("empty.gif"))
    said = await told(bulk.verify(sqlite_store))
    assert said.problems == {"empty.gif": "deleted"}
    assert said.counts == {"deleted": 1}


async def test_a_chunk_that_is_too_large(sqlite_store: UploadStore) -> None:
    """What could not be brought back is not well, although every digest is right."""
    data = noise(CHUNK + 1, "large")
    await sqlite_store.save("large.bin", data)
    with closing(sqlite3.connect(str(sqlite_store.database.url.database))) as connection:
        connection.execute("DELETE FROM image_chunk WHERE position = 1")
        connection.execute("UPDATE image_chunk SET data = ?, digest = ?", (data, chunk_digest(0, data)))
        connection.commit()
    assert (await told(bulk.verify(sqlite_store))).problems == {"large.bin": "corrupt_in_database"}


# -- pages of names ---------------------------------------------------------------------------------------------------


async def test_a_name_that_looks_like_two(store: UploadStore, sql: SQL, directory: Path) -> None:
    """A record's name with a line end in it is told, although both halves of it are names of files on the disk."""
    for name in ("a.png", "b.png"):
        await store.save(name, noise(50, name))
    await sql("UPDATE image_storage SET name = :name WHERE name = 'a.png'", name="a.png\nb.png")
    said = await told(bulk.restore(store))
    assert said.problems == {"a.png\nb.png": "invalid_name"}
    assert said.counts == {"ok": 1, "invalid_name": 1}


@pytest.mark.parametrize("wrong", ["-1", "1.5", "'many'"])
async def test_a_record_of_no_sound_size_on_a_page_that_is_all_there(sqlite_store: UploadStore, wrong: str) -> None:
    """It is told, although every file is on the disk."""
    for name in ("a.png", "b.png", "c.png"):
        await sqlite_store.save(name, noise(50, name))
    with closing(sqlite3.connect(str(sqlite_store.database.url.database))) as connection:
        connection.execute(f"UPDATE image_storage SET size = {wrong} WHERE name = 'b.png'")
        connection.commit()
    said = await told(bulk.restore(sqlite_store))
    assert said.problems == {"b.png": "corrupt_in_database"}
    assert said.counts == {"ok": 2, "corrupt_in_database": 1}


async def test_what_is_saved_between_two_looks_at_a_page(
    sqlite_store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is saved between the names of a page, after they were read as one, pushes none of them out."""
    monkeypatch.setattr(bulk_restore, "NAMES_AT_ONCE", 2)
    for name in ("a.png", "c.png", "d.png"):
        await sqlite_store.save(name, noise(50, name))
        (directory / name).unlink()
    names_in = sqlite_store.database.names_in

    async def save_before(key_range: Any, **which: Any) -> Any:
        await sqlite_store.database.store_image("b.png", noise(50, "b.png"))
        return await names_in(key_range, **which)

    monkeypatch.setattr(sqlite_store.database, "names_in", save_before)
    assert (await told(bulk.restore(sqlite_store))).counts == {"restored": 4}
    assert sorted(path.name for path in directory.iterdir()) == ["a.png", "b.png", "c.png", "d.png"]


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(("names_at_once", "ranges_at_once"), [(1, 1), (2, 3), (4, 1), (100, 16)])
async def test_pages_of_any_length(
    store: UploadStore,
    directory: Path,
    names_at_once: int,
    ranges_at_once: int,
    *,
    verify: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However names are parted, each is looked at once: none is left out, none restored that is there, or deleted."""
    monkeypatch.setattr(bulk_restore, "NAMES_AT_ONCE", names_at_once)
    monkeypatch.setattr(bulk_restore, "RANGES_AT_ONCE", ranges_at_once)
    names = [f"{folder}{number}.png" for folder in ("", "a/", "a/b/", "日本/") for number in range(4)]
    for name in names:
        await store.save(name, noise(50, name))
    deleted, missing = {names[2], names[5], names[10]}, {names[0], names[7], names[15]}
    for name in deleted:
        await store.delete(name)
    for name in missing:
        (directory / name).unlink()
    lingering = deleted - {names[10]}
    for name in lingering:
        lay(directory, name, noise(50, name))
    said = await told(bulk.restore(store, verify=verify))
    assert said.counts == {"ok": len(names) - 6, "restored": 3, "deleted": 2}
    assert {one.name for one in said.results if one.outcome == "restored"} == missing
    assert {one.name for one in said.results if one.outcome == "deleted"} == lingering
    there = {path.relative_to(directory).as_posix() for path in directory.rglob("*.png")}
    assert there == set(names) - deleted
    assert (await told(bulk.restore(store, verify=verify))).counts == {"ok": len(names) - 3}


@pytest.mark.parametrize("size", [1, 3, 5, 100])
async def test_key_ranges(store: UploadStore, size: int) -> None:
    """They hold every name once, in their order, none more records than asked for, and a summary says the same."""
    names = sorted(f"{folder}{number}.png" for folder in ("", "a/", "a/b/", "z") for number in range(3))
    for name in names:
        await store.database.store_image(name, noise(len(name), name))
    for name in names[:4]:
        await store.database.bury(name)
    living, dead = [], []
    async for key_range in store.database.key_ranges(size):
        found = await store.database.names_in(key_range)
        buried = await store.database.names_in(key_range, deleted=True)
        said = await store.database.summary(key_range)
        assert len(found) + len(buried) <= size
        assert sorted(said.lines.split("\n")) == [name for name, _ in found] or not found
        assert (said.count, said.size, said.unsound) == (len(found), sum(size for _, size in found), 0)
        assert said.deleted == len(buried)
        living += found
        dead += buried
    assert living == [(name, len(name)) for name in names[4:]]
    assert dead == [(name, len(name)) for name in names[:4]]


@pytest.mark.parametrize(("listed_at_most", "folders_at_most"), [(2, 32), (100_000, 2), (100_000, 32)])
async def test_whether_all_are_there(
    sqlite_store: UploadStore,
    directory: Path,
    tmp_path: Path,
    listed_at_most: int,
    folders_at_most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The quick look at many names says what a look at each says, whatever folders they are in, and follows no link."""
    monkeypatch.setattr(listing, "LISTED_AT_MOST", listed_at_most)
    monkeypatch.setattr(listing, "FOLDERS_AT_MOST", folders_at_most)
    random = Random(7)
    folders = ("", "a/", "a/b/", "a/b/c/", "a!/", "a0/", "b/")
    everything = [f"{folder}{last}" for folder in folders for last in ("0", "1.png", "x", "z.gif")]
    there = random.sample(everything, len(everything) * 3 // 4)
    for name in there:
        lay(directory, name, b"")
    for name in ("0", "1.png"):
        lay(tmp_path / "elsewhere", name, b"")
        everything.append(f"a/link/{name}")
        everything.append(f"link/{name}")
    for link in ("a/link", "link"):
        (directory / link).symlink_to(tmp_path / "elsewhere")
    for _ in range(3000):
        wanted = random.sample(there, random.randint(1, 6)) + random.sample(everything, random.randint(0, 1))
        assert Listing(sqlite_store.disk).has_all(wanted) == set(wanted).issubset(there), wanted


async def test_folders_between_the_files_of_another(
    sqlite_store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many folders stand between the files of a folder, in the order of names, each of them is read once."""
    below = [f"{number}/tom.png" for number in range(40)]
    names = [f"a/{number}{rest}" for number in range(5) for rest in (".png", *(f"/{one}" for one in below))]
    for name in names:
        lay(directory, name, b"")
    read, scandir = Counter[int](), os.scandir

    def counting(fd: int) -> Any:
        read[os.fstat(fd).st_ino] += 1
        return scandir(fd)

    monkeypatch.setattr(os, "scandir", counting)
    looking = Listing(sqlite_store.disk)
    assert all(map(looking.has, sorted(names)))
    assert len(read) == 201
    assert set(read.values()) == {1}


@pytest.mark.parametrize("verify", [False, True])
async def test_a_folder_that_cannot_be_read(
    store: UploadStore, *, verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its names, deleted ones too, nobody can tell whether they are there; of all others somebody can."""
    for name in ("a.png", "cats/a.png", "cats/b.png", "cats/deleted.png", "dogs/a.png", "dogs/deleted.png"):
        await store.save(name, noise(50, name))
        if "deleted" in name:
            await store.delete(name)
    open_directory = syscalls.open_directory

    def refuse(root: int, name: str) -> int:
        if name == "cats":
            raise OSError(errno.EIO, "Input/output error")
        return open_directory(root, name)

    monkeypatch.setattr(syscalls, "open_directory", refuse)
    said = await told(bulk.restore(store, verify=verify))
    assert said.problems == dict.fromkeys(("cats/a.png", "cats/b.png", "cats/deleted.png"), "failed")
    assert said.counts == {"ok": 2, "failed": 3}


@pytest.mark.parametrize("verify", [False, True])
async def test_an_unsound_record_that_is_deleted(
    store: UploadStore, sql: SQL, directory: Path, *, verify: bool
) -> None:
    """A tombstone of no valid name has no file; one of no sound size may have one that lingers, which goes."""
    for name in ("a.png", "b.png", "c.png"):
        await store.save(name, noise(50, name))
    await store.delete("a.png")
    await store.delete("b.png")
    await sql("UPDATE image_storage SET name = '../a.png' WHERE name = 'a.png'")
    await sql("UPDATE image_storage SET size = -1 WHERE name = 'b.png'")
    lay(directory, "b.png", noise(50, "b.png"))
    said = await told(bulk.restore(store, verify=verify))
    assert said.problems == {}
    assert said.counts == {"ok": 1, "deleted": 1}
    assert [path.name for path in directory.iterdir()] == ["c.png"]
    assert (await told(bulk.restore(store, verify=verify))).counts == {"ok": 1}


async def test_a_folder_that_changes_while_others_are_restored(
    sqlite_store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read of a folder at first does not decide about names that are looked at later."""
    monkeypatch.setattr(bulk_restore, "NAMES_AT_ONCE", 2)
    monkeypatch.setattr(bulk_restore, "RANGES_AT_ONCE", 1)
    names = [f"cats/{number:02}.png" for number in range(20)]
    for name in names:
        await sqlite_store.save(name, noise(50, name))
    (directory / names[0]).unlink()
    names_in = sqlite_store.database.names_in

    async def change_then(key_range: Any, **which: Any) -> Any:
        found = await names_in(key_range, **which)
        if names[0] in [name for name, _ in found]:
            await sqlite_store.delete(names[18])
            (directory / names[17]).unlink()
        return found

    monkeypatch.setattr(sqlite_store.database, "names_in", change_then)
    said = await told(bulk.restore(sqlite_store))
    assert said.counts == {"ok": 17, "restored": 2}
    assert sorted(f"cats/{path.name}" for path in directory.rglob("*.png")) == [n for n in names if n != names[18]]


@pytest.mark.parametrize("kind", ["folder", "link", "socket"])
async def test_a_page_that_is_all_there_but_for_one_that_is_no_file(
    store: UploadStore, directory: Path, kind: str, tmp_path: Path
) -> None:
    """What stands at a name and is no regular file is not taken for it."""
    for name in ("cats/a.png", "cats/b.png"):
        await store.save(name, noise(50, name))
    place = directory / "cats/b.png"
    place.unlink()
    if kind == "folder":
        place.mkdir()
    elif kind == "link":
        place.symlink_to(directory / "cats/a.png")
    else:
        make_socket(place)
    assert (await told(bulk.restore(store))).problems == {"cats/b.png": "failed"}


async def test_a_page_of_names_that_are_rare(store: UploadStore) -> None:
    """Names that need a closer look, in folders and out of them, are found like others."""
    names = ["a.b", "Öl/é 1.png", "x/y/z/w/v.png", "con_.png", "x.png", "x/y.png", "y@2x.png"]
    for name in names:
        await store.save(name, noise(50, name))
    assert (await told(bulk.restore(store))).counts == {"ok": len(names)}
    (store.disk.path / names[1]).unlink()
    assert (await told(bulk.restore(store))).counts == {"ok": len(names) - 1, "restored": 1}
