"""`--app MODULE:STORE`: a command uses the store that the app has."""

from __future__ import annotations

import re
import stat

import pytest

from tests.support.command_line import IMAGES, Site
from tests.support.disk_files import contents_below
from tests.support.files import noise, snapshot_of, write_file

MODULE = """
print("importing")
from selfheal import UploadPolicy, UploadStore
from sqlalchemy.ext.asyncio import create_async_engine

options = dict(
    quarantine={quarantine!r}, file_mode=0o640, directory_mode=0o2750, require_marker=True, exclude=["*.tmp"],
    policy=UploadPolicy(max_bytes=100), settled_after=0,
)
uploads = UploadStore({directory!r}, {database!r}, **options)
number = 5

class Settings:
    store = uploads

def make():
    return UploadStore({directory!r}, create_async_engine({database!r}), **options)

def make_with_argument(argument):
    return uploads

def fail():
    raise KeyError("SECRET_KEY")

async def make_later():
    return uploads
"""


@pytest.fixture
def app_site(full_site: Site) -> Site:
    """A site whose app has a store with options of its own."""
    package = full_site.home / "shop"
    values = {"quarantine": str(full_site.home / "bad copies"), "directory": str(full_site.directory)}
    write_file(package / "uploads.py", MODULE.format(**values, database=full_site.database).encode())
    write_file(package / "broken.py", b"import no_such_module_at_all")
    write_file(package / "failing.py", b"raise RuntimeError('no configuration')")
    write_file(package / "leaving.py", b"import sys; sys.exit(3)")
    write_file(package / "wrong.py", b"def (")
    (full_site.directory / ".selfheal-marker").touch()
    return full_site


@pytest.mark.parametrize(
    "spec", ["shop.uploads:uploads", "shop.uploads:make", "shop.uploads:Settings.store", "shop.uploads"]
)
def test_the_store_of_the_app(app_site: Site, spec: str) -> None:
    """Its directory, database, modes, quarantine, marker and exclusions are used, without flags or variables."""
    (app_site.directory / "cats/tom.jpg").unlink()
    (app_site.directory / "cats").rmdir()
    write_file(app_site.directory / "a.png", noise(5000, "bad"))
    write_file(app_site.directory / "new.tmp", b"excluded")
    wrong = {"SELFHEAL_DIRECTORY": "/nowhere", "SELFHEAL_DATABASE_URL": "sqlite:///nowhere.db"}
    done = app_site.run_without_flags("restore", "--verify", "--json", "--app", spec, env=wrong)
    assert (done.code, done.json["counts"]) == (0, {"ok": 2, "restored": 2})
    assert "importing" in done.err
    assert stat.S_IMODE((app_site.directory / "cats/tom.jpg").stat().st_mode) == 0o640
    assert stat.S_IMODE((app_site.directory / "cats").stat().st_mode) == 0o2750
    done = app_site.run_without_flags("migrate", "--json", "--app", spec)
    assert (done.code, done.json["counts"], done.json["skipped"]) == (0, {"ok": 4}, 1)
    assert app_site.run_without_flags("list", "--app", spec).out.count("\n") == len(IMAGES)
    (app_site.directory / ".selfheal-marker").unlink()
    (app_site.directory / "a.png").unlink()
    done = app_site.run_without_flags("restore", "--json", "--app", spec)
    assert (done.code, done.json["counts"]) == (1, {"ok": 3, "failed": 1})


def test_every_command_takes_it(app_site: Site) -> None:
    """Single names and the history too."""
    app = ("--app", "shop.uploads:uploads")
    for arguments in (("save", "x.png", "-"), ("history", "x.png"), ("delete", "x.png"), ("undo", "x.png"), ("purge",)):
        done = app_site.run_without_flags(*arguments, *app, stdin=b"x")
        assert done.code == 0, done
    assert contents_below(app_site.directory)["x.png"] == b"x"


def test_flags_that_agree(app_site: Site) -> None:
    """A flag that says the same as the store, also in another way, is no error."""
    same = ("--directory", "app/../app/static/uploads", "--database", app_site.database.replace("+aiosqlite", ""))
    assert app_site.run_without_flags("verify", "--app", "shop.uploads:uploads", *same).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--app shop.uploads:uploads --directory elsewhere", "--directory is 'elsewhere', but"),
        ("--app shop.uploads:uploads --database sqlite:///other.db", "--database is another one than"),
        ("--app shop.uploads:nothing", "cannot be imported"),
        ("--app shop.nothing:uploads", "cannot be imported"),
        ("--app shop.broken:uploads", "no_such_module_at_all"),
        ("--app shop.failing:uploads", "RuntimeError: no configuration"),
        ("--app shop.leaving:uploads", "SystemExit: 3"),
        ("--app shop.wrong:uploads", "SyntaxError"),
        ("--app shop.uploads:number", "is of type int; name an UploadStore"),
        ("--app shop.uploads:fail", "makes no store: KeyError"),
        ("--app shop.uploads:make_later", "is of type coroutine; name an UploadStore"),
        ("--app shop.uploads:make_with_argument", "makes no store: TypeError"),
        ("--app :uploads", "names no store"),
        ("--app shop/uploads.py", "names no store"),
    ],
)
def test_what_is_no_store(app_site: Site, arguments: str, message: str) -> None:
    """What cannot be imported, is no store, or contradicts a flag is one line and exit 2; nothing is changed."""
    before = snapshot_of(app_site.directory)
    for command in ("migrate", "verify", "restore", "list"):
        done = app_site.run_without_flags(command, *arguments.split(), env={"PYTHONDONTWRITEBYTECODE": "1"})
        assert (done.code, done.out) == (2, "")
        assert message in re.sub(r"^importing\n", "", done.err), done.err
        assert done.err.count("\n") <= 2
    assert snapshot_of(app_site.directory) == before


def test_a_directory_that_cannot_be_one(app_site: Site) -> None:
    """The store of an app is checked as settings are."""
    write_file(
        app_site.home / "bad.py", b"from selfheal import UploadStore\nuploads = UploadStore('/', 'postgres://h/db')\n"
    )
    assert "cannot be /" in app_site.run_without_flags("migrate", "--app", "bad:uploads").error_line
