"""The progress bar on a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess

import pytest

from selfheal.content.sources import CHUNK
from tests.support.command_line import SECONDS, SLOW_DISK, Site, environment
from tests.support.files import noise, write_file

SIZE = 40 * CHUNK


def shown_by(site: Site, *arguments: str) -> tuple[int, str]:
    """Run a command with a disk that reads and writes 3 MB a second; return its exit code and what the terminal got."""
    (site.home / "sitecustomize.py").write_text(SLOW_DISK)
    slow = {"SLOW": str(site.home / "slow"), "PYTHONPATH": str(site.home), "PYTHONDONTWRITEBYTECODE": "1"}
    main, terminal = pty.openpty()
    shown = b""
    with os.fdopen(main, "rb", buffering=0) as reader:
        process = site.start(
            None,
            *arguments,
            *site.flags,
            env=environment(**slow, COLUMNS="120"),
            stdout=subprocess.DEVNULL,
            stderr=terminal,
        )
        os.close(terminal)
        try:
            while piece := reader.read(65536):
                shown += piece
        except OSError:  # EIO: the process has closed the terminal
            pass
    return process.wait(SECONDS), shown.decode()


@pytest.mark.parametrize("jobs", ["1", "4"])
@pytest.mark.parametrize("command", ["migrate", "verify", "restore", "restore --verify"])
def test_the_bar_moves_during_one_large_file(site: Site, command: str, jobs: str) -> None:
    """The bytes on the bar grow while one large file is stored, checked or restored, and never past its size."""
    large = write_file(site.directory / "large.bin", noise(SIZE))
    if command != "migrate":
        assert site.run("migrate").code == 0
    if command == "restore":
        large.unlink()
    code, shown = shown_by(site, *command.split(), "--jobs", jobs)
    assert code == 0, shown
    sizes = [float(size) for size in re.findall(r"0(?: of 1)? files · ([0-9.]+) MB · ", shown)]
    assert len(set(sizes)) >= 3, shown
    assert sizes == sorted(sizes)
    assert sizes[-1] <= SIZE / 10**6 + 0.1
    assert ("0 of 1 files" in shown) is (command != "migrate")
