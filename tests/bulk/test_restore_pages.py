"""Restore compares names with the disk in pages: none is left out or looked at twice."""

from __future__ import annotations

import errno
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from selfheal import UploadStore, bulk
from selfheal.disk import syscalls
from tests.support.files import noise, write_file
from tests.support.runs import SQL, report_of
from tests.support.sockets import make_socket
from tests.support.store_state import files_below

# -- pages of names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(("names_at_once", "ranges_at_once"), [(1, 1), (2, 3), (4, 1), (100, 16)])
async def test_pages_of_any_length(
    store: UploadStore,
    directory: Path,
    names_at_once: int,
    ranges_at_once: int,
    *,
    verify: bool,
) -> None:
    """With pages of any length each name is compared once: missing files are written, deleted ones removed."""
    names = [f"{folder}{number}.png" for folder in ("", "a/", "a/b/", "日本/") for number in range(4)]
    for name in names:
        await store.save(name, noise(50, name))
    deleted, missing = {names[2], names[5], names[10]}, {names[0], names[7], names[15]}
    for name in deleted:
        await store.delete(name)
    for name in missing:
        (directory / name).unlink()
    put_back = deleted - {names[10]}
    for name in put_back:
        write_file(directory / name, noise(50, name))
    report = await report_of(bulk.restore(store, verify=verify))
    assert report.counts == {"ok": len(names) - 6, "restored": 3, "deleted": 2}
    assert {one.name for one in report.results if one.outcome == "restored"} == missing
    assert {one.name for one in report.results if one.outcome == "deleted"} == put_back
    on_disk = {path.relative_to(directory).as_posix() for path in directory.rglob("*.png")}
    assert on_disk == set(names) - deleted
    assert (await report_of(bulk.restore(store, verify=verify))).counts == {"ok": len(names) - 3}


@pytest.mark.parametrize("size", [1, 3, 5, 100])
async def test_key_ranges(store: UploadStore, size: int) -> None:
    """Key ranges have every name once, in order, none too many, and their summaries are right."""
    names = sorted(f"{folder}{number}.png" for folder in ("", "a/", "a/b/", "z") for number in range(3))
    for name in names:
        await store.database.store_image(name, noise(len(name), name))
    for name in names[:4]:
        await store.database.bury(name)
    living, deleted = [], []
    async for key_range in store.database.catalogue.key_ranges(size):
        found = await store.database.catalogue.names_in(key_range)
        tombstones = await store.database.catalogue.names_in(key_range, deleted=True)
        summary = await store.database.catalogue.summary(key_range)
        assert len(found) + len(tombstones) <= size
        assert sorted(summary.lines.split("\n")) == [name for name, _ in found] or not found
        assert (summary.count, summary.size, summary.unsound) == (len(found), sum(size for _, size in found), 0)
        assert summary.deleted == len(tombstones)
        living += found
        deleted += tombstones
    assert living == [(name, len(name)) for name in names[4:]]
    assert deleted == [(name, len(name)) for name in names[:4]]


async def test_rare_names(store: UploadStore) -> None:
    """Names with rare characters, in folders and at the top, are found like others."""
    names = ["a.b", "Öl/é 1.png", "x/y/z/w/v.png", "con_.png", "x.png", "x/y.png", "y@2x.png"]
    for name in names:
        await store.save(name, noise(50, name))
    assert (await report_of(bulk.restore(store))).counts == {"ok": len(names)}
    (store.disk.path / names[1]).unlink()
    assert (await report_of(bulk.restore(store))).counts == {"ok": len(names) - 1, "restored": 1}


