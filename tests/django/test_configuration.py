"""Which directory, database and URL a storage has; migrations; commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.core.management import call_command
from django.db import models
from django.db.migrations.writer import MigrationWriter
from django.test import override_settings
from django.test.utils import setup_test_environment, teardown_test_environment

from selfheal import MissingExtra
from selfheal.django import SelfHealStorage, uploads
from selfheal.django.configuration import derived_url
from tests.django.conftest import storages_of
from tests.support import ROOT
from tests.support.postgres import PostgresServer

SQLITE, POSTGRESQL = "django.db.backends.sqlite3", "django.db.backends.postgresql"


def of(engine: str, **values: Any) -> dict[str, Any]:
    """Return `DATABASES` with one database."""
    return {"default": {"ENGINE": engine, **values}}


# -- the database -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("databases", "url"),
    [
        (of(SQLITE, NAME=Path("/srv/db.sqlite3")), "sqlite+aiosqlite:////srv/db-selfheal.sqlite3"),
        (of(SQLITE, NAME="/srv/shop.d/data"), "sqlite+aiosqlite:////srv/shop.d/data-selfheal"),
        (of(SQLITE, NAME=":memory:"), "sqlite+aiosqlite://"),
        (of(SQLITE, NAME="file:memorydb_default?mode=memory&cache=shared"), "sqlite+aiosqlite://"),
        (of(POSTGRESQL, NAME="shop"), "postgresql+asyncpg:///shop"),
        (
            of(POSTGRESQL, NAME="shop", USER="me", PASSWORD="p@ss/w", HOST="db.example", PORT="5433"),
            "postgresql+asyncpg://me:p%40ss%2Fw@db.example:5433/shop",
        ),
        (
            of(POSTGRESQL, NAME="shop", HOST="/run/postgresql", OPTIONS={"sslmode": "require", "pool": True}),
            "postgresql+asyncpg:///shop?host=%2Frun%2Fpostgresql&sslmode=require",
        ),
    ],
)
def test_the_database_of_the_settings(databases: dict[str, Any], url: str) -> None:
    """Without a URL the database is Django's PostgreSQL, or a file beside Django's SQLite file."""
    assert derived_url(databases) == url


@pytest.mark.parametrize(
    "databases",
    [
        {},
        of("django.db.backends.mysql", NAME="shop"),
        of(POSTGRESQL, OPTIONS={"service": "shop"}),
        of(POSTGRESQL, NAME="shop", HOST="a,b"),
        of(POSTGRESQL, NAME="shop", OPTIONS={"assume_role": "owner"}),
        of(SQLITE, NAME=""),
    ],
)
def test_a_database_that_is_not_clear(databases: dict[str, Any]) -> None:
    """Settings from which no URL follows are refused, with what to set."""
    with pytest.raises(ImproperlyConfigured, match="SELFHEAL_DATABASE_URL"):
        derived_url(databases)


@pytest.mark.parametrize("socket", [False, True], ids=["TCP", "socket"])
def test_the_postgresql_of_django(
    site: Path,
    postgres: PostgresServer,
    postgres_database: str,
    postgres_url: str,
    directory: Path,
    socket: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The settings of Django's PostgreSQL are enough, over TCP and over a socket."""
    host = postgres.sql("SHOW unix_socket_directories").strip() if socket else "127.0.0.1"
    database = {"NAME": postgres_database, "USER": "postgres", "HOST": host, "PORT": postgres.port}
    monkeypatch.setattr(settings, "DATABASES", of(POSTGRESQL, **database))
    with storages_of(directory=directory):
        uploads().sync.database.create_tables()
        default_storage.save("tom.jpg", ContentFile(b"old"))
        assert uploads().sync.database.count() == 1
    assert postgres.sql("SELECT name FROM image_storage", postgres_database).strip() == "tom.jpg"


