"""Errors about tables name the database that was asked, without its password, and what chose it."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing

import pytest

from selfheal import Settings
from selfheal.scripts.options import settings_of
from selfheal.scripts.serve import export, make_app
from tests.support.command_line import PASSWORD, Site
from tests.support.files import write_file
from tests.support.uploads import get

COMMANDS = ("verify", "list")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("chosen_by", ["--database", "SELFHEAL_DATABASE_URL", "DATABASE_URL", "the default"])
@pytest.mark.parametrize("has_file", [True, False])
def test_missing_tables_name_the_database(site: Site, command: str, chosen_by: str, has_file: bool) -> None:
    """Without tables, or without the SQLite file, the line names the file, and the flag or variable that chose it."""
    file = site.home / ("selfheal.db" if chosen_by == "the default" else "other.db")
    if has_file:
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("CREATE TABLE t (x)")
    url = f"sqlite:///{file.name}"
    flags = ["--database", url] if chosen_by == "--database" else []
    env = {chosen_by: url} if chosen_by.endswith("URL") else {}
    done = site.run_without_flags(*command.split(), *flags, env=env)
    assert done.code == 3
    assert f"{file}, set by {chosen_by}" in done.error_line
    assert "`selfheal migrate`" in done.err


def test_missing_tables_of_a_server(site: Site, postgres_url: str) -> None:
    """The name of a server's database is there, with its user and without its password."""
    url = postgres_url.replace("@", f":{PASSWORD}@") + f"?sslmode=disable&sslpassword={PASSWORD}"
    done = site.run_without_flags("list", env={"DATABASE_URL": url})
    assert done.code == 3
    address = postgres_url.partition("@")[2]
    assert f"the database is postgresql://postgres:***@{address}, set by DATABASE_URL" in done.error_line


def test_an_app_that_chose_the_database(site: Site) -> None:
    """With --app the file is named; nothing but the app's own code chose it."""
    code = f"from selfheal import UploadStore\nuploads = UploadStore({str(site.directory)!r}, 'sqlite:///its.db')\n"
    (site.home / "shop.py").write_text(code)
    sqlite3.connect(site.home / "its.db").close()
    done = site.run_without_flags("list", "--app", "shop")
    assert done.code == 3
    assert f"(the database is {site.home}/its.db)" in done.error_line


@pytest.mark.parametrize("made", ["VIEW image_storage AS SELECT 1", "TABLE image_schema (version, x NOT NULL)"])
def test_migrate_never_says_run_migrate(site: Site, made: str) -> None:
    """If the tables cannot be made, `migrate` says why and where, and not to run `migrate`."""
    write_file(site.directory / "a.png", b"a")
    with closing(sqlite3.connect(site.database.partition("///")[2])) as connection:
        connection.execute(f"CREATE {made}")
    done = site.run("migrate")
    assert done.code in (2, 3)
    assert "set by --database" in done.error_line
    assert "selfheal migrate" not in done.err


async def test_a_server_names_the_database(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The one critical line of a worker without tables names the database, and the flag of `serve` that chose it."""
    sqlite3.connect(site.home / "blank.db").close()
    settings = settings_of(database=f"sqlite:///{site.home}/blank.db", directory=str(site.directory))
    monkeypatch.setattr("os.environ", dict(os.environ))
    monkeypatch.setattr(Settings.from_env.__func__, "__defaults__", (os.environ,))  # type: ignore[attr-defined]
    export(settings, None)
    app = make_app()
    assert (await get(app, "a.png")).status_code == 503
    await app.store.close()
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "CRITICAL"]
    assert f"(the database is {site.home}/blank.db, set by --database)" in line
