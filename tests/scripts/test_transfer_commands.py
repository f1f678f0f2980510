"""`selfheal import` and `selfheal export`: JSON, exit codes, what people see, and runs that are killed."""

from __future__ import annotations

import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.command_line import IMAGES, SECONDS, Site
from tests.support.disk_files import contents_below
from tests.support.files import noise, snapshot_of, write_file
from tests.support.waiting import wait_until

SIZE = sum(map(len, IMAGES.values()))
OTHERS = {"../x.png": noise(30), "good/a.png": noise(40)}
TABLE = ("--table", "image_storage", "--name", "filename", "--data", "image_data", "--type", "mimetype")


@pytest.fixture
def others_site(site: Site) -> Site:
    """A site in whose database another app has a table `image_storage`."""
    with closing(sqlite3.connect(site.home / "catalogue.db")) as connection:
        connection.execute("CREATE TABLE image_storage (id INTEGER PRIMARY KEY, filename, image_data BLOB, mimetype)")
        for name, data in OTHERS.items():
            row = (name, data, "image/png")
            connection.execute("INSERT INTO image_storage (filename, image_data, mimetype) VALUES (?, ?, ?)", row)
        connection.commit()
    return site


def test_from_sqlite_to_postgresql_and_back(full_site: Site, tmp_path: Path, postgres_url: str) -> None:
    """A copy to PostgreSQL and back restores every byte; each command prints one object."""
    flags = ["--directory", str(full_site.directory), "--database", postgres_url.replace("+asyncpg", "")]
    back = ["--directory", str(full_site.directory), "--database", f"sqlite:///{tmp_path}/back.db"]
    everything = {"command": "import", "ok": True, "examined": 4, "skipped": 0, "bytes": SIZE, "problems": []}
    done = full_site.run_without_flags("import", *flags, "--from", full_site.database, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json | {"seconds": 0} == everything | {"counts": {"migrated": 4}, "seconds": 0}
    done = full_site.run_without_flags("import", *back, "--from", flags[3], "--dry-run", "--json")
    assert (done.code, done.json["counts"], done.json["dry_run"]) == (0, {"migrated": 4}, True)
    assert not (tmp_path / "back.db").exists()
    done = full_site.run_without_flags("import", *back, "--from", flags[3], "--json")
    assert (done.code, done.json["counts"]) == (0, {"migrated": 4})
    shutil.rmtree(full_site.directory)
    assert full_site.run_without_flags("restore", *back).code == 0
    assert contents_below(full_site.directory) == IMAGES
    again = full_site.run_without_flags("import", *back, "--from", flags[3])
    assert (again.code, again.err) == (0, "")
    assert again.out.startswith("import: 4 already imported · ")


def test_the_way_from_a_table_of_ones_own(others_site: Site) -> None:
    """`migrate` names the solutions; import with a table prefix copies the rows and reports each changed name."""
    others_site.directory.mkdir(parents=True)
    for command in (["migrate"], ["migrate", "--dry-run"], ["import", *TABLE]):
        refused = others_site.run(*command)
        assert refused.code == 2
        for way in ("--table-prefix", "--schema", "selfheal import --table image_storage", "filename, image_data"):
            assert way in refused.error_line
    prefix = ("--table-prefix", "ours_")
    mapped = [{"name": "x.png", "outcome": "migrated", "detail": "it was '../x.png'"}]
    done = others_site.run("import", *prefix, *TABLE, "--json")
    assert (done.code, done.json["counts"], done.json["mapped"]) == (0, {"migrated": 2}, mapped)
    done = others_site.run("import", *prefix, *TABLE, "--where", "filename LIKE '..%'")
    assert (done.code, done.err) == (0, "mapped: x.png: it was '../x.png'\n")
    assert done.out.startswith("import: 1 already imported · ")
    assert others_site.run("import", *prefix, *TABLE, "--quiet").err == ""
    assert others_site.run("restore", *prefix).code == 0
    assert contents_below(others_site.directory) == {"x.png": OTHERS["../x.png"], "good/a.png": OTHERS["good/a.png"]}


@pytest.mark.parametrize("place", ["out", "out.tar"])
def test_out_and_in(full_site: Site, tmp_path: Path, place: str) -> None:
    """An export is complete and can be imported; a directory has the files as they are."""
    before = snapshot_of(full_site.directory)
    done = full_site.run("export", place, "--dry-run", "--json")
    assert (done.code, done.json["counts"], done.json["dry_run"]) == (0, {"restored": 4}, True)
    assert not (tmp_path / place).exists()
    done = full_site.run("export", place, "--json")
    assert (done.code, done.err, done.json["command"], done.json["bytes"]) == (0, "", "export", SIZE)
    assert done.json["counts"] == {"restored": 4}
    assert snapshot_of(full_site.directory) == before
    if place == "out":
        files = contents_below(tmp_path / place)
        assert {name: data for name, data in files.items() if not name.startswith(".selfheal-export/")} == IMAGES
    new = ["--directory", str(tmp_path / "new"), "--database", f"sqlite:///{tmp_path}/new.db"]
    done = full_site.run_without_flags("import", *new, place, "--json")
    assert (done.code, done.json["counts"]) == (0, {"migrated": 4})
    assert full_site.run_without_flags("restore", *new).code == 0
    assert contents_below(tmp_path / "new") == IMAGES


def test_problems(full_site: Site, tmp_path: Path) -> None:
    """A name that differs is one line on standard error, and exit 1."""
    write_file(tmp_path / "plain" / "a.png", b"other bytes")
    done = full_site.run("import", "plain")
    assert done.code == 1
    assert done.err.startswith("differs: a.png: the database has other bytes (generation 1) and keeps them; ")
    done = full_site.run("history", "a.png")
    assert "set aside (imported; the name had other bytes): 11 bytes" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("import", "name one source"),
        ("import out --from sqlite:///x.db", "name one source"),
        ("import out --table t --name n --data d", "two sources"),
        ("import --table t --name n", "needs --name and --data"),
        ("import --from sqlite:///x.db --where 1=1", "belong to --table"),
        ("import --table t --name n --data d --from-table-prefix x_", "belongs to --from"),
        ("import out --from-table-prefix x_", "belong to --from URL"),
        ("import out --from-schema x", "belong to --from URL"),
        ("import nowhere", "no directory or tar file"),
        ("import .", "it would be an upload"),
        ("import --from {database}", "is the database that is imported into"),
        ("import --from gibberish", "cannot be read"),
        ("import --table nothing --name n --data d", "no table nothing"),
        ("export", "Missing argument 'DIR|FILE.tar'"),
        ("export .", "is not empty, and is no export"),
        ("export nowhere/out.tar", "no directory"),
    ],
)
def test_bad_usage(full_site: Site, arguments: str, message: str) -> None:
    """Bad usage is one line and exit 2, and changes nothing."""
    before = snapshot_of(full_site.directory)
    done = full_site.run(*arguments.format(database=full_site.database).split())
    assert (done.code, done.out) == (2, "")
    assert message in done.error_line
    assert snapshot_of(full_site.directory) == before


