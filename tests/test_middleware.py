"""`SelfHealMiddleware`: a name is present (200), absent (the wrapped app's answer) or unknown (503)."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import time
from pathlib import Path

import pytest
from starlette.types import Message

from selfheal import CorruptBlob, UploadStore
from selfheal.content.digests import chunk_digest
from selfheal.content.sources import CHUNK
from tests.support.asgi import Answer, Wrapped, ask, no_message, scope_of
from tests.support.files import write_file
from tests.support.middleware import (
    FILM,
    LARGE,
    PICTURE,
    PREFIX,
    Wrapping,
    assert_unknown,
    put,
    static_over,
)
from tests.support.open_files import open_below
from tests.support.raw_sql import sql
from tests.support.waiting import eventually

# -- present and absent -----------------------------------------------------------------------------------------------


async def test_present_absent_deleted(store: UploadStore, serve: bool, wrapping: Wrapping) -> None:
    """A present file is a 200, from disk or database; an absent or deleted name gets the wrapped app's answer."""
    app = wrapping(store, serve, static_over(store.disk.path))
    path = await put(store, "on/disk.png")
    assert (await ask(app, f"{PREFIX}/on/disk.png")).body == PICTURE
    path.unlink()
    assert (await ask(app, f"{PREFIX}/on/disk.png")).body == PICTURE
    assert path.read_bytes() == PICTURE
    await put(store, "only/in/the database.png", on_disk=False)
    assert (await ask(app, f"{PREFIX}/only/in/the%20database.png")).body == PICTURE
    await put(store, "deleted.png")
    await store.delete("deleted.png")
    for name in ("absent.png", "deleted.png"):
        answer = await ask(wrapping(store, serve, Wrapped(418)), f"{PREFIX}/{name}")
        assert (answer.status, answer.body, answer.headers["cache-control"]) == (418, b"wrapped", "no-store")


async def test_large_file_is_restored(store: UploadStore, serve: bool, wrapping: Wrapping) -> None:
    """A file of many chunks is sent whole, and is on disk, after its first request."""
    app = wrapping(store, serve, static_over(store.disk.path))
    path = await put(store, "film.mp4", FILM, on_disk=False)
    assert (await ask(app, f"{PREFIX}/film.mp4")).body == FILM
    assert path.read_bytes() == FILM


async def test_just_uploaded_elsewhere(store: UploadStore, serve: bool, wrapping: Wrapping) -> None:
    """A name that was absent a moment ago, and that another node has saved since, is served within 2 s."""
    app = wrapping(store, serve, static_over(store.disk.path))
    assert (await ask(app, f"{PREFIX}/new.png")).status == 404
    await store.database.store_image("new.png", PICTURE)

    async def is_served() -> bool:
        return (await ask(app, f"{PREFIX}/new.png")).body == PICTURE

    started = time.monotonic()
    await eventually(is_served)
    assert time.monotonic() - started < 6


async def test_many_clients_one_missing_name(store: UploadStore, serve: bool, wrapping: Wrapping) -> None:
    """100 clients of one missing file all get the whole file."""
    await put(store, "a.png", LARGE[:300_000], on_disk=False)
    app = wrapping(store, serve, static_over(store.disk.path))
    answers = await asyncio.gather(*(ask(app, f"{PREFIX}/a.png") for _ in range(100)))
    assert all(answer.status == 200 and answer.body == LARGE[:300_000] for answer in answers)


async def test_disk_takes_no_file(directory: Path, sqlite_url: str, wrapping: Wrapping) -> None:
    """On a disk that takes no file, `serve` answers from the database; without `serve` it is a 503, never a 404."""
    async with UploadStore(directory, sqlite_url, require_marker=True) as store:
        await store.database.create_tables()
        for name, data in (("a.png", PICTURE), ("b.png", LARGE), ("c.mp4", FILM)):
            await put(store, name, data, on_disk=False)
            assert (await ask(wrapping(store, True), f"{PREFIX}/{name}")).body == data
            assert_unknown(await ask(wrapping(store, False), f"{PREFIX}/{name}"))
        assert (await ask(wrapping(store, True), f"{PREFIX}/absent.png")).status == 404
    assert not directory.exists()


# -- unknown ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_unknown(broken_store: UploadStore, serve: bool, method: str, wrapping: Wrapping) -> None:
    """With the database down a hit is a 200 and a miss a 503, never a 404; the wrapped app gets no request."""
    write_file(broken_store.disk.path / "hit.png", PICTURE)
    inner = Wrapped()
    hit = await ask(
        wrapping(broken_store, serve, static_over(broken_store.disk.path)), f"{PREFIX}/hit.png", method=method
    )
    assert (hit.status, hit.headers["content-length"]) == (200, "5000")
    for _ in range(2):
        assert_unknown(await ask(wrapping(broken_store, serve, inner), f"{PREFIX}/miss.png", method=method))
    assert inner.scopes == []


