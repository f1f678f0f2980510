"""`Listing`: whether names have regular files, by reading each directory once."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from selfheal import UploadStore
from selfheal.disk.listing import Listing
from tests.support.constants import set_constants
from tests.support.files import write_file


@pytest.mark.parametrize(("listed_at_most", "folders_at_most"), [(2, 32), (100_000, 2), (100_000, 32)])
async def test_has_all(
    sqlite_store: UploadStore,
    directory: Path,
    tmp_path: Path,
    listed_at_most: int,
    folders_at_most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One look at many names gives the same answer as a look at each, in any folders, and follows no link."""
    set_constants(monkeypatch, LISTED_AT_MOST=listed_at_most)
    set_constants(monkeypatch, FOLDERS_AT_MOST=folders_at_most)
    random = Random(7)
    folders = ("", "a/", "a/b/", "a/b/c/", "a!/", "a0/", "b/")
    all_names = [f"{folder}{last}" for folder in folders for last in ("0", "1.png", "x", "z.gif")]
    existing = random.sample(all_names, len(all_names) * 3 // 4)
    for name in existing:
        write_file(directory / name, b"")
    for name in ("0", "1.png"):
        write_file(tmp_path / "elsewhere" / name, b"")
        all_names.append(f"a/link/{name}")
        all_names.append(f"link/{name}")
    for link in ("a/link", "link"):
        (directory / link).symlink_to(tmp_path / "elsewhere")
    for _ in range(3000):
        wanted = random.sample(existing, random.randint(1, 6)) + random.sample(all_names, random.randint(0, 1))
        assert Listing(sqlite_store.disk).has_all(wanted) == set(wanted).issubset(existing), wanted


async def test_files_between_subfolders(
    sqlite_store: UploadStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is read once, also if its files and its subfolders alternate in the order of names."""
    below = [f"{number}/tom.png" for number in range(40)]
    names = [f"a/{number}{rest}" for number in range(5) for rest in (".png", *(f"/{one}" for one in below))]
    for name in names:
        write_file(directory / name, b"")
    read, scandir = Counter[int](), os.scandir

    def counting(fd: int) -> Any:
        read[os.fstat(fd).st_ino] += 1
        return scandir(fd)

    sqlite_store.disk.root()
    monkeypatch.setattr(os, "scandir", counting)
    listing = Listing(sqlite_store.disk)
    assert all(map(listing.has, sorted(names)))
    assert len(read) == 201
    assert set(read.values()) == {1}
