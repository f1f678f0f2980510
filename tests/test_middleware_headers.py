"""`SelfHealMiddleware`: no-store, nosniff, sandbox and the app's own Cache-Control."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from starlette.types import ASGIApp

from selfheal import UploadStore
from tests.support.asgi import Wrapped, ask
from tests.support.files import MODIFIED_NS, write_file
from tests.support.middleware import LARGE, PICTURE, PREFIX, Wrapping, put
from tests.support.raw_sql import sql

IMMUTABLE = "public, max-age=31536000, immutable"
HIDDEN = (f"{PREFIX}/absent.png", f"{PREFIX}/%2e%2e/x", f"{PREFIX}/.hidden", f"{PREFIX}/", f"{PREFIX}//a")


@pytest.mark.parametrize("status", [404, 403, 401, 302, 410, 500, 418])
async def test_wrapped_answers_are_not_stored(
    sqlite_store: UploadStore, serve: bool, status: int, wrapping: Wrapping
) -> None:
    """The wrapped app's answer for an absent name is never stored, whatever its own Cache-Control."""
    app = wrapping(sqlite_store, serve, Wrapped(status, [("cache-control", "public, max-age=31536000")]))
    for method, target in itertools.product(("GET", "HEAD"), HIDDEN):
        answer = await ask(app, target, method=method)
        said = (answer.status, answer.headers["cache-control"], answer.headers["x-wrapped"])
        assert said == (status, "no-store", "yes"), target


@pytest.mark.parametrize("target", ["/", "/static/app.css", "/static/uploads", "/static/uploads_private/a.png", "/a/b"])
async def test_other_paths_are_left_alone(
    sqlite_store: UploadStore, serve: bool, target: str, wrapping: Wrapping
) -> None:
    """An answer outside the prefix passes unchanged, header by header (CVE-2023-29159: a sibling of the prefix)."""
    inner = Wrapped(404, [("cache-control", "max-age=60"), ("x-own", "1")])
    through, direct = await ask(wrapping(sqlite_store, serve, inner), target), await ask(inner, target)
    assert (through.status, through.headers, through.body) == (direct.status, direct.headers, direct.body)
    assert inner.scopes[0]["path"] == target


@pytest.mark.parametrize("on_disk", [True, False])
async def test_scripts_are_sandboxed(sqlite_store: UploadStore, on_disk: bool, wrapping: Wrapping) -> None:
    """SVG, HTML and XML have a sandbox policy, from disk and from the database (CVE-2020-15275)."""
    data = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    names = ("a.svg", "a.SVG", "a.html", "a.htm", "a.xhtml", "a.xml", "a.xsl")
    paths = {name: await put(sqlite_store, name, data) for name in names}
    requests = (
        ("GET", [], 200),
        ("HEAD", [], 200),
        ("GET", [("Range", "bytes=0-3")], 206),
        ("GET", [("If-None-Match", "*")], 304),
    )
    for name, (method, headers, status) in itertools.product(names, requests):
        if not on_disk:
            paths[name].unlink()
        answer = await ask(wrapping(sqlite_store, True), f"{PREFIX}/{name}", method=method, headers=headers)
        policy = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:"
        assert (answer.status, answer.headers["content-security-policy"]) == (status, policy), name
        assert answer.headers["x-content-type-options"] == "nosniff"


async def test_never_sniffed(
    sqlite_store: UploadStore, sqlite_url: str, tmp_path: Path, dead_port: int, wrapping: Wrapping
) -> None:
    """Every answer of the middleware has `nosniff`: 200, 206, 304, 404, 412, 416, 500, 503."""
    await put(sqlite_store, "a.png")
    await put(sqlite_store, "damaged.png", LARGE, on_disk=False)
    await sql(sqlite_url, "UPDATE image_chunk SET data = zeroblob(length(data)) WHERE position = 3")
    dead = UploadStore(tmp_path / "dead", f"postgresql+asyncpg://nobody@127.0.0.1:{dead_port}/none")
    app, statuses = wrapping(sqlite_store, True), set()
    for over, target, headers in (
        (app, "a.png", []),
        (app, "a.png", [("Range", "bytes=0-3")]),
        (app, "a.png", [("If-None-Match", "*")]),
        (app, "a.png", [("If-Match", '"x"')]),
        (app, "a.png", [("Range", "bytes=9999-")]),
        (app, ".selfheal-tmp/x", []),
        (app, "damaged.png", []),
        (wrapping(dead, True), "miss.png", []),
    ):
        answer = await ask(over, f"{PREFIX}/{target}", headers=headers)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert ("cache-control" in answer.headers) == (answer.status not in (200, 206, 304))
        statuses.add(answer.status)
    assert statuses == {200, 206, 304, 404, 412, 416, 500, 503}
    await dead.close()