async def test_unknown_is_not_remembered_as_absent(
    directory: Path, sqlite_url: str, serve: bool, wrapping: Wrapping
) -> None:
    """As soon as the database answers again, a missing file is served."""
    async with UploadStore(directory, sqlite_url) as store:
        app = wrapping(store, serve, static_over(directory))
        assert_unknown(await ask(app, f"{PREFIX}/a.png"))
        await store.database.create_tables()
        await put(store, "a.png", on_disk=False)
        assert (await ask(app, f"{PREFIX}/a.png")).body == PICTURE


async def test_missing_tables(
    directory: Path, database_url: str, serve: bool, caplog: pytest.LogCaptureFixture, wrapping: Wrapping
) -> None:
    """A database without its tables is a 503, and one critical log line says which command to run."""
    async with UploadStore(directory, database_url) as store:
        for index in range(3):
            assert_unknown(await ask(wrapping(store, serve), f"{PREFIX}/{index}.png"))
    critical = [record.getMessage() for record in caplog.records if record.levelname == "CRITICAL"]
    assert len(critical) == 1
    assert "selfheal migrate" in critical[0]


async def test_locked_database(directory: Path, sqlite_url: str, serve: bool, wrapping: Wrapping) -> None:
    """A locked SQLite database is a 503 by the deadline; hits are served."""
    async with UploadStore(directory, sqlite_url, deadline=1.0) as store:
        await store.database.create_tables()
        await put(store, "hit.png")
        app = wrapping(store, serve, static_over(directory))
        with sqlite3.connect(sqlite_url.partition("///")[2]) as other:
            other.execute("PRAGMA locking_mode=EXCLUSIVE")
            other.execute("BEGIN EXCLUSIVE")
            started = time.monotonic()
            assert_unknown(await ask(app, f"{PREFIX}/miss.png"))
            assert time.monotonic() - started < 8
            assert (await ask(app, f"{PREFIX}/hit.png")).body == PICTURE
        other.close()


async def test_silent_database(directory: Path, serve: bool, wrapping: Wrapping) -> None:
    """A database that accepts connections and never answers is a 503 by the deadline; hits are served."""
    with socket.socket() as black_hole:
        black_hole.bind(("127.0.0.1", 0))
        black_hole.listen(64)
        url = f"postgresql+asyncpg://nobody@127.0.0.1:{black_hole.getsockname()[1]}/none"
        async with UploadStore(directory, url, deadline=1.0) as store:
            write_file(directory / "hit.png", PICTURE)
            app, started = wrapping(store, serve, static_over(directory)), time.monotonic()
            misses = [ask(app, f"{PREFIX}/{index}.png") for index in range(20)]
            hits = [ask(app, f"{PREFIX}/hit.png") for _ in range(20)]
            answers = await asyncio.gather(*hits, *misses)
            assert time.monotonic() - started < 8
        assert [answer.status for answer in answers[:20]] == [200] * 20
        for answer in answers[20:]:
            assert_unknown(answer)


# -- damaged ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [PICTURE, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("damage", ["data", "missing"])
async def test_damaged_in_the_database(
    sqlite_store: UploadStore, sqlite_url: str, serve: bool, data: bytes, damage: str, wrapping: Wrapping
) -> None:
    """Damaged bytes are a 500 with no-store, no file and no answer of the wrapped app; the record stays."""
    path = await put(sqlite_store, "a.png", data, on_disk=False)
    if damage == "data":
        await sql(sqlite_url, "UPDATE image_chunk SET data = zeroblob(length(data)) WHERE position = 0")
    else:
        await sql(sqlite_url, "DELETE FROM image_chunk WHERE position = 0")
    for method in ("GET", "HEAD"):
        answer = await ask(wrapping(sqlite_store, serve), f"{PREFIX}/a.png", method=method)
        assert (answer.status, answer.headers["cache-control"]) == (500, "no-store")
        assert "x-wrapped" not in answer.headers
    assert not path.exists()
    assert await sqlite_store.database.find("a.png")


@pytest.mark.parametrize("source", ["only in the database", "past a disk that takes no file"])
@pytest.mark.parametrize("forged", [False, True])
async def test_damaged_large_file_is_never_sent_whole(
    directory: Path, sqlite_url: str, source: str, forged: bool, wrapping: Wrapping
) -> None:
    """Damage at the end of a file that is sent while it is restored breaks the answer off: no copy looks complete.

    So does damage that only the digest of the whole file shows: a last chunk with a correct digest of its own.
    """
    async with UploadStore(directory, sqlite_url, require_marker=source.startswith("past")) as store:
        await store.database.create_tables()
        path = await put(store, "film.mp4", FILM, on_disk=False)
        position = len(FILM) // CHUNK - 1
        data = bytes(CHUNK)
        digest = chunk_digest(position, data) if forged else bytes(32)
        statement = "UPDATE image_chunk SET data = :data, digest = :digest WHERE position = :position"
        await sql(sqlite_url, statement, data=data, digest=digest, position=position)
        answer = Answer()

        async def send(message: Message) -> None:
            answer.take(message)

        try:
            await wrapping(store, True)(scope_of(f"{PREFIX}/film.mp4"), no_message, send)
        except CorruptBlob:
            assert not answer.is_over
        else:
            assert answer.status == 500  # found out before the answer began
        assert len(answer.body) < len(FILM)
        await store.tasks.drain(10)
        assert not path.exists()
        assert open_below(directory) == []