def test_the_environment_wins(site: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, sqlite_url: str) -> None:
    """`SELFHEAL_DATABASE_URL` comes before the settings, and the option of the storage before both."""
    monkeypatch.setenv("SELFHEAL_DATABASE_URL", sqlite_url)
    assert str(SelfHealStorage(directory).uploads.database.url) == sqlite_url
    other = sqlite_url.replace("catalogue", "other")
    assert str(SelfHealStorage(directory, other).uploads.database.url) == other


@pytest.fixture
def test_run() -> Iterator[None]:
    """Django as it is while it runs the tests of an app."""
    setup_test_environment()
    yield
    teardown_test_environment()


@pytest.mark.usefixtures("site", "test_run")
def test_tests_of_an_app(tmp_path: Path) -> None:
    """In a test run storages work without a set-up, whatever is overridden, and leave Django's database alone."""
    for name in ("one", "two"):
        with override_settings(MEDIA_ROOT=tmp_path / name):
            assert default_storage.save("tom.jpg", ContentFile(b"old")) == "tom.jpg"
            assert (tmp_path / name / "tom.jpg").read_bytes() == b"old"
            assert uploads().database.backend.is_in_memory(uploads().database.url)


@pytest.mark.usefixtures("site", "test_run")
def test_parallel_tests_of_an_app(tmp_path: Path) -> None:
    """`manage.py test --parallel` forks: each process has a database in memory, with its tables."""
    with override_settings(MEDIA_ROOT=tmp_path):
        default_storage.save("parent.jpg", ContentFile(b"old"))
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if default_storage.save("child.jpg", ContentFile(b"new")) == "child.jpg" else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert default_storage.exists("parent.jpg")


@pytest.mark.usefixtures("claimed_tables")
def test_settings_that_tests_change(site: Path, tmp_path: Path) -> None:
    """A test may choose another directory over the same tables: the store of the settings before is closed."""
    for name in ("one", "two"):
        with override_settings(MEDIA_ROOT=tmp_path / name):
            default_storage.save(f"{name}.jpg", ContentFile(b"old"))
            default_storage.delete(f"{name}.jpg")


@pytest.fixture
def claimed_tables() -> None:
    """Stores of one process do not share tables; see tests/conftest.py."""


# -- one store ---------------------------------------------------------------------------------------------------------


def test_one_store_for_each_configuration(site: Path, directory: Path, sqlite_url: str) -> None:
    """Storages of the same options share a store, also if threads ask at once; others have their own."""
    options: dict[str, Any] = {"directory": directory, "database": sqlite_url, "exclude": ["*.tmp"]}
    with storages_of(**options):
        with ThreadPoolExecutor(8) as pool:
            stores = list(pool.map(lambda _: SelfHealStorage(**options).uploads, range(32)))
        assert {id(store) for store in stores} == {id(uploads())}
        assert SelfHealStorage(**options, table_prefix="a_").uploads is not uploads()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"directory": "/"}, "cannot be /"),
        ({"database": "mysql://x/y"}, "not supported"),
        ({"table_prefix": "A-"}, "table prefix"),
        ({"colour": "red"}, "colour"),
        ({"database": f"sqlite:///{ROOT}/media/a.db", "directory": ROOT / "media"}, "move it elsewhere"),
    ],
)
def test_options_that_cannot_be(site: Path, directory: Path, options: dict[str, Any], why: str) -> None:
    """An option that cannot be used is `ImproperlyConfigured`, and says why."""
    with pytest.raises(ImproperlyConfigured, match=why):
        SelfHealStorage(**{"directory": directory, **options}).uploads  # noqa: B018


def test_no_directory(site: Path) -> None:
    """Without `MEDIA_ROOT` there is no storage: the default would be the current directory."""
    with override_settings(MEDIA_ROOT=""), pytest.raises(ImproperlyConfigured, match="MEDIA_ROOT"):
        uploads()


