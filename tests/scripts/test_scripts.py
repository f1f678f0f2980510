"""What is typed at a shell: real processes, their exit codes, and what they print where."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import pty
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest

from selfheal import UploadStore
from selfheal.content.sources import CHUNK
from tests.bulk.test_bulk import flip, lay, litter, noise, tree
from tests.support.sockets import free_port

MODULES = {
    "migrate": "selfheal.scripts.migrate_images",
    "verify": "selfheal.scripts.test_image_storage",
    "restore": "selfheal.scripts.restore_images",
}
PASSWORD = "hush-hush"
SECONDS = 60.0
KEYS = {"command", "ok", "examined", "counts", "bytes", "seconds", "problems"}

FORKS = """
import json, os, resource, sys
import asyncpg, rich.progress, selfheal.scripts.cli  # what takes long is done once
from selfheal.scripts import main
for line in sys.stdin:
    case = json.loads(line)
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    for fd, path in enumerate(case["files"]):
        os.dup2(os.open(path, os.O_RDWR), fd)
    for what, limit in case["limits"].items():
        resource.setrlimit(getattr(resource, what), (limit, limit))
    os.chdir(case["cwd"])
    os.environ.clear()
    os.environ.update(case["environment"])
    sys.argv = case["argv"]
    main(case["command"])
"""


# -- a shell ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """How a process ended, and what it said."""

    code: int
    out: str
    err: str

    def __post_init__(self) -> None:
        # asyncio, in debug mode, tells every step that takes more than 0.1 s: on a busy machine any may
        quick = [line for line in self.err.splitlines(keepends=True) if not line.startswith("Executing <")]
        object.__setattr__(self, "err", "".join(quick))
        assert "Traceback" not in self.err, self.err
        assert "Warning" not in self.err, self.err
        assert PASSWORD not in self.out + self.err

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output."""
        said: dict[str, Any] = json.loads(self.out)
        return said

    @property
    def complaint(self) -> str:
        """The one line on standard error."""
        assert self.err.startswith("selfheal: "), self.err
        assert self.err.endswith("\n"), self.err
        assert self.err.count("\n") == 1, self.err
        assert len(self.err) > 25, "it says neither what nor how to mend it"
        return self.err


def environment(**variables: str) -> dict[str, str]:
    """An environment without any of our variables, but for those given."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "LANG": "C.UTF-8",
        "TERM": "xterm",
        "PYTHONDEVMODE": "1",
        **variables,
    }


def program(command: str | None, *arguments: str) -> list[str]:
    """What a shell runs: the command `selfheal`, or the module of one of its commands."""
    if command is not None:
        return [sys.executable, "-m", MODULES[command], *arguments]
    return [sys.executable, str(Path(sys.executable).with_name("selfheal")), *arguments]


@dataclass(frozen=True)
class Site:
    """An app's directory, with its uploads and its database."""

    home: Path
    directory: Path
    database: str
    forks: Callable[..., Done]

    @property
    def flags(self) -> list[str]:
        """Where the two halves are."""
        return ["--directory", str(self.directory), "--database", self.database]

    def run(self, *arguments: str, stdin: bytes = b"", **how: Any) -> Done:
        """Run `selfheal COMMAND` with this site's flags, in a process forked off one that has imported all there is."""
        given, rest = arguments[:1], arguments[1:]
        return self.forks(*given, *self.flags, *rest, cwd=self.home, stdin=stdin, **how)

    def execute(self, command: str | None, *arguments: str, **variables: str) -> Done:
        """Run a module, or `selfheal`, in a new interpreter."""
        done = subprocess.run(
            program(command, *arguments),
            cwd=self.home,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def start(self, command: str | None, *arguments: str, **more: Any) -> subprocess.Popen[str]:
        """As `execute`, but do not wait for its end."""
        return subprocess.Popen(
            program(command, *arguments),
            cwd=self.home,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **{"stdin": subprocess.DEVNULL, **more},
        )


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Done]]:
    """Runs command lines, each in a process of its own that need not import anything any more."""
    base, number = tmp_path_factory.mktemp("forks"), count()
    parent = subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert parent.stdin is not None
    assert parent.stdout is not None

    def run(
        *arguments: str,
        cwd: Path,
        command: str | None = None,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
        terminal: str | None = None,
    ) -> Done:
        index = next(number)
        files = [base / f"{index}.{name}" for name in ("in", "out", "err")]
        for file in files:
            file.write_bytes(stdin if file == files[0] else b"")
        case = {
            "argv": ["selfheal", *arguments],
            "command": command,
            "cwd": str(cwd),
            "environment": environment(**(env or {})),
            "files": [str(files[0]), str(files[1]), terminal or str(files[2])],
            "limits": limits or {},
        }
        assert parent.stdin is not None
        assert parent.stdout is not None
        print(json.dumps(case), file=parent.stdin, flush=True)
        ready, _, _ = select.select([parent.stdout], [], [], SECONDS)
        assert ready, f"it never ended: {arguments}"
        return Done(int(parent.stdout.readline()), files[1].read_text(), files[2].read_text())

    yield run
    parent.stdin.close()
    assert parent.wait(SECONDS) == 0
    parent.stdout.close()


