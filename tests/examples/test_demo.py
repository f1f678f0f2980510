"""The demo: it ends well only if every byte came back, says so plainly, and leaves nothing running."""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples import demo
from examples.pictures import pictures
from tests.support import ROOT

COMMAND = [sys.executable, "-X", "dev", "-W", "error", "-m", "examples.demo"]
ENVIRON = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"PYTHONPATH": str(ROOT)}
ORIGINALS = 12


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def originals() -> dict[str, bytes]:
    """The demo's pictures, made once."""
    return pictures()


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal: ours, and the one for a program."""
    ours, theirs = os.openpty()
    yield ours, theirs
    os.close(ours)


def said_until(ours: int, wanted: str) -> str:
    """What a program writes to its terminal until it has written `wanted`."""
    said = b""
    while wanted.encode() not in said:
        said += os.read(ours, 4096)
    return said.decode()


def is_served(url: str) -> bool:
    """Whether somebody answers at a URL of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) == 0


def is_gone(url: str) -> bool:
    """Whether nobody answers there any more, or soon will not."""
    end = time.monotonic() + 20
    while is_served(url) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_served(url)


def test_without_a_terminal_it_ends_by_itself(home: Path) -> None:
    """Exit 0, nothing on standard error, no colours, a page of text that fits 80 columns, and a fresh `.demo`."""
    (home / ".demo" / "uploads").mkdir(parents=True)
    (home / ".demo" / "uploads" / "of_yesterday.png").touch()
    done = subprocess.run(COMMAND, env=ENVIRON, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.stderr == ""
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 80
    assert f"{ORIGINALS} of {ORIGINALS} files are gone" in done.stdout
    assert f"{ORIGINALS} of {ORIGINALS} came back" in done.stdout
    assert len(re.findall(r"^ +\S+\.\w+ +200 .*same +same +same *$", done.stdout, re.MULTILINE)) == ORIGINALS
    assert "Everything came back." in done.stdout
    assert len(list((home / ".demo" / "uploads").glob("*.*"))) == ORIGINALS
    assert not (home / ".demo" / "uploads" / "of_yesterday.png").exists()


def test_on_a_terminal_it_serves_until_ctrl_c(home: Path, terminal: tuple[int, int]) -> None:
    """The gallery stays open to be looked at; Ctrl-C closes it, and that is a good end: exit 0."""
    ours, theirs = terminal
    with subprocess.Popen(COMMAND, env=ENVIRON, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        said = said_until(ours, "Ctrl-C")
        assert "\x1b[32m" in said
        url = re.findall(r"http://127\.0\.0\.1:\d+", said)[0]
        assert is_served(url)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the demo and to its server
        assert process.wait(30) == 0
    assert is_gone(url)


def test_when_it_is_terminated_its_server_ends_too(home: Path) -> None:
    """SIGTERM in the middle leaves no server behind, and is no success."""
    with subprocess.Popen(COMMAND, env=ENVIRON, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = next(found[0] for line in process.stdout if (found := re.findall(r"http://127\.0\.0\.1:\d+", line)))
        process.terminate()
        assert process.wait(30) == 130
    assert is_gone(url)


def damage_a_chunk() -> None:
    """The disk is lost, and one picture's bytes in the database are no longer what they were."""
    with sqlite3.connect(demo.DATABASE) as database:
        database.execute(
            "UPDATE image_chunk SET data = zeroblob(length(data)) WHERE rowid = (SELECT min(rowid) FROM image_chunk)"
        )
    database.close()
    demo.wipe()


def lose_a_record() -> None:
    """The disk is lost, and the database has forgotten one picture."""
    with sqlite3.connect(demo.DATABASE) as database:
        database.execute("DELETE FROM image_storage WHERE name = (SELECT min(name) FROM image_storage)")
    database.close()
    demo.wipe()


def change_a_byte() -> None:
    """All but one file are lost, and in that one a byte is another."""
    (first, *others) = sorted(path for path in demo.UPLOADS.iterdir() if path.is_file())
    first.write_bytes(first.read_bytes()[:-1] + b"?")
    for file in others:
        file.unlink()


def change_a_time() -> None:
    """All but one file are lost, and that one has another time: its ETag and Last-Modified are others."""
    (first, *others) = sorted(path for path in demo.UPLOADS.iterdir() if path.is_file())
    os.utime(first, (1e9, 1e9))
    for file in others:
        file.unlink()


@pytest.mark.parametrize("accident", [damage_a_chunk, lose_a_record, change_a_byte, change_a_time])
def test_it_fails_if_one_picture_is_not_the_same(
    home: Path,
    originals: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    accident: Callable[[], None],
) -> None:
    """One picture that is damaged, forgotten, changed or dated anew is shown as such, and the demo exits 1."""
    monkeypatch.setattr(demo, "pictures", lambda: originals)
    assert demo.main(accident) == 1
    said = capsys.readouterr().out
    assert f"{ORIGINALS - 1} of {ORIGINALS} came back" in said
    assert len([line for line in said.splitlines() if "OTHER" in line]) == 1
    assert "Not everything came back." in said


def test_it_fails_if_the_gallery_does_not_start(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that cannot start is said in one line, without a traceback of the demo's own, and the demo exits 1."""
    monkeypatch.setattr(demo, "DATABASE", home / "nowhere" / "gallery.db")
    monkeypatch.setattr(demo, "pictures", lambda: {"a.png": b""})
    assert demo.main() == 1
    assert "The gallery gives no answer" in capsys.readouterr().out
