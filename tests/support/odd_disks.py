"""Disks that ignore case: real ones (exFAT and FAT, through FUSE), and one that is emulated in this process."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from selfheal.disk import syscalls
from tests.support.requirements import needs

MIB = 1024 * 1024
REAL = {
    "exfat": ("mkfs.exfat {image}", "mount.exfat-fuse {device} {point}", "apt-get install exfatprogs exfat-fuse"),
    "fat": ("mkfs.vfat {image}", "fusefat -o rw+ {image} {point}", "apt-get install dosfstools fusefat"),
    "ntfs": ("mkfs.ntfs -q -F {image}", "ntfs-3g {image} {point}", "apt-get install ntfs-3g"),
}
"""How to format and to mount each real file system, and the command that installs what that needs."""


def mounted(kind: str, place: Path) -> Iterator[Path]:
    """Mount a new file system of a kind below `place`; skip the test where that is not possible."""
    format_it, mount_it, install = REAL[kind]
    if not all(shutil.which(command.split()[0]) for command in (format_it, mount_it)):
        needs(kind, install)
    if os.geteuid() != 0:
        needs(f"the right to mount {kind}", "the tests as root")
    image, point = place / f"{kind}.img", place / kind
    point.mkdir()
    with open(image, "wb") as file:
        file.truncate(16 * MIB)
    _run(format_it.format(image=image))
    device = _run(f"losetup -f --show {image}").strip() if "{device}" in mount_it else ""
    try:
        _run(mount_it.format(image=image, device=device, point=point))
        yield point
    finally:
        subprocess.run(["umount", "-l", point], check=False, capture_output=True)
        if device:
            subprocess.run(["losetup", "-d", device], check=False, capture_output=True)


def _run(command: str) -> str:
    program, *arguments = command.split()
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        needs(f"a kernel on which `{program}` works", f"the tests elsewhere; it says {done.stderr.strip()!r}")
    return done.stdout


def ignore_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every system call below an open directory find names in any case, and list them as they were made."""
    for call in ("lstat", "stat", "open", "mkdir", "rmdir", "unlink", "utime"):
        monkeypatch.setattr(os, call, _with_actual_name(getattr(os, call)))
    for call in ("link", "rename"):
        monkeypatch.setattr(os, call, _with_actual_names(getattr(os, call)))
    openat2, open_known = syscalls._openat2, syscalls.open_known
    monkeypatch.setattr(syscalls, "_openat2", lambda root, path, *more: openat2(root, _actual(root, path), *more))
    monkeypatch.setattr(
        syscalls, "open_known", lambda root, path: open_known(root, os.fsencode(_actual(root, os.fsdecode(path))))
    )


def _actual(directory: int, path: str) -> str:
    """Return a path as it is spelled on disk; what is not there stays as it is."""
    here, parts = Path(f"/proc/self/fd/{directory}"), list[str]()
    for part in path.split("/"):
        names = os.listdir(here.joinpath(*parts)) if here.joinpath(*parts).is_dir() else []
        same = [name for name in names if name.casefold() == part.casefold()]
        parts.append(part if part in names or not same else same[0])
    return "/".join(parts)


def _with_actual_name(call: Callable[..., Any]) -> Callable[..., Any]:
    def calling(path: Any, *arguments: Any, dir_fd: int | None = None, **more: Any) -> Any:
        if dir_fd is None:
            return call(path, *arguments, **more)
        return call(_actual(dir_fd, path), *arguments, dir_fd=dir_fd, **more)

    return calling


def _with_actual_names(call: Callable[..., Any]) -> Callable[..., Any]:
    def calling(source: str, target: Any, **more: Any) -> Any:
        if not str(source).startswith("/"):
            source = _actual(more["src_dir_fd"], source)
        if "dst_dir_fd" in more:
            target = _actual(more["dst_dir_fd"], target)
        return call(source, target, **more)

    return calling