@pytest.fixture
def site(tmp_path: Path, directory: Path, sqlite_url: str, forks: Callable[..., Done]) -> Site:
    """A site over SQLite, with nothing on either side."""
    return Site(tmp_path, directory, sqlite_url, forks)


IMAGES = {"a.png": noise(5000), "cats/tom.jpg": noise(2 * CHUNK + 5), "empty.gif": b"", "日本.webp": noise(77)}


@pytest.fixture
def full(site: Site) -> Site:
    """A site whose uploads are the same on both sides."""
    for name, data in IMAGES.items():
        lay(site.directory, name, data)

    async def migrate() -> None:
        async with UploadStore(site.directory, site.database) as store:
            await store.database.create_tables()
            for name in IMAGES:
                await store.adopt(name)

    asyncio.run(migrate())
    return site


def contents(directory: Path) -> dict[str, bytes]:
    """The files below a directory: bytes by name."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


# -- the three runs --------------------------------------------------------------------------------------------------


def test_the_three_modules(site: Site, database_url: str) -> None:
    """Each module is a program: migrate brings in, verify finds all well, restore brings back; then nothing changes."""
    url = database_url.replace("postgresql+asyncpg://", "postgres://").replace("@", f":{PASSWORD}@")
    flags = ["--directory", str(site.directory), "--database", url]
    for name, data in IMAGES.items():
        lay(site.directory, name, data)
    everything = {"examined": len(IMAGES), "bytes": sum(map(len, IMAGES.values())), "problems": [], "ok": True}

    done = site.execute("migrate", *flags, "--json")
    assert (done.code, done.err, set(done.json)) == (0, "", KEYS)
    assert done.json | {"seconds": 0} == everything | {"command": "migrate", "counts": {"migrated": 4}, "seconds": 0}
    shutil.rmtree(site.directory)
    done = site.execute("verify", *flags, "--json")
    assert (done.code, done.err, set(done.json)) == (1, "", KEYS)
    assert (done.json["ok"], done.json["counts"]) == (False, {"missing_on_disk": 4})
    assert sorted(problem["name"] for problem in done.json["problems"]) == sorted(IMAGES)
    assert {tuple(sorted(problem)) for problem in done.json["problems"]} == {("detail", "name", "outcome")}
    done = site.execute("restore", *flags, "--json")
    assert (done.code, done.err, set(done.json)) == (0, "", KEYS)
    assert done.json | {"seconds": 0} == everything | {"command": "restore", "counts": {"restored": 4}, "seconds": 0}
    assert contents(site.directory) == IMAGES
    for command in MODULES:
        again = site.forks(*flags, "--json", cwd=site.home, command=command)
        assert (again.code, again.json["counts"], again.json["bytes"]) == (0, {"ok": 4}, everything["bytes"])


@pytest.mark.parametrize("command", MODULES)
def test_a_run_for_people(full: Site, command: str) -> None:
    """Without --json there is one line of summary on standard output; with --quiet there is nothing at all."""
    done = full.run(command)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{command}: 4 examined: 4 ok; ")
    assert done.out.count("\n") == 1
    assert full.run(command, "--quiet") == Done(0, "", "")


def test_problems_are_told(full: Site) -> None:
    """Every wrong name is one line on standard error, quiet or not, and exit 1; nothing a terminal would obey."""
    flip(full.directory / "a.png")
    (full.directory / "cats/tom.jpg").unlink()
    lay(full.directory, "esc\x1b[2J\n.png", b"x")
    lay(full.directory, os.fsdecode(b"\xff.png"), b"x")
    expected = {"a.png": "differs", "cats/tom.jpg": "missing_on_disk"}
    hostile = {"esc\x1b[2J\n.png": "invalid_name", "\udcff.png": "invalid_name"}

    loud, quiet = full.run("verify"), full.run("verify", "--quiet")
    assert (loud.code, quiet.code, quiet.out) == (1, 1, "")
    assert "2 ok" in loud.out
    for done in (loud, quiet):
        lines = done.err.splitlines()
        assert len(lines) == 4
        assert all(any(line.startswith(f"{what}: {name}: ") for line in lines) for name, what in expected.items())
        assert "\x1b" not in done.err
    said = full.run("verify", "--json")
    assert (said.code, said.err, said.json["ok"]) == (1, "", False)
    assert {one["name"]: one["outcome"] for one in said.json["problems"]} == expected | hostile
    assert said.json["counts"] == {"differs": 1, "invalid_name": 2, "missing_on_disk": 1, "ok": 2}
    assert all(one["detail"] for one in said.json["problems"])


def test_restore_with_verify(full: Site) -> None:
    """`restore --verify` heals what differs: exit 0, the bad copy in quarantine, and a second run all ok."""
    lay(full.directory, "a.png", b"bad")
    plain = full.run("restore", "--json")
    assert contents(full.directory) == IMAGES | {"a.png": b"bad"}, plain
    done = full.run("restore", "--verify", "--json")
    assert (done.code, done.json["counts"]) == (0, {"ok": 3, "restored": 1})
    assert contents(full.directory) == IMAGES
    assert [path.read_bytes() for path in full.home.rglob("*quarantine*/**/a.png")] == [b"bad"]
    assert full.run("restore", "--verify", "--json").json["counts"] == {"ok": 4}


def test_migrate_prefers_disk(full: Site) -> None:
    """`migrate` tells what differs and exits 1; with `--prefer disk` it takes the disk's bytes and exits 0."""
    lay(full.directory, "a.png", b"newer")
    done = full.run("migrate", "--json")
    assert (done.code, done.json["counts"]) == (1, {"differs": 1, "ok": 3})
    done = full.run("migrate", "--prefer", "disk", "--json")
    assert (done.code, done.json["counts"]) == (0, {"migrated": 1, "ok": 3})
    assert full.run("verify", "--drill", "--json").json["counts"] == {"ok": 4}


