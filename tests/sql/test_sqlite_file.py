"""The file of a SQLite database: never made by a server, followed when it is replaced, never below the uploads."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette

from selfheal import DatabaseUnavailable, SelfHealMiddleware, SettingsError, UploadStore
from selfheal.content.sources import CHUNK
from tests.support.open_files import open_targets
from tests.support.records import bytes_of
from tests.support.sample_data import noise
from tests.support.uploads import NAME, get


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file of the database of `sqlite_store`."""
    return tmp_path / "catalogue.db"


@pytest.fixture
async def other_file(tmp_path: Path) -> Path:
    """Another database, with other bytes under `NAME`."""
    path = tmp_path / "backup.db"
    async with UploadStore(tmp_path / "other", f"sqlite:///{path}") as other:
        await other.database.create_tables()
        await other.save(NAME, b"of the other file")
    return path


def put_in_place(new: Path, file: Path) -> None:
    """Replace a database as an administrator does: no connection knows of it."""
    for journal in ("-wal", "-shm"):
        file.with_name(file.name + journal).unlink(missing_ok=True)
    new.rename(file)


async def warm_up(store: UploadStore) -> None:
    """Read and write, so that connections of every kind are open."""
    app = SelfHealMiddleware(Starlette(), store)
    (await store.save("warm.png", b"warm")).path.unlink()
    assert (await get(app, "warm.png")).content == b"warm"
    assert (await get(app, "none.png")).status_code == 404
    store.disk.path_of("warm.png").unlink()


async def test_a_replaced_file_is_read(sqlite_store: UploadStore, file: Path, other_file: Path) -> None:
    """After a `mv` over the database, misses are answered from the new file, not from the one that is gone."""
    await warm_up(sqlite_store)
    put_in_place(other_file, file)
    answer = await get(SelfHealMiddleware(Starlette(), sqlite_store))
    assert (answer.status_code, answer.content) == (200, b"of the other file")


async def test_a_replaced_file_is_written(sqlite_store: UploadStore, file: Path, other_file: Path) -> None:
    """After a `mv`, saves go to the new file, where the next process finds them."""
    await warm_up(sqlite_store)
    put_in_place(other_file, file)
    large = noise(20 * CHUNK)
    await sqlite_store.save("new.png", large)
    async with UploadStore(sqlite_store.disk.path, f"sqlite:///{file}") as again:
        assert await bytes_of(again.database, "new.png") == large
        assert await again.database.find("warm.png") is None


async def test_old_connections_are_closed(sqlite_store: UploadStore, file: Path, other_file: Path) -> None:
    """A file that was replaced is not kept open: its space becomes free."""
    await warm_up(sqlite_store)
    put_in_place(other_file, file)
    await get(SelfHealMiddleware(Starlette(), sqlite_store))
    await sqlite_store.save("new.png", b"x")
    assert [path for path in open_targets() if path.startswith(str(file)) and path.endswith("(deleted)")] == []


async def test_a_deleted_file_is_unknown(sqlite_store: UploadStore, file: Path) -> None:
    """Without its file the database gives no answer: 503, never 404, and no empty database is made."""
    await warm_up(sqlite_store)
    for path in file.parent.glob("catalogue.db*"):
        path.unlink()
    app = SelfHealMiddleware(Starlette(), sqlite_store)
    for name in ("warm.png", "never.png"):
        assert (await get(app, name)).status_code == 503
    with pytest.raises(DatabaseUnavailable, match=r"there is no database .*; put it back"):
        await sqlite_store.save("new.png", b"x")
    assert not file.exists()


async def test_a_file_that_comes_back(sqlite_store: UploadStore, file: Path, tmp_path: Path) -> None:
    """As soon as the file is there again, it is used."""
    await warm_up(sqlite_store)
    file.rename(tmp_path / "away.db")
    app = SelfHealMiddleware(Starlette(), sqlite_store)
    assert (await get(app, "warm.png")).status_code == 503
    (tmp_path / "away.db").rename(file)
    assert (await get(app, "warm.png")).content == b"warm"


@pytest.mark.parametrize("query", ["", "?timeout=3"])
async def test_a_server_makes_no_database(query: str, directory: Path, tmp_path: Path) -> None:
    """A store whose database was never made answers 503 and makes no file; `create_tables` makes it."""
    file = tmp_path / "never.db"
    async with UploadStore(directory, f"sqlite:///{file}{query}") as store:
        assert (await get(SelfHealMiddleware(Starlette(), store))).status_code == 503
        with pytest.raises(DatabaseUnavailable):
            await store.save("a.png", b"x")
        assert not file.exists()
        await store.database.create_tables()
        await store.save("a.png", b"x")
        assert file.stat().st_mode & 0o777 == 0o644


async def test_a_mode_of_the_apps_own(directory: Path, tmp_path: Path) -> None:
    """A URL that says how to open the file is used as it is."""
    async with UploadStore(directory, f"sqlite:///file:{tmp_path}/own.db?mode=rwc&uri=true") as store:
        await store.database.create_tables()
        await store.save("a.png", b"x")
        assert (tmp_path / "own.db").exists()


@pytest.mark.parametrize("place", ["app.db", "deep/app.db", "../uploads/app.db", "../link/app.db", "../link.db"])
@pytest.mark.parametrize("given", ["url", "engine"])
async def test_a_database_below_the_uploads(place: str, given: str, directory: Path) -> None:
    """A database file below the uploads would be served to anyone: the store refuses it, also through a link."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory.parent / "link").symlink_to(directory)
    (directory.parent / "link.db").symlink_to(directory / "app.db")
    url = f"sqlite+aiosqlite:///{directory}/{place}"
    engine = create_async_engine(url)
    with pytest.raises(SettingsError, match="is in the directory that is served"):
        UploadStore(directory, url if given == "url" else engine)
    await engine.dispose()


async def test_uploads_that_are_a_link(directory: Path, tmp_path: Path) -> None:
    """A database below the directory that the uploads lead to is refused as well."""
    directory.parent.mkdir(parents=True)
    (tmp_path / "volume").mkdir()
    directory.symlink_to(tmp_path / "volume")
    with pytest.raises(SettingsError, match="is in the directory that is served"):
        UploadStore(directory, f"sqlite:///{tmp_path}/volume/app.db")
