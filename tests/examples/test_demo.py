"""The demo: it succeeds only if every byte is restored, says so plainly, and leaves nothing running."""

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
from tests.support import ROOT

COMMAND = [sys.executable, "-W", "error", "-m", "examples.demo"]
ENVIRON = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"PYTHONPATH": str(ROOT)}
ORIGINALS = 12


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a pseudo-terminal: the test's, and the program's."""
    ours, theirs = os.openpty()
    yield ours, theirs
    os.close(ours)


def output_until(ours: int, wanted: str) -> str:
    """Return the output on the terminal up to `wanted`."""
    output = b""
    while wanted.encode() not in output:
        output += os.read(ours, 4096)
    return output.decode()


def is_served(url: str) -> bool:
    """Return whether a server accepts connections at a URL of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) == 0


def is_gone(url: str) -> bool:
    """Return whether the server at a URL ends within 20 s."""
    end = time.monotonic() + 20
    while is_served(url) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_served(url)


def test_without_a_terminal_it_ends_by_itself(home: Path) -> None:
    """Exit code 0, nothing on standard error, no colours, output that fits 80 columns, and a new `.demo`."""
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
    assert len(list((home / ".demo" / "uploads").glob("[!.]*.*"))) == ORIGINALS
    assert not (home / ".demo" / "uploads" / "of_yesterday.png").exists()


def test_on_a_terminal_it_serves_until_ctrl_c(home: Path, terminal: tuple[int, int]) -> None:
    """On a terminal the gallery stays open until Ctrl-C; then the exit code is 0."""
    ours, theirs = terminal
    with subprocess.Popen(COMMAND, env=ENVIRON, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        output = output_until(ours, "Ctrl-C")
        assert "\x1b[32m" in output
        url = re.findall(r"http://127\.0\.0\.1:\d+", output)[0]
        assert is_served(url)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the demo and to its server
        assert process.wait(30) == 0
    assert is_gone(url)


def test_when_it_is_terminated_its_server_ends_too(home: Path) -> None:
    """After SIGTERM no server is left, and the exit code is not 0."""
    with subprocess.Popen(COMMAND, env=ENVIRON, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = next(found[0] for line in process.stdout if (found := re.findall(r"http://127\.0\.0\.1:\d+", line)))
        process.terminate()
        assert process.wait(30) == 130
    assert is_gone(url)


def damage_a_chunk() -> None:
    """Lose the disk, and damage the bytes of one picture in the database."""
    with sqlite3.connect(demo.DATABASE) as database:
        database.execute(
            "UPDATE image_chunk SET data = zeroblob(length(data)) WHERE rowid = (SELECT min(rowid) FROM image_chunk)"
        )
    database.close()
    demo.wipe()


def lose_a_record() -> None:
    """Lose the disk, and the record of one picture in the database."""
    with sqlite3.connect(demo.DATABASE) as database:
        database.execute("DELETE FROM image_storage WHERE name = (SELECT min(name) FROM image_storage)")
    database.close()
    demo.wipe()


def change_a_byte() -> None:
    """Lose all files but one, and change a byte of that one."""
    (first, *others) = sorted(path for path in demo.UPLOADS.iterdir() if path.name[0] != ".")
    first.write_bytes(first.read_bytes()[:-1] + b"?")
    for file in others:
        file.unlink()


def change_a_time() -> None:
    """Lose all files but one, and change the mtime of that one, and so its ETag and Last-Modified."""
    (first, *others) = sorted(path for path in demo.UPLOADS.iterdir() if path.name[0] != ".")
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
    """If one picture is damaged, forgotten or changed, the demo shows it and exits with 1."""
    monkeypatch.setattr(demo, "pictures", lambda: originals)
    assert demo.main(accident) == 1
    output = capsys.readouterr().out
    assert f"{ORIGINALS - 1} of {ORIGINALS} came back" in output
    assert len([line for line in output.splitlines() if "OTHER" in line]) == 1
    assert "Not everything came back." in output


def test_it_fails_if_the_gallery_does_not_start(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the server cannot start, the demo says so in one line without a traceback and exits with 1."""
    monkeypatch.setattr(demo, "DATABASE", home / "nowhere" / "gallery.db")
    monkeypatch.setattr(demo, "pictures", lambda: {"a.png": b""})
    assert demo.main() == 1
    assert "The gallery gives no answer" in capsys.readouterr().out
