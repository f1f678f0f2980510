"""Exclusions: which files on disk are no uploads, and which the user leaves out."""

from __future__ import annotations

import pickle

import pytest

from selfheal import SettingsError, UploadStore
from selfheal.disk.exclusions import Exclusions, is_litter

LITTER = (
    ".htaccess",
    "cats/._tom.png",
    ".nfs000000000a1b",
    "cats/.fuse_hidden0001",
    ".Trash-1000/files/tom.png",
    ".git/config",
    "cats/.thumbnails/tom.png",
    ".x.swp",
    "desktop.ini",
    "cats/Desktop.INI",
    "thumbs.db",
    "cats/Thumbs.db",
    "ehthumbs.db",
    "Icon\r",
    "@eaDir/tom.png/SYNOFILE_THUMB_M.png",
    "cats/@EADIR/x.png",
    "#recycle/tom.png",
    "$RECYCLE.BIN/x.png",
    "System Volume Information/x",
    "__MACOSX/cats/tom.png",
    "CACHE/images/tom/1.jpg",
    "movie.mp4.part",
    "cats/tom.png.PART",
    "movie.mp4.crdownload",
    "notes.txt~",
    "#notes.txt#",
    "~$report.docx",
)
UPLOADS = (
    "tom.png",
    "4913",  # an editor's test file for a moment, but also the avatar of a user with this number
    "avatars/4913",
    "cache/tom.png",
    "CACHE",
    "CACHE.png",
    "part",
    "parts/tom.part.png",
    "~tom.png",
    "#1.png",
    "tom~.png",
    "thumbs.db.png",
    "thumbs.db/tom.png",
    "cats.part/tom.png",
    "lost+found/tom.png",
    "@2x.png",
)


@pytest.mark.parametrize("name", LITTER)
def test_litter(name: str) -> None:
    """Dotfiles and what other programs leave behind are litter, in any folder."""
    assert is_litter(name)
    assert Exclusions().covers(name)
    assert not Exclusions().match(name)


@pytest.mark.parametrize("name", UPLOADS)
def test_names_that_are_no_litter(name: str) -> None:
    """A name that only resembles litter is an upload."""
    assert not is_litter(name)
    assert not Exclusions().covers(name)


@pytest.mark.parametrize(
    ("glob", "matched", "others"),
    [
        ("*.tmp", ("a.tmp", "cats/a.tmp", "x.tmp/tom.png"), ("a.tmp.png", "tmp", "A.TMP")),
        ("thumbs", ("thumbs", "thumbs/tom.png", "cats/thumbs/tom.png"), ("thumbs2/tom.png", "mythumbs")),
        ("thumbs/", ("thumbs/tom.png", "cats/thumbs/tom.png"), ("thumbs2/tom.png",)),
        ("cats/*", ("cats/tom.png", "cats/small/tom.png"), ("cats", "big/cats/tom.png", "cats.png")),
        ("/cats/small", ("cats/small/tom.png", "cats/small"), ("cats/smaller/tom.png", "small/tom.png")),
        ("[ab]?.png", ("a1.png", "cats/b2.png"), ("c1.png", "a.png", "a12.png")),
        ("a+b(1).png", ("a+b(1).png",), ("aab1.png",)),
        ("*", ("tom.png", "cats/tom.png"), ()),
    ],
)
def test_globs(glob: str, matched: tuple[str, ...], others: tuple[str, ...]) -> None:
    """A glob matches a file or directory in any folder; one with a `/` matches a path; what is below goes with it."""
    exclusions = pickle.loads(pickle.dumps(Exclusions([glob])))  # it is sent to other processes
    assert all(map(exclusions.match, matched))
    assert all(map(exclusions.covers, matched))
    assert not any(map(exclusions.match, others))
    assert not exclusions.match("other/dog.jpg") or glob == "*"


@pytest.mark.parametrize("globs", ["*.tmp", [""], ["*.tmp", "/"]])
def test_no_list_of_globs(globs: str | list[str]) -> None:
    """A text, whose every letter would be a glob, and an empty glob are refused."""
    with pytest.raises(SettingsError, match="no list of globs"):
        UploadStore("uploads", "sqlite://", exclude=globs)