@pytest.mark.parametrize(
    "arguments",
    [
        ("migrate", "--dry-run"),
        ("migrate", "--dry-run", "--prefer", "disk"),
        ("restore", "--dry-run"),
        ("restore", "--dry-run", "--verify"),
        ("verify",),
        ("verify", "--dry-run", "--drill"),
        ("list",),
        ("purge", "--dry-run", "--keep-days", "0"),
    ],
    ids=" ".join,
)
def test_what_changes_nothing(full: Site, arguments: tuple[str, ...]) -> None:
    """Dry runs, verify and list leave every byte and time on both sides as they are, even a dead process's litter."""
    lay(full.directory, "new.png", b"new")
    lay(full.directory, "a.png", b"other")
    (full.directory / "cats/tom.jpg").unlink()
    lay(full.directory, f".selfheal-tmp/{'0' * 32}", b"left by a process that was killed")
    before = tree(full.home)
    done = full.run(*arguments, "--json")
    assert tree(full.home) == before
    assert done.json.get("dry_run", False) == ("--dry-run" in arguments)


def test_a_dry_migration_before_the_first(site: Site) -> None:
    """Where there is no SQLite file yet `migrate --dry-run` says what it would bring in, and does not make one."""
    lay(site.directory, "a.png", b"a")
    before = tree(site.home)
    done = site.run("migrate", "--dry-run", "--json")
    assert (done.code, done.json["counts"]) == (0, {"migrated": 1})
    assert tree(site.home) == before


def test_restore_makes_the_directory_and_sweeps(full: Site) -> None:
    """A restore makes a directory that is gone, and removes what a process that was killed has left in it."""
    shutil.rmtree(full.home / "app")
    assert full.run("verify").code == 1
    assert not (full.home / "app").exists()
    assert full.run("restore").code == 0
    assert contents(full.directory) == IMAGES
    lay(full.directory, f".selfheal-tmp/{'0' * 32}", b"left by a process that was killed")
    assert full.run("restore").code == 0
    assert litter(full.directory) == []


def test_a_disk_that_takes_no_large_file(full: Site) -> None:
    """What the disk does not take is told by name, exit 1, and leaves neither file nor litter; the rest is restored."""
    shutil.rmtree(full.directory)
    done = full.run("restore", "--json", limits={"RLIMIT_FSIZE": CHUNK})
    assert (done.code, done.json["counts"]) == (1, {"restored": 3, "failed": 1})
    assert [problem["name"] for problem in done.json["problems"]] == ["cats/tom.jpg"]
    assert contents(full.directory) == {name: data for name, data in IMAGES.items() if name != "cats/tom.jpg"}
    assert full.run("restore", "--json").json["counts"] == {"ok": 3, "restored": 1}


async def test_few_descriptors_are_enough(full: Site) -> None:
    """A run keeps to a small number of open files, whatever the number of uploads."""
    async with UploadStore(full.directory, full.database) as store:
        for index in range(300):
            await store.database.store_image(f"many/{index}.png", noise(10, index))
    done = full.run("restore", "--json", limits={"RLIMIT_NOFILE": 256})
    assert (done.code, done.json["counts"]) == (0, {"ok": 4, "restored": 300})


def test_progress_only_on_a_terminal(full: Site) -> None:
    """Progress is drawn on standard error if that is a terminal and nobody asked for quiet; never on the output."""
    for arguments, drawn in ((("--json",), True), ((), True), (("--json", "--quiet"), False)):
        main, terminal = pty.openpty()
        try:
            done = full.run("verify", *arguments, terminal=os.ttyname(terminal))
            said = os.read(main, 65536).decode() if select.select([main], [], [], 0)[0] else ""
        finally:
            os.close(main)
            os.close(terminal)
        assert ("verify" in said) is drawn, said
        assert "Traceback" not in said
        assert done.out.count("\n") == 1
        assert "\x1b" not in done.out


# -- single names ----------------------------------------------------------------------------------------------------


