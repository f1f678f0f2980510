"""Settings: the environment, database URLs, and one clear line for every bad value."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from selfheal import Settings, SettingsError, UploadStore
from selfheal.settings import check_prefix
from selfheal.sql.backends import backend_of, database_url
from tests.support.postgres import PostgresServer

VARIABLES = (
    *("SELFHEAL_DIRECTORY", "SELFHEAL_DATABASE_URL", "DATABASE_URL", "SELFHEAL_PREFIX"),
    *("SELFHEAL_TABLE_PREFIX", "SELFHEAL_SCHEMA", "SELFHEAL_POOL_SIZE", "SELFHEAL_SETTLED_AFTER"),
    "SELFHEAL_SWEEP_EVERY",
)
LIBPQ = {
    "nothing": "",
    "no TLS": "?sslmode=disable",
    "TLS if possible": "?sslmode=prefer&channel_binding=prefer",
    "asyncpg's parameter": "?ssl=disable",
    "a timeout": "?connect_timeout=10",
    "a name": "?application_name=shop&fallback_application_name=x",
    "options": "?options=-c%20statement_timeout%3D9000",
    "certificates": "?sslmode=disable&sslrootcert=/nowhere.pem&sslcert=&sslkey=",
    "Kerberos": "?gssencmode=disable",
    "keepalives": "?keepalives=1&keepalives_idle=30&tcp_user_timeout=9000",
    "which server": "?target_session_attrs=any",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, empty, in an environment without selfheal's variables."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


# -- database URLs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("postgres://u:p@h:5432/db", "postgresql+asyncpg"),
        ("postgresql://u:p@h:5432/db", "postgresql+asyncpg"),
        ("postgresql+asyncpg://u:p@h:5432/db", "postgresql+asyncpg"),
        ("postgresql+psycopg://u:p@h:5432/db", "postgresql+asyncpg"),
        ("postgresql+psycopg2://u:p@h:5432/db", "postgresql+asyncpg"),
        ("sqlite:///app.db", "sqlite+aiosqlite"),
        ("sqlite+aiosqlite:///app.db", "sqlite+aiosqlite"),
        ("sqlite://", "sqlite+aiosqlite"),
    ],
)
def test_urls_of_hosting_services(url: str, driver: str) -> None:
    """Every way to write the URL of a supported database gives its asynchronous driver; the rest is kept."""
    understood, given = database_url(url), make_url(url)
    assert understood.drivername == driver
    assert understood.set(drivername=given.drivername) == given


def test_credentials_are_kept() -> None:
    """User, password with reserved characters, host, port and database are kept."""
    url = database_url("postgres://me%40shop:p%40ss%2F%3Aw@db.example:6543/shop?sslmode=require")
    assert (url.username, url.password, url.host, url.port, url.database) == (
        "me@shop",
        "p@ss/:w",
        "db.example",
        6543,
        "shop",
    )


@pytest.mark.parametrize("mode", ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"])
def test_sslmode(mode: str) -> None:
    """libpq's `sslmode` becomes asyncpg's `ssl`, with the same value."""
    url = database_url(f"postgres://u@h/db?sslmode={mode}&channel_binding=require")
    assert url.query["ssl"] == mode
    assert not {"sslmode", "channel_binding"} & set(url.query)


@pytest.mark.parametrize("query", LIBPQ.values(), ids=LIBPQ.keys())
async def test_parameters_of_libpq(query: str, postgres: PostgresServer, postgres_url: str, directory: Path) -> None:
    """A `postgres://` URL with libpq's parameters, as hosting services give it, connects unchanged."""
    url = postgres_url.replace("postgresql+asyncpg://", "postgres://") + query
    async with UploadStore(directory, url) as store:
        await store.database.create_tables()
        assert await store.database.find("a.png") is None


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "app.db",
        "/srv/app.db",
        "postgres//u:secret@h/db",
        "postgres://u:secret@h:port/db",
        "postgres://u:secret@[::1/db",
        "mssql+pyodbc://u:secret@h/db",
        "oracle://u:secret@h/db",
        "mongodb://u:secret@h/db",
        "mysql://u:secret@h/db",
        "mariadb://u:secret@h/db",
        "http://u:secret@h/db",
    ],
)
def test_urls_that_cannot_be_used(url: str) -> None:
    """A URL that is malformed or of another database raises one line without the password."""
    with pytest.raises(SettingsError) as caught:
        database_url(url)
    message = str(caught.value)
    assert "sqlite+aiosqlite" in message
    assert "\n" not in message
    assert "secret" not in message
    with pytest.raises(SettingsError):
        Settings(database=url)