async def test_a_name_that_is_saved_during_the_comparison(
    sqlite_store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is saved between the names of a page during its comparison pushes none of them out."""
    for name in ("a.png", "c.png", "d.png"):
        await sqlite_store.save(name, noise(50, name))
        (directory / name).unlink()
    names_in = sqlite_store.database.catalogue.names_in

    async def save_before(key_range: Any, **which: Any) -> Any:
        await sqlite_store.database.store_image("b.png", noise(50, "b.png"))
        return await names_in(key_range, **which)

    monkeypatch.setattr(sqlite_store.database.catalogue, "names_in", save_before)
    assert (await report_of(bulk.restore(sqlite_store, names_at_once=2))).counts == {"restored": 4}
    assert files_below(directory) == ["a.png", "b.png", "c.png", "d.png"]


# -- pages whose files all seem to exist ------------------------------------------------------------------------------


async def test_a_name_that_looks_like_two(store: UploadStore, sql: SQL, directory: Path) -> None:
    """A recorded name with a line feed is reported, although both its halves are names of files on disk."""
    for name in ("a.png", "b.png"):
        await store.save(name, noise(50, name))
    await sql("UPDATE image_storage SET name = :name WHERE name = 'a.png'", name="a.png\nb.png")
    report = await report_of(bulk.restore(store))
    assert report.problems == {"a.png\nb.png": "invalid_name"}
    assert report.counts == {"ok": 1, "invalid_name": 1}


async def test_a_record_with_an_impossible_size(sqlite_store: UploadStore) -> None:
    """A record with an impossible size is reported, although every file is on disk."""
    for name in ("a.png", "b.png", "c.png"):
        await sqlite_store.save(name, noise(50, name))
    with closing(sqlite3.connect(str(sqlite_store.database.url.database))) as connection:
        connection.execute("UPDATE image_storage SET size = -1 WHERE name = 'b.png'")
        connection.commit()
    report = await report_of(bulk.restore(sqlite_store))
    assert report.problems == {"b.png": "corrupt_in_database"}
    assert report.counts == {"ok": 2, "corrupt_in_database": 1}


@pytest.mark.parametrize("verify", [False, True])
async def test_a_tombstone_that_is_damaged(store: UploadStore, sql: SQL, directory: Path, *, verify: bool) -> None:
    """A tombstone with an invalid name has no file; one with an impossible size may have a file, which is removed."""
    for name in ("a.png", "b.png", "c.png"):
        await store.save(name, noise(50, name))
    await store.delete("a.png")
    await store.delete("b.png")
    await sql("UPDATE image_storage SET name = '../a.png' WHERE name = 'a.png'")
    await sql("UPDATE image_storage SET size = -1 WHERE name = 'b.png'")
    write_file(directory / "b.png", noise(50, "b.png"))
    report = await report_of(bulk.restore(store, verify=verify))
    assert report.problems == {}
    assert report.counts == {"ok": 1, "deleted": 1}
    assert files_below(directory) == ["c.png"]
    assert (await report_of(bulk.restore(store, verify=verify))).counts == {"ok": 1}


@pytest.mark.parametrize("kind", ["folder", "link", "socket"])
async def test_a_name_where_no_file_is(store: UploadStore, directory: Path, kind: str, tmp_path: Path) -> None:
    """A directory, link or socket at a recorded name is not taken for a file."""
    for name in ("cats/a.png", "cats/b.png"):
        await store.save(name, noise(50, name))
    path = directory / "cats/b.png"
    path.unlink()
    if kind == "folder":
        write_file(path / ".gitkeep", b"")
    elif kind == "link":
        path.symlink_to(directory / "cats/a.png")
    else:
        make_socket(path)
    assert (await report_of(bulk.restore(store))).problems == {"cats/b.png": "failed"}


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [False, True])
async def test_a_folder_that_cannot_be_read(
    store: UploadStore, *, verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its names, deleted ones too, are reported as failed; the names of other folders are ok."""
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
    report = await report_of(bulk.restore(store, verify=verify))
    assert report.problems == dict.fromkeys(("cats/a.png", "cats/b.png", "cats/deleted.png"), "failed")
    assert report.counts == {"ok": 2, "failed": 3}


async def test_a_folder_that_changes_during_the_run(
    sqlite_store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An early listing of a folder does not decide about names that are compared later."""
    names = [f"cats/{number:02}.png" for number in range(20)]
    for name in names:
        await sqlite_store.save(name, noise(50, name))
    (directory / names[0]).unlink()
    names_in = sqlite_store.database.catalogue.names_in

    async def change_then(key_range: Any, **which: Any) -> Any:
        found = await names_in(key_range, **which)
        if names[0] in [name for name, _ in found]:
            await sqlite_store.delete(names[18])
            (directory / names[17]).unlink()
        return found

    monkeypatch.setattr(sqlite_store.database.catalogue, "names_in", change_then)
    report = await report_of(bulk.restore(sqlite_store, names_at_once=2, ranges_at_once=1))
    assert report.counts == {"ok": 17, "restored": 2}
    assert sorted(f"cats/{path.name}" for path in directory.rglob("*.png")) == [n for n in names if n != names[18]]
