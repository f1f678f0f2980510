"""`serve=True` and `serve=False` open files, heal them and emit events alike."""

from __future__ import annotations

import errno
import os

import pytest

from selfheal import Kind, SelfHealMiddleware, UploadStore
from selfheal.disk import syscalls
from selfheal.healing.bodies import Restoring
from tests.support.asgi import Wrapped, ask
from tests.support.middleware import FILM, PICTURE, PREFIX, Wrapping, put, static_over
from tests.support.open_files import open_below


async def test_both_modes_emit_the_same_events(store: UploadStore, serve: bool, wrapping: Wrapping) -> None:
    """A hit, a restore, an absent name and a name that is no file have the same events in both modes."""
    path = await put(store, "tom.png")
    (store.disk.path / "folder.png").mkdir()
    app = wrapping(store, serve, static_over(store.disk.path))
    store.events.counters.clear()
    assert (await ask(app, f"{PREFIX}/tom.png")).body == PICTURE
    path.unlink()
    for _ in range(2):
        assert (await ask(app, f"{PREFIX}/tom.png")).body == PICTURE
    for name in ("absent.png", "folder.png"):
        assert (await ask(app, f"{PREFIX}/{name}")).status == 404
    await store.tasks.drain(10)
    assert store.events.counters == {Kind.HIT: 2, Kind.RESTORED: 1, Kind.ABSENT: 1}


async def test_a_hit_is_compared_in_both_modes(store: UploadStore, serve: bool, wrapping: Wrapping) -> None:
    """After its first hit a file that is only on disk is adopted, and a deleted one is removed."""
    path = await put(store, "tom.png")
    lonely = store.disk.path / "lonely.png"
    lonely.write_bytes(PICTURE)
    os.utime(lonely, (1, 1))
    await store.database.bury("tom.png")
    app = wrapping(store, serve, static_over(store.disk.path))
    for name in ("tom.png", "lonely.png"):
        assert (await ask(app, f"{PREFIX}/{name}")).body == PICTURE
    await store.tasks.drain(10)
    assert not path.exists()
    assert await store.database.find("lonely.png") is not None


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
async def test_a_file_that_the_disk_cannot_open_is_healed(
    store: UploadStore, serve: bool, monkeypatch: pytest.MonkeyPatch, code: int, wrapping: Wrapping
) -> None:
    """If opening a file fails because the disk has lost it, the file is set aside and restored in both modes."""
    path = await put(store, "tom.png")
    broken, bad = path.stat().st_ino, [1]

    def failing(real):  # type: ignore[no-untyped-def]
        def open_or_fail(root: int, name: str) -> int:
            if bad and name == "tom.png" and path.exists() and path.stat().st_ino == broken:
                raise OSError(code, os.strerror(code))
            return int(real(root, name))

        return open_or_fail

    for call in ("open_cached", "open_file"):
        monkeypatch.setattr(syscalls, call, failing(getattr(syscalls, call)))
    answer = await ask(wrapping(store, serve, static_over(store.disk.path)), f"{PREFIX}/tom.png")
    assert (answer.status, answer.body) == (200, PICTURE)
    assert path.stat().st_ino != broken
    assert store.events.counters[Kind.QUARANTINED] == 1
    assert [file.read_bytes() for file in store.disk.quarantine_path.rglob("*") if file.is_file()] == [PICTURE]


async def test_a_disk_that_takes_no_file(
    store: UploadStore, serve: bool, monkeypatch: pytest.MonkeyPatch, wrapping: Wrapping
) -> None:
    """Without room on the disk `serve=True` sends a file from the database; `serve=False` has none to hand on: 503."""
    await put(store, "tom.png", on_disk=False)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    answer = await ask(wrapping(store, serve, Wrapped(200)), f"{PREFIX}/tom.png")
    assert (answer.status, answer.body) == (200, PICTURE) if serve else answer.status == 503


@pytest.mark.parametrize("size", [0, 1000, 600_000, len(FILM)])
async def test_a_restored_file_is_answered_from_the_descriptor_in_hand(
    store: UploadStore, directory: object, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A file of any size is answered without opening the name again, and nothing stays open."""
    data = FILM[:size]
    await put(store, "film.mp4", data, on_disk=False)
    opened: list[str] = []
    real = syscalls.open_file

    def noted(root: int, name: str) -> int:
        opened.append(name)
        return real(root, name)

    monkeypatch.setattr(syscalls, "open_file", noted)
    assert (await ask(SelfHealMiddleware(Wrapped(), store), f"{PREFIX}/film.mp4")).body == data
    assert opened in ([], ["film.mp4"])  # the look that found it missing, if a cached look could not
    await store.tasks.drain(10)
    assert open_below(store.disk.path) == []


async def test_callers_that_share_a_restored_file_close_it_once(store: UploadStore) -> None:
    """The descriptor of a restored file is open until the last of its callers has closed it."""
    await put(store, "film.mp4", FILM[:600_000], on_disk=False)
    first, second = await store.restorer.restore("film.mp4"), None
    assert isinstance(first, Restoring)
    second = first.hold()
    first.close()
    assert b"".join([piece async for piece in second.pieces(0, second.size)]) == FILM[:600_000]
    assert open_below(store.disk.path) != []
    second.close()
    assert open_below(store.disk.path) == []
