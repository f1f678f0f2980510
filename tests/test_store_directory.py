"""The uploads directory of a store: made at once, on disks that ignore case, behind links of releases."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from selfheal import UploadStore
from selfheal.errors import NotStored, SettingsError
from tests.support.asgi import ask
from tests.support.disk_files import contents_below, names_in
from tests.support.middleware import PREFIX, wrapping
from tests.support.odd_disks import ignore_case
from tests.support.os_errors import fails

PICTURE = b"a picture " * 500
OTHER = b"another picture " * 400


# -- made at once -----------------------------------------------------------------------------------------------------


def test_static_files_start_after_a_loss(directory: Path, sqlite_url: str) -> None:
    """An app that mounts the uploads with `StaticFiles` starts although the disk was lost: the store makes them."""
    UploadStore(directory, sqlite_url)
    Starlette(routes=[Mount(PREFIX, StaticFiles(directory=directory))])
    assert names_in(directory) == []


@pytest.mark.parametrize("place", ["uploads", "uploads/aside", "uploads/.aside", "link", "link/aside"])
def test_a_quarantine_that_would_be_served(tmp_path: Path, sqlite_url: str, place: str) -> None:
    """What is set aside must not be served: a quarantine at or below the uploads is refused, also through a link."""
    (tmp_path / "link").symlink_to("uploads")
    with pytest.raises(SettingsError, match=r"the quarantine .* is in the directory that is served"):
        UploadStore(tmp_path / "uploads", sqlite_url, quarantine=tmp_path / place)
    assert not (tmp_path / "uploads").exists()


@pytest.mark.parametrize("place", [".", "uploads-aside", "aside/uploads"])
def test_a_quarantine_beside_the_uploads(tmp_path: Path, sqlite_url: str, place: str) -> None:
    """A quarantine beside or above the uploads is accepted."""
    store = UploadStore(tmp_path / "uploads", sqlite_url, quarantine=tmp_path / place)
    assert store.disk.quarantine_path == tmp_path / place


def test_a_lost_mount_is_not_made(directory: Path, sqlite_url: str) -> None:
    """With `require_marker` the directory is not made: the mount that is to be there may be lost."""
    UploadStore(directory, sqlite_url, require_marker=True)
    assert not directory.exists()


async def test_a_directory_that_cannot_be_made(
    directory: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If it cannot be made, one line says so, and files are saved and served from the database."""
    monkeypatch.setattr("os.mkdir", fails(13))
    async with UploadStore(directory, sqlite_url) as store:
        lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(lines) == 1
        assert str(directory) in lines[0]
        await store.database.create_tables()
        await store.save("tom.png", PICTURE)
        answer = await ask(wrapping(store, serve=True), f"{PREFIX}/tom.png")
        assert (answer.status, answer.body) == (200, PICTURE)
    assert not directory.exists()


# -- a disk that ignores case -----------------------------------------------------------------------------------------


async def test_another_spelling_is_no_name(
    sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch, serve: bool
) -> None:
    """A visitor's `TOM.JPG` is absent, makes no record, and does not bring a deleted `tom.jpg` back."""
    ignore_case(monkeypatch)
    sqlite_store.disk.close()  # the root was opened before
    app = wrapping(sqlite_store, serve=serve)
    (sqlite_store.disk.path / "cats").mkdir()
    sqlite_store.disk.path_of("cats/tom.jpg").write_bytes(PICTURE)
    for name in ("cats/TOM.JPG", "Cats/tom.jpg"):
        for _ in range(2):
            assert (await ask(app, f"{PREFIX}/{name}")).status == 404
        with pytest.raises(NotStored):
            await sqlite_store.adopt(name)
    await sqlite_store.tasks.drain(30)
    assert await sqlite_store.database.count() == 0
    await sqlite_store.adopt("cats/tom.jpg")
    assert await sqlite_store.delete("cats/tom.jpg")
    sqlite_store.disk.path.joinpath("cats").mkdir()
    sqlite_store.disk.path_of("cats/tom.jpg").write_bytes(PICTURE)
    assert (await ask(app, f"{PREFIX}/cats/TOM.JPG")).status == 404
    await sqlite_store.tasks.drain(30)
    record = await sqlite_store.database.find("cats/tom.jpg")
    assert record is not None
    assert record.is_deleted


async def test_both_spellings_are_served(sqlite_store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `a.png` and `A.png` one is on disk and the other is served from the database, each with its own bytes."""
    ignore_case(monkeypatch)
    sqlite_store.disk.close()  # the root was opened before
    app = wrapping(sqlite_store, serve=True)
    await sqlite_store.save("a.png", PICTURE)
    await sqlite_store.save("A.png", OTHER)
    for _ in range(3):
        for name, data in (("a.png", PICTURE), ("A.png", OTHER)):
            answer = await ask(app, f"{PREFIX}/{name}")
            assert (answer.status, answer.body) == (200, data)
    await sqlite_store.tasks.drain(30)
    assert contents_below(sqlite_store.disk.path) == {"a.png": PICTURE}


# -- links of releases ------------------------------------------------------------------------------------------------


async def test_the_quarantine_outlives_a_release(tmp_path: Path, sqlite_url: str) -> None:
    """Where a release links to shared uploads, the quarantine is beside the shared ones: pruning does not delete it."""
    shared, release = tmp_path / "shared" / "uploads", tmp_path / "releases" / "1"
    shared.mkdir(parents=True)
    (release / "static").mkdir(parents=True)
    (tmp_path / "current").symlink_to(release)
    (release / "static" / "uploads").symlink_to(shared)
    async with UploadStore(tmp_path / "current" / "static" / "uploads", sqlite_url) as store:
        store.disk.path_of("tom.png").write_bytes(PICTURE)
        moved = store.disk.quarantine("tom.png")
    assert moved is not None
    shutil.rmtree(tmp_path / "releases")
    assert moved.read_bytes() == PICTURE
