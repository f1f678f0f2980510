"""The temporary directory: it is made, shared, and removed with the files that killed processes left in it."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfheal.disk import syscalls
from selfheal.disk.staged_file import StagedFile
from selfheal.disk.temporary import TEMPORARY, sweep
from tests.support.os_errors import fails
from tests.support.special_files import dangling_link
from tests.support.staging import MODIFIED, NEW, OLD, WAYS, Root, named_only

# -- sweeping ---------------------------------------------------------------------------------------------------------


def make_temporary_files(root: Root, *names: str) -> None:
    """Make temporary files, as killed processes leave them."""
    (root.path / TEMPORARY).mkdir(mode=0o700, exist_ok=True)
    for name in names:
        (root.path / TEMPORARY / name).write_bytes(OLD)


def test_a_sweep_without_temporary_files(root: Root) -> None:
    """A sweep of a root without temporary files removes nothing."""
    (root.path / "tom.png").write_bytes(OLD)
    assert sweep(root.fd) == 0
    assert root.entries() == ["tom.png"]


def test_files_of_killed_processes_are_swept(root: Root) -> None:
    """A sweep removes the temporary files of killed processes and no other file, and returns their number."""
    (root.path / "tom.png").write_bytes(NEW)
    make_temporary_files(root, "a" * 32, "b" * 32)
    assert sweep(root.fd) == 2
    assert root.entries() == ["tom.png"]


def test_files_in_use_are_not_swept(root: Root) -> None:
    """A sweep does not remove a temporary file that is in use."""
    with root.stage() as staged:
        staged.write(NEW[:100])
        assert sweep(root.fd) == 0
        staged.write(NEW[100:])
        staged.seal(MODIFIED, 0o644)
        assert staged.publish()
    assert (root.path / "tom.png").read_bytes() == NEW
    assert root.entries() == ["tom.png"]


def test_files_of_killed_processes_are_swept_later(root: Root) -> None:
    """Temporary files of killed processes that a sweep could not remove because another file was staged go with the
    next sweep.
    """
    with root.stage() as staged:
        staged.write(NEW)
        make_temporary_files(root, "killed")
        sweep(root.fd)
        assert staged.publish()
    assert (root.path / "tom.png").read_bytes() == NEW
    sweep(root.fd)
    assert root.entries() == ["tom.png"]


@pytest.mark.parametrize("call", ["rename", "link"])
@pytest.mark.parametrize("before", [OLD, None], ids=["taken", "free"])
def test_a_sweep_during_a_replacement(
    root: Root, monkeypatch: pytest.MonkeyPatch, before: bytes | None, call: str
) -> None:
    """A sweep just before or after `rename` or `link` does not disturb a replacement."""
    if before is not None:
        root.put(before)
    real = getattr(os, call)

    def swept_around(*arguments: Any, **more: Any) -> None:
        sweep(root.fd)
        real(*arguments, **more)
        sweep(root.fd)

    monkeypatch.setattr(os, call, swept_around)
    root.put(NEW)
    assert (root.path / "tom.png").read_bytes() == NEW
    assert root.entries() == ["tom.png"]


@named_only
def test_a_sweep_before_the_lock(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep between making the temporary directory and locking it does not disturb staging."""
    real = fcntl.flock
    swept = []

    def after_a_sweep(fd: int, operation: int) -> None:
        if not swept:
            swept.append(True)
            sweep(root.fd)
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", after_a_sweep)
    root.put(NEW)
    assert swept
    assert (root.path / "tom.png").read_bytes() == NEW
    assert root.entries() == ["tom.png"]