def test_a_name_through_its_life(full: Site) -> None:
    """save, list, history, delete and undo do on both sides what they say, and say it in JSON."""
    picture = full.home / "picture"
    picture.write_bytes(b"second")
    first = full.run("save", "new/x.png", "-", "--json", stdin=b"first" * CHUNK)
    assert (first.code, first.json["command"], first.json["ok"]) == (0, "save", True)
    assert (first.json["name"], first.json["size"], first.json["generation"]) == ("new/x.png", 5 * CHUNK, 1)
    assert (full.directory / "new/x.png").read_bytes() == b"first" * CHUNK
    second = full.run("save", "new/x.png", str(picture), "--json")
    assert (second.json["size"], second.json["generation"]) == (6, 2)

    listed = full.run("list", "--json")
    assert {one["name"]: one["size"] for one in listed.json["names"]} == {
        name: len(data) for name, data in (IMAGES | {"new/x.png": b"second"}).items()
    }
    lines = full.run("list").out.splitlines()
    assert [line.split()[-1] for line in lines] == sorted([*IMAGES, "new/x.png"])

    history = full.run("history", "new/x.png", "--json")
    assert (history.json["now"]["size"], [one["size"] for one in history.json["versions"]]) == (6, [5 * CHUNK])
    assert full.run("delete", "new/x.png", "a.png", "--json").json["deleted"] == ["new/x.png", "a.png"]
    assert not (full.directory / "new/x.png").exists()
    assert {one["name"] for one in full.run("list", "--deleted", "--json").json["names"]} == {"new/x.png", "a.png"}
    assert full.run("restore", "--json").json["counts"] == {"ok": 3}

    back = full.run("undo", "new/x.png", "--json")
    assert (back.code, back.json["size"]) == (0, 6)
    assert (full.directory / "new/x.png").read_bytes() == b"second"
    assert full.run("undo", "new/x.png", "--generation", "1").code == 0
    assert (full.directory / "new/x.png").read_bytes() == b"first" * CHUNK
    assert full.run("undo", "a.png").out.startswith("a.png is back")
    assert contents(full.directory) == IMAGES | {"new/x.png": b"first" * CHUNK}
    assert full.run("verify", "--drill").code == 0


def test_names_that_are_not_there(full: Site) -> None:
    """delete tells the names that are not there and exits 1, after it has deleted the others; undo and history too."""
    done = full.run("delete", "nope.png", "a.png")
    assert (done.code, done.out, done.err) == (1, "deleted a.png\n", "no such name: nope.png\n")
    said = full.run("delete", "nope.png", "empty.gif", "--json")
    assert (said.code, said.json) == (
        1,
        {"command": "delete", "ok": False, "deleted": ["empty.gif"], "missing": ["nope.png"]},
    )
    assert full.run("delete", "nope.png", "--quiet") == Done(1, "", "no such name: nope.png\n")
    for command in ("undo", "history"):
        done = full.run(command, "nope.png")
        assert (done.code, done.out) == (1, "")
        assert "'nope.png'" in done.complaint
        assert full.run(command, "nope.png", "--json").json["ok"] is False


def test_purge(full: Site) -> None:
    """purge drops what is older than --keep-days, says how much, and says it before with --dry-run."""
    full.run("save", "a.png", "-", stdin=b"newer")
    time.sleep(1.1)  # SQLite's clock has whole seconds
    kept = full.run("purge", "--json")
    assert kept.json == {"command": "purge", "ok": True, "versions": 0, "blobs": 0, "bytes": 0}
    dry = full.run("purge", "--keep-days", "0", "--dry-run", "--json")
    assert (dry.json["versions"], dry.json["dry_run"]) == (1, True)
    assert full.run("purge", "--keep-days", "0", "--json").json["versions"] == 1
    assert full.run("history", "a.png", "--json").json["versions"] == []
    assert full.run("purge", "--keep-days", "0").out.startswith("dropped 0 old versions and 0 blobs")


def test_a_terminal_that_cannot_show_a_name(full: Site) -> None:
    """A name that the terminal's encoding lacks is shown escaped; the command goes on to its end."""
    done = full.execute(None, "list", *full.flags, PYTHONIOENCODING="latin-1")
    assert (done.code, len(done.out.splitlines())) == (0, len(IMAGES))
    assert "\\u65e5\\u672c.webp" in done.out


# -- where things are ------------------------------------------------------------------------------------------------


