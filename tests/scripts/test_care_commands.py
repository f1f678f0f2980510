"""`selfheal stats`, and the space that `purge` gives back."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from selfheal.content.sources import CHUNK
from selfheal.scripts.summary import human_size
from tests.support.command_line import IMAGES, PASSWORD, Site
from tests.support.files import noise, snapshot_of, write_file

BIG = 20 * CHUNK


def database_file(site: Site) -> Path:
    """Return the path of a site's SQLite file."""
    return Path(site.database.partition("///")[2])


def age_all(site: Site) -> None:
    """Make history, blobs and chunks older than a purge keeps them."""
    with closing(sqlite3.connect(database_file(site))) as connection, connection:
        for table, column in (("history", "replaced_at"), ("blob", "stored_at"), ("chunk", "stored_at")):
            connection.execute(f"UPDATE image_{table} SET {column} = '2020-01-01 00:00:00'")


def test_stats(full_site: Site) -> None:
    """stats counts both sides; `purge` then drops what stats said, and the file gets smaller by that."""
    full_site.run("save", "b.png", str(full_site.directory / "a.png"))
    full_site.run("save", "big.png", "-", stdin=noise(BIG))
    full_site.run("delete", "big.png")
    write_file(full_site.directory / "Thumbs.db", b"litter")
    write_file(full_site.directory / "only on disk.png", b"1234567")
    age_all(full_site)
    bytes_of_all = sum(map(len, IMAGES.values())) + len(IMAGES["a.png"])
    found = full_site.run("stats", "--json").json
    assert (found["command"], found["ok"]) == ("stats", True)
    assert found["disk"] == {"files": 6, "bytes": bytes_of_all + 7}
    database = found["database"]
    assert (database["names"], database["size"], database["deleted"]) == (5, bytes_of_all, 1)
    assert (database["saved"], database["stored"]) == (len(IMAGES["a.png"]), bytes_of_all - len(IMAGES["a.png"]) + BIG)
    assert (database["purgeable"], database["purgeable_size"]) == (1, BIG)
    assert full_site.run("stats", "--keep-days", "36500", "--json").json["database"]["purgeable"] == 0
    lines = dict(line.split(maxsplit=1) for line in full_site.run("stats").out.splitlines())
    assert lines["disk"] == f"6 files, {human_size(bytes_of_all + 7)} ({full_site.directory})"
    assert str(database_file(full_site)) in lines["database"]
    assert lines["purge"] == "would drop 1 version and free 5.2 MB"

    before = os.stat(database_file(full_site)).st_size
    purged = full_site.run("purge", "--json").json
    assert (purged["versions"], purged["blobs"], purged["bytes"]) == (1, 1, BIG)
    assert purged["freed"] == before - os.stat(database_file(full_site)).st_size >= BIG


def test_purge_with_vacuum(site: Site) -> None:
    """`purge --vacuum` makes a file small that the app had made; a dry run does not; in words it says by how much."""
    with closing(sqlite3.connect(database_file(site))) as connection:
        connection.execute("CREATE TABLE app_cat (id INTEGER)")
    write_file(site.directory / "big.png", noise(BIG))
    assert site.run("migrate").code == 0
    site.run("delete", "big.png")
    age_all(site)
    assert site.run("purge", "--json").json["freed"] == 0
    before = os.stat(database_file(site)).st_size
    assert site.run("purge", "--vacuum", "--dry-run", "--json").json["freed"] == 0
    assert os.stat(database_file(site)).st_size == before
    assert "; the database is 5." in site.run("purge", "--vacuum").out
    assert os.stat(database_file(site)).st_size <= before - BIG
    assert site.run("verify").code == 0


def test_a_password_with_special_characters(site: Site, postgres_url: str) -> None:
    """The commands, and the processes that they start, take a password as it is, and never show it."""
    write_file(site.directory / "a.png", b"a")
    url = postgres_url.replace("@", f":{PASSWORD}:/# %?@@", 1)
    env = {"DATABASE_URL": url, "SELFHEAL_DIRECTORY": str(site.directory)}
    for command in ("migrate", "verify", "restore", "stats", "doctor"):
        done = site.run_without_flags(command, env=env)
        assert (done.code, done.err) == (0, "")


def test_vacuum_of_a_locked_file(full_site: Site) -> None:
    """While another program writes, `--vacuum` does not harm it: it waits, and then works."""
    with closing(sqlite3.connect(database_file(full_site), isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        process = full_site.start(None, "purge", "--vacuum", *full_site.flags, "--json")
        time.sleep(1.5)
        assert process.poll() is None
        connection.execute("COMMIT")
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, ""), out


def test_stats_of_a_server(site: Site, postgres_url: str) -> None:
    """stats works over PostgreSQL, and shows no password; --vacuum is refused there before anything is dropped."""
    url = postgres_url.replace("@", f":{PASSWORD}@")
    write_file(site.directory / "a.png", b"a" * 100)
    flags = ["--directory", str(site.directory), "--database", url]
    assert site.run_without_flags("migrate", *flags).code == 0
    done = site.run_without_flags("stats", *flags)
    assert (done.code, done.err) == (0, "")
    assert "1 name, 100 bytes (postgresql://postgres:***@" in done.out
    assert site.run_without_flags("delete", "a.png", *flags).code == 0
    for more in ("--keep-days", "0"), ("--dry-run",):
        done = site.run_without_flags("purge", "--vacuum", *more, *flags)
        assert (done.code, done.out) == (2, "")
        assert "only SQLite" in done.error_line
    assert site.run_without_flags("history", "a.png", *flags, "--json").json["versions"]


@pytest.mark.parametrize("command", ["stats", "doctor"])
def test_nothing_is_changed(full_site: Site, command: str) -> None:
    """stats and doctor change neither side."""
    before = snapshot_of(full_site.home)
    assert full_site.run(command).code == 0
    assert snapshot_of(full_site.home) == before
