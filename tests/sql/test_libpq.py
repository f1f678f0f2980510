"""Parameters of PostgreSQL URLs: each is honoured, harmless by name, or refused by name."""

from __future__ import annotations

import string
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy.engine import URL, make_url

from selfheal import ImageStorage, SettingsError, UploadStore
from selfheal.sql.backends import database_url, url_of
from tests.support.postgres import PostgresServer
from tests.support.raw_sql import sql
from tests.support.tables import TABLES


def with_query(url: str, query: str) -> str:
    """Return a URL as a hosting service gives it, with parameters."""
    return f"{url.replace('postgresql+asyncpg://', 'postgres://')}?{query}"


async def setting_of(url: str, name: str) -> str:
    """Return a setting of the server in a connection of a store."""
    images = ImageStorage(url)
    images.home.settle()  # the test uses what is inside of it
    try:
        await images.create_tables()
        engine = images._engine
        rows: list[tuple[str]] = await engine.read(
            lambda connection: engine.backend.fetch(
                connection.sync_connection.connection.driver_connection,  # type: ignore[union-attr]
                f"SELECT current_setting('{name}')",
                [],
            )
        )
        return rows[0][0]
    finally:
        await images.close()


@pytest.mark.parametrize(
    ("query", "name", "value"),
    [
        ("application_name=my%20shop", "application_name", "my shop"),
        ("options=-c%20statement_timeout%3D9s", "statement_timeout", "9s"),
        ("options=-cstatement_timeout=9s%20-c%20lock_timeout%3D8s", "lock_timeout", "8s"),
        ("options=--work_mem%3D8MB", "work_mem", "8MB"),
    ],
)
async def test_settings_of_the_server(query: str, name: str, value: str, postgres_url: str) -> None:
    """The application's name, and each setting in `options`, reach the server as through libpq."""
    assert await setting_of(with_query(postgres_url, query), name) == value


async def test_a_search_path(postgres_url: str) -> None:
    """With a search path in `options` the tables are made, read and written in that schema, and in no other."""
    await sql(postgres_url, "CREATE SCHEMA shop")
    images = ImageStorage(with_query(postgres_url, "options=-csearch_path%3Dshop"))
    await images.create_tables()
    await images.store_image("a.png", b"shop")
    await images.close()
    assert await sql(postgres_url, "SELECT name FROM shop.image_storage") == [("a.png",)]
    public = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
    assert await sql(postgres_url, public) == []


@pytest.mark.parametrize("form", ["?host={}&port={}", "host"])
async def test_a_socket(form: str, postgres: PostgresServer, postgres_url: str) -> None:
    """A socket's directory is a host, in both forms that libpq knows."""
    socket = str(postgres.data.parent / "run")
    database = make_url(postgres_url).database
    url = (
        f"postgres://postgres@{quote(socket, safe='')}:{postgres.port}/{database}"
        if form == "host"
        else f"postgres://postgres@/{database}{form.format(socket, postgres.port)}"
    )
    images = ImageStorage(url)
    await images.create_tables()
    assert await images.count() == 0
    await images.close()
    assert len(await sql(postgres_url, "SELECT 1 FROM image_schema")) == 1


@pytest.mark.parametrize("parameter", ["sslrootcert", "sslcert", "sslkey", "sslcrl"])
async def test_files_of_certificates(parameter: str, postgres_url: str, tmp_path: Path) -> None:
    """A certificate's file is read: a missing one is an error, never a connection without it."""
    missing = tmp_path / "missing.pem"
    both = f"&sslcert={missing}" if parameter == "sslkey" else ""
    images = ImageStorage(with_query(postgres_url, f"sslmode=require&{parameter}={missing}{both}"))
    with pytest.raises(Exception, match="No such file"):
        await images.create_tables()
    await images.close()


@pytest.mark.parametrize(
    "query", ["schema=shop", "search_path=shop", "sslmod=require", "gssencmode=require", "connection_limit=3"]
)
def test_unknown_parameters(query: str) -> None:
    """A parameter that is not known, or cannot be honoured, is refused by name: left out, it might share tables."""
    with pytest.raises(SettingsError, match=repr(query.partition("=")[0])) as caught:
        database_url(f"postgres://u:secret@h/db?{query}")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("query", ["connect_timeout=soon", "statement_cache_size=few", "command_timeout=x"])
def test_numbers(query: str) -> None:
    """A number that is none is refused by name."""
    with pytest.raises(SettingsError, match="must be a number"):
        database_url(f"postgres://h/db?{query}")


@pytest.mark.parametrize("query", ["sslmode=require&sslkey=/k&application_name=a b", "pgbouncer=true", "host=/run/pg"])
def test_understood_urls_are_understood_again(query: str) -> None:
    """A store's URL can be given to another store."""
    url = database_url(f"postgres://u:p@h/db?{query}")
    assert database_url(url.render_as_string(hide_password=False)) == url == url_of(url)


def test_passwords_with_any_character() -> None:
    """A quoted password comes out as it was, from text and from a URL object."""
    password = f"{string.printable}äö日本 +%2F"
    assert database_url(f"postgres://u:{quote(password, safe='')}@h/db").password == password
    assert url_of(URL.create("postgresql", "u", password, "h", None, "db")).password == password


async def test_a_connect_timeout(black_hole: int, directory: Path) -> None:
    """A `connect_timeout` (seconds) that is shorter than the store's own is kept."""
    async with UploadStore(directory, f"postgres://u@127.0.0.1:{black_hole}/db?connect_timeout=1") as store:
        with pytest.raises(Exception, match="no answer"):
            await store.database.count()


def test_the_tables_are_known() -> None:
    """The names of all tables are those that the other tests look for."""
    assert {table.name for table in ImageStorage("sqlite://").tables.all()} == set(TABLES)