def test_another_storage(site: Path) -> None:
    """`uploads()` says which setting is missing if the storage is another one."""
    other = {"default": {"BACKEND": "django.core.files.storage.FileSystemStorage"}}
    with override_settings(STORAGES=other), pytest.raises(ImproperlyConfigured, match="FileSystemStorage"):
        uploads()


def test_without_django() -> None:
    """Where Django is not installed, the error says what to install."""
    script = "import sys; sys.modules['django'] = None; import selfheal.django"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert f"{MissingExtra('django', 'django')}" in done.stderr


# -- migrations and commands -------------------------------------------------------------------------------------------


def choose_storage() -> SelfHealStorage:
    """Return a storage, as a callable of a field."""
    return SelfHealStorage(prefix="/private/")


@pytest.mark.parametrize("chosen", [SelfHealStorage("private", prefix="/p/", exclude=["*.tmp"]), choose_storage])
def test_a_field_in_a_migration(site: Path, chosen: Any) -> None:
    """A field with a storage, or with a function that makes one, is written into migrations, always the same."""
    field = models.FileField(storage=chosen)
    written, imports = MigrationWriter.serialize(field)
    scope: dict[str, Any] = {}
    exec("\n".join(imports), scope)
    again = eval(written, scope)
    assert MigrationWriter.serialize(again)[0] == written
    assert again.storage.base_url == field.storage.base_url


def test_no_new_migrations(site: Path) -> None:
    """`makemigrations` finds nothing to do, for the example and for selfheal."""
    call_command("makemigrations", check=True, dry_run=True, verbosity=0)


def manage(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `django-admin` with the settings of the example."""
    environ = {"GALLERY_HOME": str(home), "DJANGO_SETTINGS_MODULE": "examples.django_app.settings", **more}
    command = [sys.executable, "-W", "always", "-m", "django", *arguments]
    return subprocess.run(command, env=os.environ | environ, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_commands(tmp_path: Path) -> None:
    """`manage.py migrate` makes the tables, `manage.py selfheal` knows the store, and both end."""
    assert manage(tmp_path, "migrate").returncode == 0
    (tmp_path / "media" / "tom.jpg").write_bytes(b"old")
    migrated = manage(tmp_path, "selfheal", "migrate", "--json", "--quiet")
    assert (migrated.returncode, migrated.stderr) == (0, "")
    assert '"migrated": 1' in migrated.stdout
    (tmp_path / "media" / "tom.jpg").unlink()
    assert manage(tmp_path, "selfheal", "verify").returncode == 1
    assert manage(tmp_path, "selfheal", "restore").returncode == 0
    assert (tmp_path / "media" / "tom.jpg").read_bytes() == b"old"
    assert "verify" in manage(tmp_path, "selfheal", "--help").stdout
    assert manage(tmp_path, "selfheal", "verify", "--no-such-flag").returncode == 2


def test_commands_for_another_storage(tmp_path: Path) -> None:
    """`manage.py selfheal … --storage ALIAS` is for that storage; one line says what is wrong with an alias."""
    (tmp_path / "two.py").write_text(
        "from examples.django_app.settings import *\n"
        "private = {'directory': HOME / 'private', 'prefix': '/private/', 'table_prefix': 'private_'}\n"
        "STORAGES['private'] = {'BACKEND': 'selfheal.django.SelfHealStorage', 'OPTIONS': private}\n"
    )
    environ = {"DJANGO_SETTINGS_MODULE": "two", "PYTHONPATH": str(tmp_path)}
    assert manage(tmp_path, "migrate", **environ).returncode == 0
    (tmp_path / "private" / "cv.pdf").write_bytes(b"cv")
    migrated = manage(tmp_path, "selfheal", "migrate", "--storage", "private", "--json", **environ)
    assert '"migrated": 1' in migrated.stdout
    assert manage(tmp_path, "selfheal", "list", **environ).stdout == ""
    refused = manage(tmp_path, "selfheal", "verify", "--storage=none", **environ)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].endswith("error: Could not find config for 'none' in settings.STORAGES.")
