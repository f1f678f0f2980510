"""`selfheal doctor`: one line for each question, with what to do; exit 0, 1 or 3."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from selfheal import UploadStore
from selfheal.scripts.doctor import Finding, examine
from tests.support.command_line import IMAGES, PASSWORD, Site
from tests.support.files import write_file
from tests.support.mounts import Mount, mounts

CHECKS = [
    *("versions", "installation", "database", "clock", "directory", "disk", "quarantine", "temporary files"),
    *("files on disk", "files in the database"),
]


@pytest.fixture
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Mount]]:
    """Mount a tmpfs at `tmp_path / "mount"`."""
    yield from mounts(request.node, tmp_path / "mount")


async def findings(store: UploadStore) -> dict[str, Finding]:
    """Return what doctor says of a store, by the question."""
    return {one.check: one async for one in examine(store)}


def checks_of(site: Site, *flags: str) -> tuple[int, dict[str, Any]]:
    """Run doctor; return its exit code, and its checks by name."""
    done = site.run("doctor", "--json", *flags)
    return done.code, {one["check"]: one for one in done.json["checks"]}


def test_a_store_that_is_fine(full_site: Site) -> None:
    """Every question is answered in one line, exit 0; --quiet prints nothing."""
    with_server = UploadStore(full_site.directory, full_site.database)
    asyncio.run(with_server.open())
    with_server.disk.close()
    done = full_site.run("doctor")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line.split(None, 1)[1].partition(":")[0] for line in lines] == CHECKS
    assert {line.split()[0] for line in lines} == {"ok"}
    database = lines[CHECKS.index("database")]
    assert f"{full_site.database.partition('///')[2]}, set by --database; SQLite 3." in database
    assert f"{len(IMAGES)} names, tables of version 2" in database
    assert "selfheal-uploads " in lines[0]
    assert "sqlalchemy 2." in lines[0]
    quiet = full_site.run("doctor", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    assert full_site.run("doctor", "--json").json["ok"] is True


def test_a_server_that_is_fine(site: Site, postgres_url: str) -> None:
    """Over PostgreSQL the version of the server and its address are there, and no password."""
    env = {"DATABASE_URL": postgres_url.replace("@", f":{PASSWORD}@"), "SELFHEAL_DIRECTORY": str(site.directory)}
    write_file(site.directory / "a.png", b"a")
    assert site.run_without_flags("migrate", env=env).code == 0
    done = site.run_without_flags("doctor", env=env)
    assert (done.code, done.err) == (0, "")
    assert "postgresql://postgres:***@127.0.0.1:" in done.out
    assert "set by DATABASE_URL; postgresql 1" in done.out


@pytest.mark.parametrize("kind", ["no file", "no tables", "no server"])
def test_a_database_that_is_not_there(site: Site, dead_port: int, kind: str) -> None:
    """Without the database doctor says which one it asked and why, still looks at the disk, and exits 3."""
    file = site.database.partition("///")[2]
    if kind == "no tables":
        Path(file).touch()
    dead = f"postgres://someone:{PASSWORD}@127.0.0.1:{dead_port}/app"
    code, found = checks_of(site, *(["--database", dead] if kind == "no server" else []))
    assert code == 3
    assert found["database"]["level"] == "unreachable"
    asked = f"postgresql://someone:***@127.0.0.1:{dead_port}/app" if kind == "no server" else file
    assert f"{asked}, set by --database" in found["database"]["text"]
    assert {"directory", "disk", "quarantine"} <= set(found)
    assert "files on disk" not in found
    done = site.run("doctor", "--quiet")
    assert (done.code, done.out, done.err.count("\n")) == (3, "", 1)


def test_both_sides_differ(full_site: Site) -> None:
    """Files that are not backed up are wrong: exit 1; missing files and files of deleted names are notes."""
    (full_site.directory / "a.png").unlink()
    assert full_site.run("doctor").code == 0
    code, found = checks_of(full_site)
    assert (code, found["files on disk"]["level"]) == (0, "note")
    assert found["files on disk"]["text"].startswith("1 missing file:")
    full_site.run("delete", "cats/tom.jpg")
    write_file(full_site.directory / "cats/tom.jpg", IMAGES["cats/tom.jpg"])
    assert checks_of(full_site)[1]["files in the database"]["text"].startswith("1 file of deleted names")
    for name in ("new.png", "two.png", ".hidden", "Thumbs.db", "bad..\\name"):
        write_file(full_site.directory / name, b"x")
    code, found = checks_of(full_site)
    assert (code, found["files in the database"]["level"]) == (1, "wrong")
    assert found["files in the database"]["text"].startswith("2 files not in the database; ")


def test_the_quarantine_is_listed(full_site: Site) -> None:
    """Each file in quarantine is named, in words and in JSON: exit 1."""
    aside = full_site.home / "app" / ".selfheal-quarantine-uploads"
    write_file(aside / "20260101T000000-00000000" / "cats" / "tom.jpg", b"the only copy")
    code, found = checks_of(full_site)
    assert (code, found["quarantine"]["level"]) == (1, "wrong")
    assert found["quarantine"]["names"] == [str(aside / "20260101T000000-00000000" / "cats" / "tom.jpg")]
    assert "\n    " + found["quarantine"]["names"][0] in full_site.run("doctor").out


def test_temporary_files(full_site: Site) -> None:
    """Temporary files are counted, and stay."""
    write_file(full_site.directory / f".selfheal-tmp/{'0' * 32}", b"left")
    code, found = checks_of(full_site)
    assert (code, found["temporary files"]["level"], found["temporary files"]["text"][0]) == (0, "note", "1")


def test_another_selfheal(full_site: Site, tmp_path: Path) -> None:
    """Another distribution of that name, which has its files in the same package, is wrong: exit 1."""
    write_file(tmp_path / "site" / "selfheal-0.3.dist-info" / "METADATA", b"Name: selfheal\nVersion: 0.3\n")
    done = full_site.execute(None, "doctor", *full_site.flags, "--json", PYTHONPATH=str(tmp_path / "site"))
    found = {one["check"]: one for one in json.loads(done.out)["checks"]}
    assert (done.code, found["installation"]["level"]) == (1, "wrong")
    assert "pip uninstall -y selfheal" in found["installation"]["text"]


# -- odd disks and clocks, in this process ----------------------------------------------------------------------------


async def test_a_directory_that_is_missing(store: UploadStore, directory: Path) -> None:
    """A missing directory is a note, and nothing makes it."""
    shutil.rmtree(directory)
    found = await findings(store)
    assert (found["directory"].level, found["disk"].level) == ("note", "ok")
    assert "is not there" in found["directory"].text
    assert not directory.exists()


async def test_a_lost_mount(directory: Path, sqlite_url: str) -> None:
    """A store that requires the marker file says that it is gone, not that all is well."""
    store = UploadStore(directory, sqlite_url, require_marker=True)
    store.disk.mark()
    assert (await findings(store))["directory"].level != "wrong"
    directory.joinpath(".selfheal-marker").unlink()
    found = (await findings(store))["directory"]
    assert found.level == "wrong"
    assert "is its mount lost?" in found.text
    await store.close()


async def test_a_directory_of_another_user(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that this user may not write to is wrong, with what mends it."""
    monkeypatch.setattr(os, "access", lambda _path, mode: not mode & os.W_OK)
    found = (await findings(store))["directory"]
    assert (found.level, "`chown`" in found.text) == ("wrong", True)


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_clock_that_is_wrong(store: UploadStore, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    """A database whose clock is an hour off is wrong, and it says in which direction."""

    async def now() -> datetime:
        return datetime.now(UTC) + timedelta(hours=hours)

    monkeypatch.setattr(store.database.changes, "now", now)
    found = (await findings(store))["clock"]
    assert found.level == "wrong"
    assert ("ahead of" if hours > 0 else "behind") in found.text
    assert "3,600 s" in found.text


async def test_a_disk_that_ignores_case(store: UploadStore, broken_case: None) -> None:
    """A disk that ignores case is a note."""
    store.disk.close()
    found = (await findings(store))["disk"]
    assert (found.level, "ignores case" in found.text) == ("note", True)


@pytest.fixture
def broken_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every disk ignores case."""
    monkeypatch.setattr("selfheal.disk.spelling.minds_case", lambda _root: False)


async def test_a_small_and_a_read_only_disk(mount: Callable[[str], Mount], tmp_path: Path, sqlite_url: str) -> None:
    """An almost full disk and a read-only one are wrong; the file system is named."""
    mounted = mount("size=1m")
    async with UploadStore(tmp_path / "mount" / "uploads", sqlite_url) as store:
        await store.database.create_tables()
        found = (await findings(store))["disk"]
        assert (found.level, found.text.split(",")[0], "almost full" in found.text) == ("wrong", "tmpfs", True)
        mounted.remount("ro")
        found = (await findings(store))["disk"]
        assert (found.level, "read-only" in found.text) == ("wrong", True)
    mounted.remount("rw")
