"""URLs of uploads: each leads to its name, and one with the right digest is kept by caches for ever."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from urllib.parse import unquote

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from selfheal import InvalidName, SelfHealMiddleware, SettingsError, UploadStore
from tests.support.asgi import Wrapped, ask
from tests.support.middleware import FILM, LARGE, PICTURE, PREFIX, put, wrapping
from tests.support.recorded_statements import recorded_statements
from tests.support.store_requests import hit_and_settle
from tests.support.uploads import NAME, NEW, OLD

IMMUTABLE = "public, max-age=31536000, immutable"
DIGEST = hashlib.sha256(PICTURE).hexdigest()
OTHER_DIGEST = hashlib.sha256(b"other bytes").hexdigest()
NAMES = ["a.png", "cats/über 100%.png", "a#b?c=d&e.png", "q'\"<x>.png", "a+b;c,d.png", "@2x[1]~.png", "日本/語.png"]


# -- the address ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
async def test_a_url_leads_to_its_name(sqlite_store: UploadStore, name: str) -> None:
    """The URL of any name, with and without a version, is answered with its bytes, and needs no escaping in HTML."""
    saved = await sqlite_store.save(name, PICTURE)
    urls = {saved.url, sqlite_store.url(name), await sqlite_store.url(name, versioned=True)}
    assert urls == {saved.url, f"{saved.url}?v={DIGEST}"}
    for url in urls:
        assert url.isascii()
        assert not set(url) & set("<>\"' ")
        assert (await ask(wrapping(sqlite_store, True), url)).body == PICTURE
    assert unquote(saved.url) == f"{PREFIX}/{name}"


async def test_many_urls_at_once(store: UploadStore) -> None:
    """A gallery gets the URLs of all its names in one query; a name without a living record has no version."""
    for number in range(50):
        await store.save(f"{number}.png", b"%d" % number)
    await store.delete("0.png")
    wanted = [f"{number}.png" for number in range(60)]
    with recorded_statements() as seen:
        urls = await store.urls(iter(wanted))
    assert len([statement for statement in seen if "image_storage" in statement]) <= 1
    assert list(urls) == wanted
    assert urls["7.png"] == f"{PREFIX}/7.png?v={hashlib.sha256(b'7').hexdigest()}"
    assert urls["0.png"] == f"{PREFIX}/0.png"
    assert urls["55.png"] == f"{PREFIX}/55.png"


async def test_urls_without_a_database(broken_store: UploadStore) -> None:
    """While the database is away a page has its pictures, which no cache keeps for ever."""
    assert await broken_store.urls([NAME]) == {NAME: f"{PREFIX}/{NAME}"}
    assert await broken_store.url(NAME, versioned=True) == broken_store.url(NAME)


async def test_urls_of_what_is_no_name(sqlite_store: UploadStore) -> None:
    """A URL is made of a valid name only."""
    with pytest.raises(InvalidName):
        sqlite_store.url("../a.png")
    with pytest.raises(InvalidName):
        sqlite_store.url("../a.png", versioned=True)
    with pytest.raises(InvalidName):
        await sqlite_store.urls(["a.png", "../a.png"])


# -- the prefix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_store", "of_middleware", "served", "in_urls"),
    [
        (None, None, PREFIX, PREFIX),
        ("/media", None, "/media", "/media"),
        (None, "/media/", "/media", "/media"),
        ("/media", "/other", "/other", "/media"),
    ],
)
async def test_which_prefix_wins(
    directory: Path, sqlite_url: str, of_store: str | None, of_middleware: str | None, served: str, in_urls: str
) -> None:
    """A prefix that only the store or only the middleware has is that of both; else each has its own."""
    async with UploadStore(directory, sqlite_url, **{"prefix": of_store} if of_store else {}) as store:
        await store.database.create_tables()
        app = SelfHealMiddleware(Wrapped(), store, **{"prefix": of_middleware} if of_middleware else {})
        saved = await store.save(NAME, PICTURE)
        assert saved.url == store.url(NAME) == f"{in_urls}/{NAME}"
        assert (await ask(app, f"{served}/{NAME}")).body == PICTURE


async def test_a_mounted_middleware(directory: Path, sqlite_url: str) -> None:
    """With the prefix after a mount, the store says what visitors see."""
    async with UploadStore(directory, sqlite_url, prefix="/files/uploads") as store:
        await store.database.create_tables()
        saved = await store.save(NAME, PICTURE)
        app = Starlette(routes=[Mount("/files", SelfHealMiddleware(Wrapped(), store, prefix="/uploads"))])
        assert (await ask(app, saved.url)).body == PICTURE


def test_a_prefix_that_cannot_be_one(directory: Path, sqlite_url: str) -> None:
    """A bad prefix of a store is refused at once."""
    with pytest.raises(SettingsError, match="prefix"):
        UploadStore(directory, sqlite_url, prefix="uploads")


# -- answers that caches keep for ever --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "is_kept"),
    [
        (f"v={DIGEST}", True),
        (f"w=200&v={DIGEST}&h=1", True),
        (f"v={OTHER_DIGEST}", False),
        (f"v={DIGEST[:-1]}", False),
        (f"v={DIGEST}0", False),
        (f"v={DIGEST.upper()}", False),
        (f"v={OTHER_DIGEST}&v={DIGEST}", False),
        (f"v={DIGEST}&v={DIGEST}", False),
        (f"version={DIGEST}", False),
        (f"x=v={DIGEST}", False),
        ("v=", False),
        ("v", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("where", ["hit cache", "disk", "database"])
async def test_which_answers_are_immutable(sqlite_store: UploadStore, query: str, is_kept: bool, where: str) -> None:
    """Only the answer to `v` with the digest of its bytes is immutable, from the hit cache, disk or database."""
    path = await put(sqlite_store, NAME)
    app = wrapping(sqlite_store, True)
    target = f"{PREFIX}/{NAME}?{query}"
    if where == "database":
        path.unlink()
    else:
        await hit_and_settle(sqlite_store, NAME)
    if where == "hit cache":
        await ask(app, f"{PREFIX}/{NAME}")
    for headers, status in (
        ([], 200),
        ([("Range", "bytes=0-3")], 206),
        ([("If-None-Match", "*")], 304),
        ([("If-Match", '"x"')], 412),
        ([("Range", "bytes=9999-")], 416),
    ):
        for method in ("GET", "HEAD"):
            if where == "database":
                path.unlink(missing_ok=True)
            answer = await ask(app, target, headers=headers, method=method)
            if method == "GET":
                assert answer.status == status
            kept = answer.headers.get("cache-control")
            wanted = IMMUTABLE if is_kept else None
            assert kept == (wanted if answer.status in (200, 206, 304) else "no-store")


@pytest.mark.parametrize("data", [LARGE, FILM], ids=["large", "streamed"])
async def test_large_files_are_immutable(sqlite_store: UploadStore, data: bytes) -> None:
    """A file that is sent in pieces, or restored meanwhile, is immutable as well."""
    path = await put(sqlite_store, NAME, data)
    url = await sqlite_store.url(NAME, versioned=True)
    path.unlink()
    for _ in range(2):
        answer = await ask(wrapping(sqlite_store, True), url)
        assert (answer.body, answer.headers["cache-control"]) == (data, IMMUTABLE)
        await hit_and_settle(sqlite_store, NAME)


async def test_a_file_that_was_not_compared_yet(sqlite_store: UploadStore) -> None:
    """A copy that may be damaged is kept by no cache, though the record has this digest."""
    await put(sqlite_store, NAME)
    url, app = await sqlite_store.url(NAME, versioned=True), wrapping(sqlite_store, True)
    assert "cache-control" not in (await ask(app, url)).headers
    await sqlite_store.tasks.drain(10)
    assert (await ask(app, url)).headers["cache-control"] == IMMUTABLE


async def test_an_old_url_after_an_overwrite(sqlite_store: UploadStore) -> None:
    """A page from before an overwrite gets the new bytes under the old digest, and no cache keeps them under it."""
    await sqlite_store.save(NAME, OLD)
    app, before = wrapping(sqlite_store, True), await sqlite_store.url(NAME, versioned=True)
    await hit_and_settle(sqlite_store, NAME)
    assert (await ask(app, before)).headers["cache-control"] == IMMUTABLE
    await sqlite_store.save(NAME, NEW)
    await hit_and_settle(sqlite_store, NAME)
    answer = await ask(app, before)
    assert (answer.body, "cache-control" in answer.headers) == (NEW, False)
    answer = await ask(app, await sqlite_store.url(NAME, versioned=True))
    assert (answer.body, answer.headers["cache-control"]) == (NEW, IMMUTABLE)


async def test_the_apps_own_cache_control(sqlite_store: UploadStore) -> None:
    """`cache_control=` stays on all other answers, and is replaced where the digest is right."""
    await sqlite_store.save(NAME, PICTURE)
    app = wrapping(sqlite_store, True, cache_control="no-cache")
    await hit_and_settle(sqlite_store, NAME)
    for _ in range(2):
        assert (await ask(app, f"{PREFIX}/{NAME}")).headers["cache-control"] == "no-cache"
        assert (await ask(app, f"{PREFIX}/{NAME}?v={OTHER_DIGEST}")).headers["cache-control"] == "no-cache"
        assert (await ask(app, f"{PREFIX}/{NAME}?v={DIGEST}")).headers["cache-control"] == IMMUTABLE


async def test_a_scope_without_a_query(sqlite_store: UploadStore) -> None:
    """A server that passes no query string is answered as without a query."""
    await sqlite_store.save(NAME, PICTURE)
    app = wrapping(sqlite_store, True)
    for _ in range(2):
        answer = await ask(app, f"{PREFIX}/{NAME}", query_string=b"")
        assert (answer.body, "cache-control" in answer.headers) == (PICTURE, False)


async def test_urls_change_with_the_bytes(sqlite_store: UploadStore, sqlite_url: str) -> None:
    """The version is the recorded digest: the URL of equal bytes is the same on every node, of others it is not."""
    await sqlite_store.save(NAME, OLD)
    first = await sqlite_store.url(NAME, versioned=True)
    await sqlite_store.save(NAME, NEW)
    assert await sqlite_store.url(NAME, versioned=True) != first
    await sqlite_store.save(NAME, OLD)
    assert await sqlite_store.url(NAME, versioned=True) == first
    with sqlite3.connect(str(sqlite_store.database.url.database)) as connection:
        (recorded,) = connection.execute("SELECT sha256 FROM image_storage").fetchone()
    connection.close()
    assert first.endswith(f"?v={recorded}")
