"""The root is closed while nothing uses it, so that its file system can be unmounted under a running server."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from selfheal.aio.threads import THREAD_NAME
from selfheal.disk.directory import UploadsDirectory
from tests.support.constants import set_constants
from tests.support.disk_files import OTHER, PICTURE, put, read
from tests.support.mounts import Mount
from tests.support.open_files import descriptors_of
from tests.support.waiting import wait_until

Uploads = Callable[..., UploadsDirectory]


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The root is closed after a second without use."""
    set_constants(monkeypatch, CLOSED_AFTER=1.0, LOOK_EVERY=0.1, CHECK_EVERY=0.1)


@pytest.fixture
def watches() -> Callable[[], int]:
    """Return how many threads watch a root, except those of earlier tests."""
    before = set(threading.enumerate())

    def count() -> int:
        return sum(thread.name.startswith(f"{THREAD_NAME}-idle") for thread in set(threading.enumerate()) - before)

    return count


def test_an_idle_root_is_closed_and_opened_again(disk: UploadsDirectory, watches: Callable[[], int]) -> None:
    """After a while without use no descriptor of the root and no thread is left; the next call opens it again."""
    for data in (PICTURE, OTHER):
        put(disk, "tom.png", data)
        assert descriptors_of(disk.path) == 1
        wait_until(lambda: descriptors_of(disk.path) == 0 and watches() == 0)
        assert read(disk, "tom.png") == data


def test_a_root_in_use_stays_open(disk: UploadsDirectory, watches: Callable[[], int]) -> None:
    """While files are read again and again, the root stays open."""
    put(disk, "tom.png")
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        assert read(disk, "tom.png") == PICTURE
        assert descriptors_of(disk.path) == 1
        time.sleep(0.02)
    assert watches() == 1


def test_a_file_being_read_is_not_disturbed(disk: UploadsDirectory) -> None:
    """A file that was opened before the root was closed is read to its end."""
    put(disk, "cats/tom.png")
    file = disk.open("cats/tom.png")
    assert file is not None
    wait_until(lambda: descriptors_of(disk.path) == 0)
    with file:
        assert file.read_waiting(0, len(PICTURE) + 1) == PICTURE


def test_close_ends_the_thread(disk: UploadsDirectory, watches: Callable[[], int]) -> None:
    """`close` leaves no thread."""
    put(disk, "tom.png")
    assert watches() == 1
    disk.close()
    wait_until(lambda: watches() == 0)


def test_a_child_process_closes_its_own_root(disk: UploadsDirectory) -> None:
    """After a fork the child, which has no thread of its parent, also closes the root when it is idle."""
    put(disk, "tom.png")
    child = os.fork()
    if not child:
        code = 1
        try:
            assert read(disk, "tom.png") == PICTURE
            time.sleep(0.5)
            assert read(disk, "tom.png") == PICTURE
            wait_until(lambda: descriptors_of(disk.path) == 0)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_a_volume_is_unmounted_under_a_running_server(
    uploads: Uploads, mount: Callable[[str], Mount], tmp_path: Path
) -> None:
    """An ordinary `umount` works once the server is idle, and what is mounted then is used."""
    volume = mount("size=1m")
    disk = uploads(volume.path)
    put(disk, "tom.png")
    wait_until(lambda: subprocess.run(["umount", volume.path], capture_output=True, check=False).returncode == 0)
    assert read(disk, "tom.png") is None
    wait_until(lambda: descriptors_of(disk.path) == 0)
    mount("size=1m")
    put(disk, "tom.png", OTHER)
    assert read(disk, "tom.png") == OTHER
