"""Bad usage and bad settings: one line that says what is wrong, exit 2, or 3 if the database cannot be reached."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from tests.support.command_line import MODULES, PASSWORD, Site
from tests.support.files import snapshot_of, write_file

BULK = tuple(MODULES)
WITH_DATABASE = ("verify", "restore", "list", "delete x.png", "history x.png", "undo x.png", "purge", "save x.png -")
DEAD = f"postgres://someone:{PASSWORD}@127.0.0.1:{{dead}}/app?sslmode=disable"
BAD: list[tuple[int, str, str]] = [
    (2, "frobnicate", "No such command 'frobnicate'"),
    *((2, f"{command} --frobnicate", "No such option") for command in (*BULK, "list", "serve", "purge")),
    *((2, f"{command} --jobs many", "'many' is not a valid integer") for command in BULK),
    *((2, f"{command} --jobs {number}", "not in the range") for command in BULK for number in (0, -1, 65)),
    (2, "verify --jobs", "requires an argument"),
    (2, "verify surplus", "unexpected extra argument"),
    (2, "migrate --prefer database", "'database' is not 'disk'"),
    (2, "save", "Missing argument 'NAME'"),
    (2, "delete", "Missing argument 'NAME...'"),
    (2, "save x.png {home}/nothing", "does not exist"),
    *((2, f"purge --keep-days {number}", "--keep-days") for number in ("-1", "nan", "inf", "1e300", "x", "9" * 30)),
    *((2, f"undo x.png --generation {number}", "--generation") for number in ("0", "x", "9" * 30)),
    *((2, f"serve --port {number}", "--port") for number in ("-1", "65536", "http")),
    *((2, f"serve --workers {number}", "--workers") for number in ("0", "x")),
    *((2, f"{command} --directory /", "cannot be /") for command in (*BULK, "list", "serve")),
    *((2, f"{command} --directory {{home}}/root", "cannot be") for command in BULK),
    *((2, f"{command} --directory {{home}}/a-file", "is not a directory") for command in (*BULK, "serve")),
    *((2, f"{command} --directory ''", "--directory is empty") for command in (*BULK, "serve")),
    *((2, f"{command} --database ''", "--database is empty") for command in (*BULK, "serve")),
    (2, "migrate --directory {home}/nowhere", "no directory {home}/nowhere to migrate from"),
    *(
        (2, f"{command} --database sqlite:///{{home}}/app/static/uploads/deep/x.db", "is in the directory")
        for command in (*BULK, "list", "serve")
    ),
    *((2, f"{command} --database gibberish", "cannot be read") for command in (*BULK, "list", "serve")),
    (2, f"verify --database mysql://u:{PASSWORD}@h/d", "'mysql' is not supported"),
    (2, f"verify --database postgres://u:{PASSWORD}@h:port/d", "cannot be read"),
    *(
        (2, f"{command} --database {url}", "in memory")
        for command in ("migrate", "migrate --dry-run", "serve", *WITH_DATABASE)
        for url in ("sqlite://", "sqlite+aiosqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true")
    ),
    *((2, f"{command} --table-prefix Shop-", "the table prefix") for command in ("migrate", "serve", *WITH_DATABASE)),
    *((2, f"{command} --schema shop", "SQLite has no schema") for command in ("migrate", "serve", *WITH_DATABASE)),
    (2, "migrate --table-prefix ''", "--table-prefix is empty"),
    (2, f"verify --database postgres://u:{PASSWORD}@h/d?schema=shop", "'schema'"),
    (2, "serve no_such_module:app", "cannot be imported"),
    (2, "serve json:no_such_app", "cannot be imported"),
    (2, "serve json:__doc__", "not an ASGI app"),
    *((2, f"serve {app}", "names no app") for app in (":app", ".json:app", "'a b'", "''", "json:")),
    (2, "serve --prefix uploads", "must be a decoded path"),
    *(
        (2, f"{command} {name}", "not a valid name")
        for command in ("delete good.png", "history", "undo")
        for name in ("../x", ".hidden", "NUL")
    ),
    (2, "save ../x -", "not a valid name"),
    *((3, f"{command} --database {DEAD}", "no answer") for command in ("migrate", *WITH_DATABASE)),
    *(
        (3, f"{command} --database sqlite:///{{home}}/none.db", "`selfheal migrate` makes it")
        for command in WITH_DATABASE
    ),
    *((3, f"{command} --database sqlite:///{{home}}/blank.db", "run `selfheal migrate`") for command in WITH_DATABASE),
    *((3, f"{command} --database sqlite:///{{home}}/a-file", "no answer") for command in ("migrate", *WITH_DATABASE)),
    (3, "migrate --database sqlite:///{home}/nowhere/x.db", "no answer"),
    *(
        (2, f"{command} --database sqlite:///{{home}}/others.db", "image_blob belongs to another app; choose a table")
        for command in ("migrate", "migrate --dry-run")
    ),
]


@pytest.fixture
def odd_site(site: Site) -> Site:
    """A site with files, links and databases that a user can give by mistake."""
    write_file(site.directory / "a.png", b"a")
    (site.home / "a-file").write_bytes(b"neither a directory nor a database")
    (site.home / "root").symlink_to("/")
    with closing(sqlite3.connect(site.home / "blank.db")) as connection:
        connection.execute("CREATE TABLE t (x)")
    with closing(sqlite3.connect(site.home / "others.db")) as connection:
        connection.execute("CREATE TABLE image_blob (id INTEGER PRIMARY KEY)")
    return site


@pytest.mark.parametrize(("code", "line", "message"), BAD, ids=[f"{code} {line}" for code, line, _ in BAD])
def test_bad_usage(odd_site: Site, dead_port: int, code: int, line: str, message: str) -> None:
    """A command prints one line that says what is wrong, exits with the code and changes nothing."""
    values = {"home": str(odd_site.home), "dead": str(dead_port)}
    before = snapshot_of(odd_site.home)
    arguments = [part.strip("'") if part != "''" else "" for part in _split(line.format(**values))]
    done = odd_site.run_without_flags(*arguments, stdin=b"x")
    assert (done.code, done.out) == (code, "")
    assert message.format(**values) in done.error_line
    assert snapshot_of(odd_site.home) == before


def _split(line: str) -> list[str]:
    """Return the words of a line; words in single quotes stay together."""
    words: list[str] = []
    for word in line.split():
        if words and words[-1].startswith("'") and (len(words[-1]) == 1 or not words[-1].endswith("'")):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


@pytest.mark.parametrize("command", MODULES)
@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--frobnicate"], 2), (["--directory", "/"], 2), (["--database", "postgres://x@127.0.0.1:1/x"], 3)],
)
def test_bad_usage_of_a_module(odd_site: Site, command: str, arguments: list[str], code: int) -> None:
    """A module prints the same errors as its command."""
    done = odd_site.run_without_flags(*arguments, command=command)
    assert (done.code, done.out) == (code, "")
    assert done.error_line


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SELFHEAL_DIRECTORY", "/"),
        ("SELFHEAL_DATABASE_URL", f"oracle://u:{PASSWORD}@h/d"),
        ("DATABASE_URL", f"mysql://u:{PASSWORD}@h/d"),
        ("SELFHEAL_PREFIX", "no-slash"),
        ("SELFHEAL_PREFIX", "/ends//"),
    ],
)
def test_a_bad_variable(odd_site: Site, variable: str, value: str) -> None:
    """A bad value in the environment is one line and exit 2, for every command."""
    before = snapshot_of(odd_site.home)
    for command in (*BULK, "list", "serve"):
        done = odd_site.run_without_flags(command, env={variable: value})
        assert (done.code, done.out) == (2, "")
        assert done.error_line
    assert snapshot_of(odd_site.home) == before


@pytest.mark.parametrize("command", WITH_DATABASE)
def test_a_failure_in_json(odd_site: Site, command: str) -> None:
    """With --json a failure is also in the one object on standard output."""
    for database in (f"postgres://u:{PASSWORD}@127.0.0.1:1/d", f"sqlite:///{odd_site.home}/none.db"):
        done = odd_site.run_without_flags(*command.split(), "--json", "--database", database)
        assert (done.code, done.json["ok"], done.json["command"]) == (3, False, command.split(maxsplit=1)[0])
        assert done.json["error"] in done.error_line