def test_a_source_without_tables(full_site: Site, postgres_url: str) -> None:
    """A database without tables of selfheal is no source: one line that says so, exit 2, and nothing is made there."""
    with closing(sqlite3.connect(full_site.home / "other.db")) as connection:
        connection.execute("CREATE TABLE other (id INTEGER)")
    before = (full_site.home / "other.db").read_bytes()
    for url in (f"sqlite:///{full_site.home}/other.db", postgres_url, f"{full_site.database} --from-table-prefix x_"):
        for more in ([], ["--dry-run"]):
            done = full_site.run("import", "--from", *url.split(), *more)
            assert (done.code, done.out) == (2, "")
            assert "has no tables of selfheal" in done.error_line
            assert "migrate" not in done.error_line
    assert (full_site.home / "other.db").read_bytes() == before


def test_a_source_that_is_not_there(full_site: Site, dead_port: int) -> None:
    """A source that gives no answer is exit 3, and no file is made for it."""
    for url in ("sqlite:///none.db", f"postgres://someone@127.0.0.1:{dead_port}/none"):
        for more in ((), TABLE):
            done = full_site.run("import", "--from", url, *more)
            assert (done.code, done.out) == (3, "")
            assert done.error_line
    assert not (full_site.home / "none.db").exists()


# -- runs that are killed ---------------------------------------------------------------------------------------------

CROWD = {f"{index % 10}/{index}.png": noise(40 + index, index) for index in range(150)}


@pytest.fixture
def crowded_site(site: Site) -> Site:
    """A site with many uploads, and a table of another app with the same."""
    for name, data in CROWD.items():
        write_file(site.directory / name, data)
    assert site.run("migrate").code == 0
    with closing(sqlite3.connect(site.home / "theirs.db")) as connection:
        connection.execute("CREATE TABLE image_storage (filename TEXT PRIMARY KEY, image_data BLOB, mimetype TEXT)")
        connection.executemany("INSERT INTO image_storage VALUES (?, ?, NULL)", CROWD.items())
        connection.commit()
    return site


SOURCES = {
    "database": ("--from", "{site.database}"),
    "table": ("--from", "sqlite:///{site.home}/theirs.db", *TABLE),
    "directory": ("{site.directory}",),
}


@pytest.mark.parametrize("source", SOURCES)
def test_an_import_that_is_killed(crowded_site: Site, tmp_path: Path, source: str) -> None:
    """After SIGKILL the next run goes on; every byte arrives, and no bytes are left that nothing refers to."""
    site = Site(tmp_path, tmp_path / "new", f"sqlite:///{tmp_path}/new.db", crowded_site.fork_server)
    arguments = [one.format(site=crowded_site) for one in SOURCES[source]]
    for after in (10, 50):
        with site.start(None, "import", *site.flags, *arguments, "--json") as process:
            wait_until(lambda: process.poll() is not None or site.count_records() > after, SECONDS, step=0.002)  # noqa: B023
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=SECONDS)
    assert 10 < site.count_records() < len(CROWD)
    done = site.run("import", *arguments, "--json")
    assert (done.code, done.json["examined"]) == (0, len(CROWD))
    assert set(done.json["counts"]) == {"migrated", "ok"}
    assert site.run("import", *arguments, "--json").json["counts"] == {"ok": len(CROWD)}
    assert site.run("restore").code == 0
    assert contents_below(site.directory) == CROWD


def test_an_export_that_is_killed(crowded_site: Site, tmp_path: Path) -> None:
    """After SIGKILL an export cannot be imported; the next run goes on and completes it."""
    out = tmp_path / "out"
    with crowded_site.start(None, "export", *crowded_site.flags, str(out)) as process:
        wait_until(lambda: process.poll() is not None or len(list(out.glob("*/*.png"))) > 20, SECONDS, step=0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=SECONDS)
    new = ["--directory", str(tmp_path / "new"), "--database", f"sqlite:///{tmp_path}/new.db"]
    done = crowded_site.run_without_flags("import", *new, "out")
    assert (done.code, "not finished" in done.error_line) == (2, True)
    done = crowded_site.run("export", "out", "--json")
    assert (done.code, set(done.json["counts"])) == (0, {"ok", "restored"})
    assert crowded_site.run_without_flags("import", *new, "out", "--json").json["counts"] == {"migrated": len(CROWD)}
    files = contents_below(out)
    assert {name for name in files if not name.startswith(".selfheal-export/")} == set(CROWD)