def test_the_environment_and_the_flags(full: Site, tmp_path: Path) -> None:
    """Variables say where the two halves are, ours before DATABASE_URL; flags win over them, even over bad ones."""
    empty = f"sqlite+aiosqlite:///{tmp_path}/empty.db"
    missing = str(tmp_path / "nowhere" / "else")
    found, nothing = {"ok": 4}, {"missing_on_disk": 4}

    def verify(*flags: str, **env: str) -> Done:
        return full.forks("verify", "--json", *flags, cwd=tmp_path / "nowhere", env=env)

    (tmp_path / "nowhere").mkdir()
    halves = {"SELFHEAL_DIRECTORY": str(full.directory), "SELFHEAL_DATABASE_URL": full.database}
    assert verify(**halves).json["counts"] == found
    assert verify(SELFHEAL_DIRECTORY=str(full.directory), DATABASE_URL=full.database).json["counts"] == found
    assert verify(**halves, DATABASE_URL=empty).json["counts"] == found
    assert verify(**halves | {"SELFHEAL_DATABASE_URL": ""}, DATABASE_URL=full.database).json["counts"] == found
    assert verify("--directory", missing, **halves).json["counts"] == nothing
    assert verify("--database", empty, **halves).code == 3
    bad = {"SELFHEAL_DIRECTORY": "/", "SELFHEAL_DATABASE_URL": "oracle://x", "DATABASE_URL": "mysql://x"}
    assert verify(*full.flags, **bad).json["counts"] == found
    assert verify("--directory", str(full.directory), **bad).code == 2
    assert verify(*full.flags, SELFHEAL_PREFIX="no-slash").code == 2
    assert list((tmp_path / "nowhere").iterdir()) == []


def test_the_defaults(site: Site) -> None:
    """Without flags and variables the uploads are in app/static/uploads, the database in selfheal.db."""
    lay(site.home / "app/static/uploads", "a.png", b"a")
    assert site.forks("migrate", "--json", cwd=site.home).json["counts"] == {"migrated": 1}
    assert (site.home / "selfheal.db").is_file()
    assert site.forks("verify", cwd=site.home).code == 0


# -- bad usage -------------------------------------------------------------------------------------------------------

BULK = tuple(MODULES)
STORED = ("verify", "restore", "list", "delete x.png", "history x.png", "undo x.png", "purge", "save x.png -")
DEAD = f"postgres://someone:{PASSWORD}@127.0.0.1:{{dead}}/app?sslmode=disable"
BAD: list[tuple[int, str, str]] = [
    (2, "", "command"),
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
        (2, f"{command} --database sqlite:///{{home}}/app/static/uploads/deep/x.db", "lies in the directory")
        for command in (*BULK, "list", "serve")
    ),
    *((2, f"{command} --database gibberish", "cannot be read") for command in (*BULK, "list", "serve")),
    (2, f"verify --database mysql://u:{PASSWORD}@h/d", "'mysql' is not supported"),
    (2, f"verify --database postgres://u:{PASSWORD}@h:port/d", "cannot be read"),
    (2, "serve --workers 2 --database sqlite://", "in memory"),
    (2, "serve --workers 2 --database sqlite+aiosqlite:///:memory:", "in memory"),
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
    *((3, f"{command} --database {DEAD}", "no answer") for command in ("migrate", *STORED)),
    *((3, f"{command} --database sqlite:///{{home}}/none.db", "`selfheal migrate` makes it") for command in STORED),
    *((3, f"{command} --database sqlite:///{{home}}/blank.db", "run `selfheal migrate`") for command in STORED),
    *((3, f"{command} --database sqlite:///{{home}}/a-file", "no answer") for command in ("migrate", *STORED)),
    (3, "migrate --database sqlite:///{home}/nowhere/x.db", "no answer"),
]


@pytest.fixture
def strewn(site: Site) -> Site:
    """A site with things in it that can be given by mistake."""
    lay(site.directory, "a.png", b"a")
    (site.home / "a-file").write_bytes(b"neither a directory nor a database")
    (site.home / "root").symlink_to("/")
    closing(sqlite3.connect(site.home / "blank.db")).__enter__().execute("CREATE TABLE t (x)").connection.close()
    return site


@pytest.mark.parametrize(("code", "line", "message"), BAD, ids=[f"{code} {line}" for code, line, _ in BAD])
def test_bad_usage(strewn: Site, code: int, line: str, message: str) -> None:
    """Bad usage is one line that says what is wrong, exit 2 (3: the database); no traceback, and nothing is changed."""
    values = {"home": str(strewn.home), "dead": str(free_port())}
    before = tree(strewn.home)
    arguments = [part.strip("'") if part != "''" else "" for part in _split(line.format(**values))]
    done = strewn.forks(*arguments, cwd=strewn.home, stdin=b"x")
    assert (done.code, done.out) == (code, "")
    assert message.format(**values) in done.complaint
    assert tree(strewn.home) == before


def _split(line: str) -> list[str]:
    """Words, with 'quoted ones' kept together."""
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
def test_bad_usage_of_a_module(strewn: Site, command: str, arguments: list[str], code: int) -> None:
    """A module complains as its command does."""
    done = strewn.forks(*arguments, cwd=strewn.home, command=command)
    assert (done.code, done.out) == (code, "")
    assert done.complaint


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SELFHEAL_DIRECTORY", "/"),
        ("SELFHEAL_DATABASE_URL", f"oracle://u:{PASSWORD}@h/d"),
        ("DATABASE_URL", f"mysql://u:{PASSWORD}@h/d"),
        ("SELFHEAL_PREFIX", "no-slash"),
        ("SELFHEAL_PREFIX", "/ends/"),
    ],
)
def test_a_bad_variable(strewn: Site, variable: str, value: str) -> None:
    """A bad value in the environment is one clear line and exit 2, for every command."""
    before = tree(strewn.home)
    for command in (*BULK, "list", "serve"):
        done = strewn.forks(command, cwd=strewn.home, env={variable: value})
        assert (done.code, done.out) == (2, "")
        assert done.complaint
    assert tree(strewn.home) == before


