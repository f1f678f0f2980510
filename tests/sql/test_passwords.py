"""Passwords in URLs: any character, as hosts and people write it, with a role that is really asked for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import quote

import pytest

from selfheal import DatabaseUnavailable, ImageStorage, SettingsError
from selfheal.sql.backends import database_url, shown
from tests.support.postgres import PostgresServer

PASSWORDS = [
    *("p@ss", "p@ss@w@rd", "@", "@@", "p:w", "a/b", "a?b", "a#b", "a b", " ", "100%", "%", "a%zz", "a&b=c", "a+b"),
    *("pä日€", "a\\b'c\"d", "[::1]", "$HOME`x`", "a;b,c|d", "p/a@b", "p?a@b", "{}", "~!*()_-."),
]
AMBIGUOUS = ["p@a/b", "p@a?b", "a@/", "a%41", "%40", "%2541"]
"""As they are, these can mean something else: a path, parameters, an encoded character."""


@pytest.fixture(scope="module")
def asked_role(postgres: PostgresServer) -> Iterator[str]:
    """A role that the server asks for its password."""
    postgres.sql("CREATE ROLE asked LOGIN SUPERUSER")
    postgres.ask_password("asked")
    yield "asked"
    postgres.sql("DROP OWNED BY asked; DROP ROLE asked")


@pytest.fixture
def url_with(asked_role: str, postgres: PostgresServer, postgres_url: str) -> Callable[[str, str], str]:
    """Set the role's password, and return a URL with what is written for it."""

    def make(password: str, written: str) -> str:
        postgres.sql(f"ALTER ROLE {asked_role} PASSWORD '{password.replace(chr(39), 2 * chr(39))}'")
        return postgres_url.replace("postgresql+asyncpg://postgres@", f"postgres://{asked_role}:{written}@")

    return make


async def count_in(url: str) -> int:
    """Return the number of names in a database, whose tables are made."""
    images = ImageStorage(url)
    try:
        await images.create_tables()
        return await images.count()
    finally:
        await images.close()


@pytest.mark.parametrize("password", PASSWORDS + AMBIGUOUS)
async def test_percent_encoded(password: str, url_with: Callable[[str, str], str]) -> None:
    """A password in which every special character is percent-encoded logs in."""
    assert await count_in(url_with(password, quote(password, safe=""))) == 0


@pytest.mark.parametrize("password", PASSWORDS)
async def test_as_it_is(password: str, url_with: Callable[[str, str], str]) -> None:
    """A password that is written as it is logs in, where it can mean nothing else; no message shows it."""
    url = url_with(password, password)
    assert await count_in(url) == 0
    assert await count_in(f"{url}?application_name=a@b") == 0
    assert shown(database_url(url)) == url.replace("postgres:", "postgresql:").replace(f":{password}@", ":***@")


@pytest.mark.parametrize("password", ["p@a/b", "p@a?b", "a@/"])
def test_what_can_mean_two_things(password: str) -> None:
    """An `@` that is followed by a path or parameters, and another `@`, is refused with what to write."""
    with pytest.raises(SettingsError, match="%40") as caught:
        database_url(f"postgres://u:{password}@h/db")
    assert password not in str(caught.value)


async def test_a_wrong_password(url_with: Callable[[str, str], str]) -> None:
    """A wrong password is no answer, and is not in the message."""
    with pytest.raises(DatabaseUnavailable, match="password authentication failed") as caught:
        await count_in(url_with("right", "wr@ng"))
    assert "wr@ng" not in str(caught.value)


@pytest.mark.parametrize("path", ["/srv/me@home/app.db", "/srv/a@b@c/app.db", "/srv/a:b@c@d.db"])
def test_paths_with_the_same_characters(path: str) -> None:
    """A file of SQLite may have these characters in its path."""
    assert database_url(f"sqlite:///{path}").database == path