@pytest.mark.parametrize(
    ("url", "memory"),
    [
        ("sqlite+aiosqlite://", True),
        ("sqlite+aiosqlite:///", True),
        ("sqlite+aiosqlite:///:memory:", True),
        ("sqlite+aiosqlite:///file::memory:?cache=shared&uri=true", True),
        ("sqlite+aiosqlite:///file:shared?mode=memory&cache=shared&uri=true", True),
        ("sqlite+aiosqlite:///app.db", False),
        ("sqlite+aiosqlite:///file:app.db?mode=rwc&uri=true", False),
        ("postgresql+asyncpg://h/memory", False),
    ],
)
def test_databases_in_memory(url: str, memory: bool) -> None:
    """A database in the memory of one process is distinguished from one that processes can share."""
    assert backend_of(make_url(url)).is_in_memory(make_url(url)) == memory


DECODED = pytest.mark.skipif(make_url("x:///%3F").database != "?", reason="SQLAlchemy before 2.1 does not decode it")


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("sqlite+aiosqlite:///app.db", "app.db"),
        ("sqlite+aiosqlite:///data/app.db?timeout=3", "data/app.db"),
        ("sqlite+aiosqlite:////srv/app.db", "/srv/app.db"),
        ("sqlite+aiosqlite:///file:app.db?mode=rwc&uri=true", "app.db"),
        ("sqlite+aiosqlite:///file:/srv/app.db?uri=true", "/srv/app.db"),
        pytest.param("sqlite+aiosqlite:///file:/srv/app.db%3Fmode=rwc", "/srv/app.db", marks=DECODED),
        ("sqlite+aiosqlite://", None),
        ("sqlite+aiosqlite:///:memory:", None),
        ("postgresql+asyncpg://h/app.db", None),
    ],
)
def test_the_file_of_a_database(url: str, file: str | None, here: Path) -> None:
    """The file of a SQLite URL is an absolute path, however it is written; other databases have none."""
    assert backend_of(make_url(url)).file(make_url(url)) == (None if file is None else here / file)


# -- the environment --------------------------------------------------------------------------------------------------


def test_an_empty_environment(here: Path) -> None:
    """Without variables the defaults hold, and the directory is absolute."""
    settings = Settings.from_env()
    assert settings == Settings()
    assert settings.directory == here / "app/static/uploads"
    assert settings.database == "sqlite+aiosqlite:///selfheal.db"
    assert settings.prefix == "/static/uploads"
    assert settings.settled_after == 3.0