@pytest.mark.parametrize("command", STORED)
def test_a_failure_in_json(strewn: Site, command: str) -> None:
    """With --json a run that fails says so in the one object on standard output too, and in one line beside it."""
    for database in (f"postgres://u:{PASSWORD}@127.0.0.1:1/d", f"sqlite:///{strewn.home}/none.db"):
        done = strewn.forks(*command.split(), "--json", "--database", database, cwd=strewn.home)
        assert (done.code, done.json["ok"], done.json["command"]) == (3, False, command.split(maxsplit=1)[0])
        assert done.json["error"] in done.complaint


HIDING = "import sys; sys.modules[{module!r}] = None"


@pytest.mark.parametrize(
    ("command", "arguments", "module", "extra"),
    [
        ("migrate", [], "click", "cli"),
        (None, ["--help"], "click", "cli"),
        (None, ["serve"], "uvicorn", "server"),
        (None, ["list", "--database", "postgres://x@127.0.0.1:1/x"], "asyncpg", "postgres"),
    ],
    ids=["module without click", "command without click", "without uvicorn", "without asyncpg"],
)
def test_without_an_extra(site: Site, command: str | None, arguments: list[str], module: str, extra: str) -> None:
    """Where a package of an extra is not installed one line names the extra that brings it; exit 2."""
    (site.home / "sitecustomize.py").write_text(HIDING.format(module=module))
    done = site.execute(command, *arguments, PYTHONPATH=str(site.home), PYTHONDONTWRITEBYTECODE="1")
    assert (done.code, done.out) == (2, "")
    assert f"'{module}'" in done.complaint
    assert f"pip install 'selfheal[{extra}]'" in done.complaint


@pytest.mark.parametrize("module", ["sqlalchemy.dialects.postgresql", "starlette", "uvicorn"])
def test_a_run_does_without_what_it_does_not_use(full: Site, module: str) -> None:
    """A bulk run over SQLite loads no server, and no other database's dialect: that would be a tenth of its start."""
    (full.home / "sitecustomize.py").write_text(HIDING.format(module=module))
    done = full.execute("verify", *full.flags, PYTHONPATH=str(full.home), PYTHONDONTWRITEBYTECODE="1")
    assert (done.code, done.err) == (0, "")


def test_help_and_version(site: Site) -> None:
    """Help is asked for with -h or --help, of the command and of every module; it goes to standard output, exit 0."""
    for flag in ("-h", "--help"):
        for command in (None, *MODULES):
            done = site.forks(flag, cwd=site.home, command=command)
            assert (done.code, done.err) == (0, "")
            assert "Usage:" in done.out
    done = site.forks("--version", cwd=site.home)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("selfheal, version ")