def test_a_sweep_follows_no_link(root: Root, tmp_path: Path) -> None:
    """A sweep follows no symbolic link, neither at the temporary directory nor in it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_bytes(OLD)
    (root.path / TEMPORARY).symlink_to(tmp_path / "elsewhere")
    assert sweep(root.fd) == 0
    (root.path / TEMPORARY).unlink()
    make_temporary_files(root)
    (root.path / TEMPORARY / "link").symlink_to(tmp_path / "elsewhere" / "a")
    sweep(root.fd)
    assert (tmp_path / "elsewhere" / "a").read_bytes() == OLD


@pytest.mark.timeout(20)
@pytest.mark.parametrize("way", WAYS[:2], indirect=True)
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, dangling_link])
def test_a_sweep_is_not_stopped_by_special_files(root: Root, make: Callable[[Path], None]) -> None:
    """A directory, FIFO or link in the temporary directory does not block a sweep or make it fail."""
    make_temporary_files(root, "a" * 32, "z" * 32)
    make(root.path / TEMPORARY / "strange")
    assert sweep(root.fd) >= 2
    assert not (root.path / TEMPORARY / ("a" * 32)).exists()
    assert not (root.path / TEMPORARY / ("z" * 32)).exists()


def test_sweeps_at_the_same_time(root: Root) -> None:
    """Sweeps that run at the same time count each removed file once."""
    make_temporary_files(root, *(f"{number:032x}" for number in range(200)))
    swept: list[int] = []
    sweepers = [threading.Thread(target=lambda: swept.append(sweep(root.fd))) for _ in range(4)]
    for sweeper in sweepers:
        sweeper.start()
    for sweeper in sweepers:
        sweeper.join()
    assert len(swept) == 4
    assert sum(swept) == 200
    assert root.entries() == []


def test_staging_and_sweeping_at_the_same_time(root: Root) -> None:
    """Threads that stage, replace and sweep at the same time lose no file."""
    errors: list[object] = []

    def work(letter: str) -> None:
        try:
            for number in range(40):
                for data in (OLD[:100], letter.encode() * 100):
                    root.put(data, f"{letter}{number}.png")
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(letter,)) for letter in "abcd"]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        sweep(root.fd)
    for worker in workers:
        worker.join()
    assert errors == []
    assert root.entries() == sorted(f"{letter}{number}.png" for letter in "abcd" for number in range(40))
    assert {(root.path / f"{letter}39.png").read_bytes() for letter in "abcd"} == {
        letter.encode() * 100 for letter in "abcd"
    }


# -- the temporary directory ------------------------------------------------------------------------------------------


@named_only
def test_a_temporary_directory_that_always_disappears(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the temporary directory disappears after every `mkdir`, staging raises EBUSY instead of trying forever."""
    monkeypatch.setattr(os, "mkdir", lambda *_, **__: None)
    with pytest.raises(OSError) as caught:
        root.stage()
    assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, TEMPORARY)


@named_only
def test_a_temporary_directory_that_another_removes_is_made_again(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another process removes the temporary directory before it is opened, it is made again."""
    real, made = os.mkdir, list[str]()

    def make_and_lose(path: str, mode: int, *, dir_fd: int) -> None:
        real(path, mode, dir_fd=dir_fd)
        made.append(path)
        if len(made) == 1:
            os.rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", make_and_lose)
    root.put(NEW)
    assert made == [TEMPORARY, TEMPORARY]
    assert (root.path / "tom.png").read_bytes() == NEW
    assert root.entries() == ["tom.png"]


@named_only
def test_a_temporary_directory_that_cannot_be_opened_is_not_left(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the new temporary directory cannot be opened (no descriptors), it is removed."""
    monkeypatch.setattr(syscalls, "open_directory", fails(errno.EMFILE))
    with pytest.raises(OSError) as caught:
        StagedFile(root.directory, root.fd, "tom.png")
    assert caught.value.errno == errno.EMFILE
    assert root.entries() == []


@named_only
@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, "link"], ids=["file", "fifo", "link"])
def test_the_temporary_directory_is_no_link_and_no_file(
    root: Root, tmp_path: Path, make: Callable[[Path], None] | str
) -> None:
    """If a link or a file has the name of the temporary directory, staging raises and writes nowhere."""
    (tmp_path / "elsewhere").mkdir()
    if isinstance(make, str):
        (root.path / TEMPORARY).symlink_to(tmp_path / "elsewhere")
    else:
        make(root.path / TEMPORARY)
    with pytest.raises(OSError):
        root.put(NEW)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert root.names() == []