def test_a_full_environment(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All settings come from the environment at the time of the call; a store has them too."""
    monkeypatch.setenv("SELFHEAL_DIRECTORY", "files")
    monkeypatch.setenv("SELFHEAL_DATABASE_URL", "postgres://h/db")
    monkeypatch.setenv("SELFHEAL_PREFIX", "/media")
    monkeypatch.setenv("SELFHEAL_TABLE_PREFIX", "shop_")
    monkeypatch.setenv("SELFHEAL_SCHEMA", "web")
    monkeypatch.setenv("SELFHEAL_SETTLED_AFTER", "0")
    monkeypatch.setenv("SELFHEAL_SWEEP_EVERY", "0")
    expected = Settings(here / "files", "postgres://h/db", "/media", "shop_", "web", settled_after=0, sweep_every=0)
    assert Settings.from_env() == expected
    assert UploadStore.from_env().settled_after == 0.0
    monkeypatch.setenv("DATABASE_URL", "sqlite:///app.db")
    monkeypatch.delenv("SELFHEAL_DATABASE_URL")
    with pytest.raises(SettingsError, match="SQLite has no schema"):
        Settings.from_env()


@pytest.mark.parametrize(
    ("environ", "database"),
    [
        ({"DATABASE_URL": "postgres://h/shared"}, "postgres://h/shared"),
        ({"SELFHEAL_DATABASE_URL": "postgres://h/own", "DATABASE_URL": "postgres://h/shared"}, "postgres://h/own"),
        ({"SELFHEAL_DATABASE_URL": "", "DATABASE_URL": "postgres://h/shared"}, "postgres://h/shared"),
        ({"SELFHEAL_DATABASE_URL": "", "DATABASE_URL": ""}, "sqlite+aiosqlite:///selfheal.db"),
    ],
)
def test_precedence_of_database_urls(environ: dict[str, str], database: str, here: Path) -> None:
    """`SELFHEAL_DATABASE_URL` has precedence over `DATABASE_URL`; an empty variable counts as not set."""
    assert Settings.from_env(environ).database == database


@pytest.mark.parametrize(
    "environ",
    [
        {"SELFHEAL_DIRECTORY": "/"},
        {"SELFHEAL_DATABASE_URL": "nonsense"},
        {"DATABASE_URL": "mssql://h/db"},
        {"SELFHEAL_PREFIX": "uploads"},
        {"SELFHEAL_TABLE_PREFIX": "Shop-"},
        {"SELFHEAL_SCHEMA": 'a"b'},
        *({"SELFHEAL_SETTLED_AFTER": seconds} for seconds in ("soon", "-1", "nan", "inf", "3601")),
        *({"SELFHEAL_SWEEP_EVERY": seconds} for seconds in ("soon", "-1", "nan", "inf", "0.5")),
    ],
)
def test_a_bad_variable(environ: dict[str, str], here: Path) -> None:
    """A bad value in the environment raises a `SettingsError` of one line."""
    with pytest.raises(SettingsError, match=r"\A.+\Z"):
        Settings.from_env(environ)


def test_a_flag_has_precedence(here: Path) -> None:
    """A flag replaces the value of the environment, is validated too, and changes nothing else."""
    settings = Settings.from_env({"SELFHEAL_DIRECTORY": "files", "DATABASE_URL": "postgres://h/db"})
    assert replace(settings, directory=Path("other")).directory == here / "other"
    assert replace(settings, directory=Path("other")).database == "postgres://h/db"
    assert replace(settings, database="postgres://h/else").database == "postgres://h/else"
    assert replace(settings, database="postgres://h/else").directory == here / "files"
    assert replace(settings, prefix="/media").prefix == "/media"
    for bad in ({"directory": "/"}, {"database": "nonsense"}, {"database": ""}, {"prefix": "media"}):
        with pytest.raises(SettingsError):
            replace(settings, **bad)  # type: ignore[arg-type]


# -- directory and prefix ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directory", ["/", "//", "///", "/.", "/tmp/..", "/../..", "link"])
def test_the_root_of_the_disk(directory: str, here: Path) -> None:
    """The root of the disk, however it is written or linked to, is refused as the uploads directory."""
    (here / "link").symlink_to("/")
    with pytest.raises(SettingsError, match="cannot be"):
        Settings(directory=Path(directory), database="postgres://h/db")


def test_a_file_as_directory(here: Path) -> None:
    """A file is refused as the directory; an existing or a missing directory is accepted."""
    (here / "file").write_bytes(b"x")
    (here / "there").mkdir()
    with pytest.raises(SettingsError, match="is not a directory"):
        Settings(directory=Path("file"))
    assert Settings(directory=Path("there")).directory == here / "there"
    assert Settings(directory=Path("not/yet")).directory == here / "not" / "yet"


@pytest.mark.parametrize(
    "database",
    [
        "sqlite:///uploads/app.db",
        "sqlite:///uploads/deep/app.db",
        "sqlite:///other/../uploads/app.db",
        "sqlite:///file:uploads/app.db?uri=true",
        "sqlite:///link/app.db",
        "sqlite:///link.db",
    ],
)
def test_a_database_that_would_be_served(database: str, here: Path) -> None:
    """A database file inside the uploads directory, also through a link, is refused."""
    (here / "uploads").mkdir()
    (here / "link").symlink_to(here / "uploads")
    (here / "link.db").symlink_to(here / "uploads" / "app.db")
    with pytest.raises(SettingsError, match="is in the directory that is served"):
        Settings(Path("uploads"), database)


@pytest.mark.parametrize(
    "database", ["sqlite:///uploads.db", "sqlite:///uploads_private/app.db", "sqlite://", "postgres://h/uploads/app.db"]
)
def test_a_database_beside_the_uploads(database: str, here: Path) -> None:
    """A database beside the uploads, in memory or on a server is accepted."""
    assert Settings(Path("uploads"), database).database == database


@pytest.mark.parametrize("prefix", ["/static/uploads", "/u", "/my files", "/bilder/größe", "/a.b-c_d~e"])
def test_good_prefixes(prefix: str, here: Path) -> None:
    """A decoded path is accepted as the prefix; a slash at its end makes no difference."""
    assert check_prefix(prefix) == check_prefix(f"{prefix}/") == prefix
    assert Settings(prefix=f"{prefix}/").prefix == Settings(prefix=prefix).prefix == prefix


@pytest.mark.parametrize("prefix", ["", "/", "static", "static/uploads", "/static//", "//static", "/a//b", "/a%20b"])
def test_bad_prefixes(prefix: str, here: Path) -> None:
    """A prefix that is empty, relative, encoded or has empty parts raises one line that shows it and the right form."""
    with pytest.raises(SettingsError, match="must be a decoded path like /static/uploads") as caught:
        check_prefix(prefix)
    assert repr(prefix) in str(caught.value)
    with pytest.raises(SettingsError):
        Settings(prefix=prefix)


def test_settings_are_values(here: Path) -> None:
    """Settings cannot be changed after they were validated."""
    settings = Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.prefix = "/"  # type: ignore[misc]