def test_a_bare_pytest_does_not_take_the_script_for_a_test(pytestconfig: pytest.Config) -> None:
    """`test_image_storage.py` is a script: a bare `pytest` in a clone does not collect it."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"],
        cwd=pytestconfig.rootpath,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert "test_scripts.py::test_help_and_version" in done.stdout, done.stdout + done.stderr
    assert "test_image_storage" not in done.stdout + done.stderr
    assert "selfheal/scripts" not in done.stdout + done.stderr


# -- stopped and killed ----------------------------------------------------------------------------------------------

MANY = 2500
LARGE = {f"large/{index}.bin": noise(CHUNK * 4 + index, index) for index in range(8)}


def crowd() -> dict[str, bytes]:
    """Enough files for a run that can be stopped in its midst."""
    return {f"{index % 10}/{index}.png": noise(40, index) for index in range(MANY)} | LARGE


@pytest.fixture
def crowded(site: Site) -> Site:
    """Many records, and no file on disk."""
    for name, data in crowd().items():
        lay(site.directory, name, data)
    assert site.run("migrate", "--json").json["counts"] == {"migrated": len(crowd())}
    shutil.rmtree(site.directory)
    return site


one_process_or_several = pytest.mark.parametrize("jobs", ["1", "4"])


def files_of(directory: Path) -> int:
    """How many files there are below a directory."""
    return sum(len(files) for _, _, files in os.walk(directory))


def records_of(site: Site) -> int:
    """How many records there are, asked as a reader that makes nothing."""
    file = site.database.partition("///")[2]
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=SECONDS)) as connection:
            return int(connection.execute("SELECT count(*) FROM image_storage").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def stop(
    site: Site, command: str, number: signal.Signals, done: Callable[[], int], after: int, jobs: str
) -> Done | None:
    """Run a command, signal it once it has done more than `after`; None if it came to its end before."""
    with site.start(command, *site.flags, "--json", "--jobs", jobs) as process:
        end = time.monotonic() + SECONDS
        while process.poll() is None and done() <= after:
            assert time.monotonic() < end, "it gets nowhere"
            time.sleep(0.002)
        process.send_signal(number)
        out, err = process.communicate(timeout=SECONDS)
    had_ended = process.returncode == 0 or (number == signal.SIGKILL and out)  # killed when all was done and told
    return None if had_ended else Done(process.returncode, out, err)


def whole(directory: Path, images: Mapping[str, bytes]) -> bool:
    """Whether every file that has a name has all its bytes, and nothing else is there."""
    return all(images.get(name) == data for name, data in contents(directory).items())


@one_process_or_several
def test_a_restore_that_is_stopped(crowded: Site, jobs: str) -> None:
    """SIGINT ends a restore with 130 and one JSON object; what has a name is whole, and the next run goes on."""
    images = crowd()
    for _ in range(5):
        stopped = stop(crowded, "restore", signal.SIGINT, lambda: files_of(crowded.directory), 0, jobs)
        if stopped is not None:
            break
        shutil.rmtree(crowded.directory)
    assert stopped is not None
    assert (stopped.code, stopped.json["ok"], stopped.json["error"]) == (130, False, "stopped by the user")
    there = files_of(crowded.directory)
    assert 0 < there <= len(images)
    assert whole(crowded.directory, images)
    assert litter(crowded.directory) == []
    rest = crowded.run("restore", "--json")
    counts = {"ok": there, "restored": len(images) - there}
    assert (rest.code, rest.json["counts"]) == (0, {key: number for key, number in counts.items() if number})
    assert contents(crowded.directory) == images


@one_process_or_several
def test_a_migration_that_is_stopped(site: Site, jobs: str) -> None:
    """SIGINT ends a migration with 130; what was committed stays, and the next run brings in the rest."""
    images = crowd()
    for name, data in images.items():
        lay(site.directory, name, data)
    for _ in range(5):
        stopped = stop(site, "migrate", signal.SIGINT, lambda: records_of(site), 0, jobs)
        if stopped is not None:
            break
        (site.home / "catalogue.db").unlink()
    assert stopped is not None
    assert (stopped.code, stopped.json["ok"]) == (130, False)
    there = records_of(site)
    assert 0 < there <= len(images)  # what several processes were at came to its end: that may be all there was
    rest = site.run("migrate", "--json")
    counts = {"ok": there, "migrated": len(images) - there}
    assert (rest.code, rest.json["counts"]) == (0, {key: number for key, number in counts.items() if number})
    assert site.run("verify", "--json").json["counts"] == {"ok": len(images)}


INTERRUPTED_AS_IT_CLOSES = """if True:
    import os, signal
    from selfheal.sql.engine import Engine
    from selfheal.scripts import main

    close = Engine.close

    async def close_meanwhile(engine):
        os.kill(os.getpid(), signal.SIGINT)
        await close(engine)

    Engine.close = close_meanwhile
    main("migrate")
"""


def test_a_migration_that_is_stopped_as_it_closes(site: Site) -> None:
    """SIGINT in that moment waits for its end: connections are closed, and nobody sees a traceback (see `Done`)."""
    lay(site.directory, "a.png", b"one")
    stopped = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AS_IT_CLOSES, *site.flags, "--json", "--jobs", "1"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    done = Done(stopped.returncode, stopped.stdout, stopped.stderr)
    assert (done.code, done.json["error"], done.json["counts"]) == (130, "stopped by the user", {"migrated": 1})


@one_process_or_several
def test_a_restore_that_is_killed(crowded: Site, jobs: str) -> None:
    """SIGKILL at any moment leaves whole files only and no litter; the run after it finishes."""
    images, chance = crowd(), Random()
    for after in (-1, 0, chance.randrange(MANY // 2), chance.randrange(MANY)):
        killed = stop(crowded, "restore", signal.SIGKILL, lambda: files_of(crowded.directory), after, jobs)
        assert killed is None or (killed.code, killed.out) == (-signal.SIGKILL, "")
        assert whole(crowded.directory, images)
    done = crowded.run("restore", "--json")
    assert (done.code, done.json["ok"]) == (0, True)
    assert contents(crowded.directory) == images
    assert litter(crowded.directory) == []


@one_process_or_several
def test_a_migration_that_is_killed(site: Site, jobs: str) -> None:
    """SIGKILL at any moment leaves a database in which every record has its bytes; the run after it finishes."""
    images, chance = crowd(), Random()
    for name, data in images.items():
        lay(site.directory, name, data)
    for after in (-1, 0, chance.randrange(MANY // 2), chance.randrange(MANY)):
        killed = stop(site, "migrate", signal.SIGKILL, lambda: records_of(site), after, jobs)
        assert killed is None or (killed.code, killed.out) == (-signal.SIGKILL, "")
    there = records_of(site)
    if there:
        counts = site.run("verify", "--json").json["counts"]
        assert counts == {
            key: number for key, number in (("ok", there), ("missing_in_database", len(images) - there)) if number
        }
    assert site.run("migrate", "--json").json["counts"].keys() <= {"ok", "migrated"}
    assert site.run("verify", "--json").json["counts"] == {"ok": len(images)}
    assert contents(site.directory) == images


def test_saving_from_a_terminal_can_be_stopped(full: Site) -> None:
    """Somebody who waits at `selfheal save NAME -` and presses Ctrl-C gets 130, and nothing was saved."""
    with full.start(None, "save", "x.png", "-", *full.flags, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write("half of it")
        process.stdin.flush()
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
        process.stdin.close()
    assert contents(full.directory) == IMAGES
    assert records_of(full) == len(IMAGES)


# -- serve -----------------------------------------------------------------------------------------------------------

SHOP = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        raise RuntimeError("no lifespan here, as with Django")
    body = b"shop"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
"""