async def compared(app: ASGIApp, store: UploadStore, name: str) -> None:
    """Request a file, and wait until it was compared with its record."""
    await ask(app, f"{PREFIX}/{name}")
    await store.tasks.drain(10)


async def test_own_cache_control(sqlite_store: UploadStore, wrapping: Wrapping) -> None:
    """The option is sent with 200, 206 and 304, from disk and from the database; all else is `no-store`."""
    path = await put(sqlite_store, "a.png")
    app = wrapping(sqlite_store, True, cache_control=IMMUTABLE)
    for headers, status in (
        ([], 200),
        ([("Range", "bytes=0-3")], 206),
        ([("If-None-Match", "*")], 304),
        ([("If-Match", '"x"')], 412),
        ([("Range", "bytes=9999-")], 416),
    ):
        for on_disk in (True, False):
            if on_disk:
                await compared(app, sqlite_store, "a.png")
            else:
                path.unlink()
            answer = await ask(app, f"{PREFIX}/a.png", headers=headers)
            expected = IMMUTABLE if status in (200, 206, 304) else "no-store"
            assert (answer.status, answer.headers["cache-control"]) == (status, expected)
    assert (await ask(app, f"{PREFIX}/absent.png")).headers["cache-control"] == "no-store"


@pytest.mark.parametrize("data", [b"", PICTURE[:100], PICTURE[:-1], LARGE], ids=["empty", "short", "shorter", "longer"])
async def test_no_caching_of_a_copy_that_was_not_compared(
    sqlite_store: UploadStore, data: bytes, wrapping: Wrapping
) -> None:
    """A damaged copy is served without the option, for every status, until it is healed; then with it."""
    path = await put(sqlite_store, "a.png")
    app = wrapping(sqlite_store, True, cache_control=IMMUTABLE)
    for headers in ([], [("Range", "bytes=0-3")], [("If-None-Match", "*")]):
        write_file(path, data)
        answer = await ask(app, f"{PREFIX}/a.png", headers=headers)
        assert answer.status in (200, 206, 304)
        assert "cache-control" not in answer.headers
        await sqlite_store.tasks.drain(10)
        assert path.read_bytes() == PICTURE
    for _ in range(2):
        await compared(app, sqlite_store, "a.png")
    answer = await ask(app, f"{PREFIX}/a.png")
    assert (answer.body, answer.headers["cache-control"]) == (PICTURE, IMMUTABLE)


async def test_no_caching_without_a_database(broken_store: UploadStore, wrapping: Wrapping) -> None:
    """While no database can tell whether a copy is the recorded one, no answer has the option."""
    write_file(broken_store.disk.path / "a.png", PICTURE)
    app = wrapping(broken_store, True, cache_control=IMMUTABLE)
    for _ in range(3):
        answer = await ask(app, f"{PREFIX}/a.png")
        assert (answer.status, answer.body) == (200, PICTURE)
        assert "cache-control" not in answer.headers
        await broken_store.tasks.drain(10)


async def test_recorded_type_of_a_name_without_extension(sqlite_store: UploadStore, wrapping: Wrapping) -> None:
    """The recorded type is sent with a restored file at once, and with a hit once it was compared with its record."""
    kind = "image/png"
    await sqlite_store.database.store_image("avatar", PICTURE, content_type=kind, modified_ns=MODIFIED_NS)
    app = wrapping(sqlite_store, True)
    restored = await ask(app, f"{PREFIX}/avatar")
    await compared(app, sqlite_store, "avatar")
    for _ in range(3):
        assert (await ask(app, f"{PREFIX}/avatar")).headers == restored.headers
    assert restored.headers["content-type"] == kind
    fresh = wrapping(UploadStore(sqlite_store.disk.path, sqlite_store.database.url), True)
    assert (await ask(fresh, f"{PREFIX}/avatar")).headers["content-type"] == "application/octet-stream"
    await fresh.store.close()
