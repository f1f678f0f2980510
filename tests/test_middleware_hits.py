"""`SelfHealMiddleware`: repeated hits, and errors while a file is sent."""

from __future__ import annotations

import errno
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from starlette.types import Message

from selfheal import SelfHealMiddleware, UploadStore
from selfheal.events import Kind
from selfheal.healing import restore
from tests.support.asgi import Wrapped, ask, ask_scope, no_message, scope_of
from tests.support.files import write_file
from tests.support.middleware import LARGE, PICTURE, PREFIX, put

# -- repeated hits ----------------------------------------------------------------------------------------------------


async def test_a_repeated_hit(sqlite_store: UploadStore) -> None:
    """A repeated hit has the same answer, is counted, and does not answer other requests for the name."""
    path = await put(sqlite_store, "cats/tom.png")
    app, target = SelfHealMiddleware(Wrapped(), sqlite_store), f"{PREFIX}/cats/tom.png"
    answers = [await ask(app, target) for _ in range(3)]
    assert {answer.body for answer in answers} == {PICTURE}
    assert len({tuple(answer.headers.items()) for answer in answers}) == 1
    assert sqlite_store.events.counters[Kind.HIT] == 3
    assert (await ask(app, target, headers=[("If-None-Match", answers[0].headers["etag"])])).status == 304
    assert (await ask(app, target, method="HEAD")).headers == answers[0].headers
    assert (await ask(app, target, headers=[("Range", "bytes=1-9")])).body == PICTURE[1:10]
    for more in ({"raw_path": target.replace("s/t", "s%2ft").encode()}, {"method": "POST"}):
        assert (await ask_scope(app, scope_of(target) | more)).body == b"wrapped"
    path.unlink()
    assert (await ask(app, target)).body == PICTURE
    assert path.read_bytes() == PICTURE
    await sqlite_store.delete("cats/tom.png")
    assert (await ask(app, target)).body == b"wrapped"


async def test_a_file_that_changes_after_hits_is_compared(sqlite_store: UploadStore) -> None:
    """A file that is replaced after many hits, with the same mtime, is compared with its record at the next hit."""
    path = await put(sqlite_store, "tom.png")
    app, target = SelfHealMiddleware(Wrapped(), sqlite_store), f"{PREFIX}/tom.png"
    for _ in range(3):
        assert (await ask(app, target)).body == PICTURE
    await sqlite_store.tasks.drain(10)
    write_file(path, PICTURE[1:])
    assert (await ask(app, target)).body == PICTURE[1:]
    await sqlite_store.tasks.drain(10)
    assert (await ask(app, target)).body == PICTURE


# -- errors while a file is sent --------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [PICTURE, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, None])
async def test_an_error_of_send_is_no_broken_disk(sqlite_store: UploadStore, data: bytes, code: int | None) -> None:
    """An `OSError` of `send` is a client that is gone, whatever its number: no broken disk, and no error of the app."""
    path = await put(sqlite_store, "tom.png", data)
    app, error = SelfHealMiddleware(Wrapped(), sqlite_store), OSError() if code is None else OSError(code, "no")

    async def send(_: Message) -> None:
        raise error

    for _ in range(2):
        await app(scope_of(f"{PREFIX}/tom.png"), no_message, send)
        assert path.read_bytes() == data
    assert sqlite_store.events.counters[Kind.QUARANTINED] == 0


def test_a_platform_with_fewer_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error without a number is no broken disk, also on a platform that lacks one of the error numbers."""
    monkeypatch.delattr(errno, "EUCLEAN")
    spec = spec_from_file_location("selfheal.healing.restore_there", restore.__file__)
    assert spec is not None
    assert spec.loader is not None
    there = module_from_spec(spec)
    spec.loader.exec_module(there)
    assert not there.is_broken(OSError())
    assert there.is_broken(OSError(errno.EIO, "no"))