@contextmanager
def served(site: Site, *arguments: str) -> Iterator[Callable[[str], tuple[int, bytes]]]:
    """Run `selfheal serve`; gives a function that asks it over HTTP. At its end Ctrl-C must stop it."""
    port = free_port()
    with site.start(None, "serve", "--port", str(port), *site.flags, *arguments) as process:

        def ask(path: str) -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
            with closing(connection):
                connection.request("GET", path, headers={"Connection": "close"})
                answer = connection.getresponse()
                return answer.status, answer.read()

        try:
            _wait_for(process, ask)
            yield ask
        finally:
            process.send_signal(signal.SIGINT)
            try:
                out, err = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                raise
    if "--workers" in arguments:  # uvicorn's parent process leaves its socket to the garbage collector
        err = "\n".join(line for line in err.splitlines() if "ResourceWarning" not in line)
    Done(process.returncode, out, err)
    assert process.returncode == (0 if "--workers" in arguments else 130), err


def _wait_for(process: subprocess.Popen[str], ask: Callable[[str], object]) -> None:
    end = time.monotonic() + SECONDS
    while True:
        assert process.poll() is None, process.communicate()
        try:
            ask("/")
        except OSError:
            assert time.monotonic() < end, "it never came up"
            time.sleep(0.1)
        else:
            return


def _with_shop(site: Site) -> Site:
    (site.home / "shop.py").write_text(SHOP)
    return site


def test_serving_the_uploads_alone(full: Site) -> None:
    """Without an app the uploads are served and healed, and everything else is 404."""
    with served(full) as ask:
        assert ask("/static/uploads/a.png") == (200, IMAGES["a.png"])
        shutil.rmtree(full.directory)
        assert ask("/static/uploads/cats/tom.jpg") == (200, IMAGES["cats/tom.jpg"])
        assert ask("/static/uploads/nope.png")[0] == 404
        assert ask("/")[0] == 404
    assert contents(full.directory) == {"cats/tom.jpg": IMAGES["cats/tom.jpg"]}


def test_serving_an_app(full: Site) -> None:
    """An app of the current directory is wrapped: its uploads are healed below --prefix, the rest is its own."""
    with served(_with_shop(full), "shop:app", "--prefix", "/media") as ask:
        shutil.rmtree(full.directory)
        assert ask("/media/a.png") == (200, IMAGES["a.png"])
        assert ask("/static/uploads/a.png") == (200, b"shop")
        assert ask("/") == (200, b"shop")


def test_serving_with_workers(full: Site) -> None:
    """Worker processes serve the same app, with the same flags."""
    with served(_with_shop(full), "shop:app", "--workers", "2") as ask:
        shutil.rmtree(full.directory)
        for _ in range(6):
            assert ask("/static/uploads/a.png") == (200, IMAGES["a.png"])
            assert ask("/") == (200, b"shop")


def test_a_port_that_is_taken(full: Site) -> None:
    """A server that cannot start ends with 1, not with 3, which would blame the database; and without a traceback."""
    with served(full) as ask:
        assert ask("/static/uploads/a.png")[0] == 200
        port = ask.__closure__[0].cell_contents  # type: ignore[attr-defined, misc]
        done = full.execute(None, "serve", *full.flags, "--port", str(port))
    assert done.code == 1
    assert done.err.splitlines()[-1] == "selfheal: the server did not start; what it said is above"


LATE_DRIVER = """
import sys, time
import aiosqlite.core as core
from selfheal import DatabaseUnavailable, UploadStore
from selfheal.scripts.common import run_on

real = core._connection_worker_thread

class Late:
    def __init__(self, queue):
        self.queue = queue
    def get(self):
        asked = self.queue.get()
        time.sleep(0.05)
        return asked

def _connection_worker_thread(queue):
    real(Late(queue))

core._connection_worker_thread = _connection_worker_thread
try:
    run_on(UploadStore(sys.argv[1], "sqlite:///" + sys.argv[1] + "/nowhere/a.db"), lambda store: store.database.count())
except DatabaseUnavailable:
    print("no answer")
time.sleep(0.2)
"""


def test_a_driver_that_is_late_to_say_that_it_could_not_connect(tmp_path: Path) -> None:
    """The loop of a command is not closed under the driver's thread: that would be told as a traceback."""
    command = [sys.executable, "-c", LATE_DRIVER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("no answer\n", "")
