"""The quarantine: directories that no server serves, for copies that must not be served until the database has them."""

import contextlib
import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from ..names import OWN_PREFIX
from . import syscalls
from .readable import ABSENT
from .root import TRIES

QUARANTINE = f"{OWN_PREFIX}-quarantine"
PLACEHOLDER = f"{OWN_PREFIX}-nothing"  # the target of the link whose place a file takes
OWNER = f"{OWN_PREFIX}-of"  # a link to the uploads directory that a copy is from
_OWN = re.compile(r"\d{8}T\d{6}-[0-9a-f]{8}")  # the time, and something random
PUBLIC_DIRECTORIES = ("static", "public", "www", "html", "public_html", "htdocs", "assets", "media")


class Quarantine:
    """A directory of mode 0700, by default beside the uploads, or beside the public directory that holds them.

    Where files cannot be moved there (another file system), it is a hidden directory below the uploads.
    """

    def __init__(self, uploads: Path, path: str | os.PathLike[str] | None) -> None:
        self._uploads = uploads.resolve()
        self.path = default_path(self._uploads) if path is None else Path(path).absolute()
        self._inside = uploads / QUARANTINE

    def move(self, parent: int, name: str) -> Path:
        """Move the file of a name out of the directory `parent`; return its new path."""
        found = os.lstat(name.rpartition("/")[2], dir_fd=parent)  # makes no directories for a file that is gone
        if stat.S_ISDIR(found.st_mode):  # of other files
            raise syscalls.failure(errno.EISDIR, name)
        with contextlib.suppress(OSError):
            return self._move(parent, name, self.path)
        if self._inside.is_symlink():
            raise syscalls.failure(errno.ELOOP, str(self._inside))
        return self._move(parent, name, self._inside)

    def remove(self, path: Path) -> None:
        """Remove a file that was moved here, and the directories that are empty then."""
        path.unlink(missing_ok=True)
        base = self._inside if path.is_relative_to(self._inside) else self.path
        _remove_empty(path.parent, base)

    def entries(self, age: float, errors: list[OSError]) -> Iterator[tuple[str, Path]]:
        """Yield the name and the path of every file that was moved here at least `age` seconds ago.

        What cannot be read is left out, and why is added to `errors`.
        """
        for _, own in self._moves(age, errors):
            for folder, _, files in _walk(own, errors):
                for path in (Path(folder, file) for file in sorted(files)):
                    if path.is_file() and not path.is_symlink():
                        yield str(path.relative_to(own)), path

    def sweep(self, age: float) -> None:
        """Remove what processes that died left here at least `age` seconds ago, except files."""
        for base, own in self._moves(age, []):
            for folder, _, files in _walk(own, [], topdown=False):
                for file in files:
                    _remove_placeholder(Path(folder, file))
                _remove_empty(Path(folder), base)
        for base in self._places():
            _remove_empty(base, base)

    def _places(self) -> tuple[Path, ...]:
        return (self.path,) if self._inside.is_symlink() else (self._inside, self.path)

    def _moves(self, age: float, errors: list[OSError]) -> Iterator[tuple[Path, Path]]:
        """Yield the place and the directory of every move that was made at least `age` seconds ago."""
        for base in self._places():
            for own in _made(base, errors):
                try:
                    # with 0 also what a disk's clock that is ahead has made
                    is_old = not age or time.time() - own.stat().st_mtime >= age
                    is_ours = base == self._inside or self._is_ours(own)
                except OSError as error:
                    _add(errors, error)
                    continue
                if is_old and is_ours:
                    yield base, own

    def _is_ours(self, own: Path) -> bool:
        """Whether a move was made for this uploads directory, or for one that is gone. Raises `OSError`."""
        try:
            owner = os.readlink(own / OWNER)
            if owner == str(self._uploads):
                return True
            theirs = os.stat(owner)
        except (FileNotFoundError, NotADirectoryError):
            return True
        return self._uploads.exists() and os.path.samestat(theirs, os.stat(self._uploads))

    def _move(self, parent: int, name: str, base: Path) -> Path:
        own = _make_own(base, self._uploads)
        *folders, last = name.split("/")
        here = own
        try:
            for folder in folders:  # only below `own`: it has a mode and an owner
                here /= folder
                here.mkdir()
            target = here / last
            with contextlib.suppress(OSError):  # a disk without links
                # a file takes its place; a directory that has just got the name does not
                target.symlink_to(PLACEHOLDER)
            os.rename(last, target, src_dir_fd=parent)
        except OSError:
            _remove_placeholder(here / last)  # not a file: a rename may fail that was done
            _remove_empty(here, base)
            raise
        return target


def default_path(uploads: Path) -> Path:
    """Return a directory out of reach of a static file server: beside `uploads`, or beside the public directory."""
    place = uploads.parent
    public = next((above for above in (place, *place.parents) if above.name in PUBLIC_DIRECTORIES), None)
    if public is not None:
        place = public.parent
        while place.name in PUBLIC_DIRECTORIES:
            place = place.parent
    return place / f"{QUARANTINE}-{uploads.name}"


def _make_own(quarantine: Path, uploads: Path) -> Path:
    """Make a directory for one move. Others remove the quarantine whenever it is empty."""
    for _ in range(TRIES):
        own = quarantine / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
        try:
            os.makedirs(quarantine, 0o700, exist_ok=True)
            own.mkdir(0o700)
        except (FileExistsError, FileNotFoundError) as error:
            failure = error
        else:
            with contextlib.suppress(OSError):  # a disk without links
                (own / OWNER).symlink_to(uploads)
            return own
    raise failure


def _made(base: Path, errors: list[OSError]) -> list[Path]:
    """Return the directories of all moves to a place."""
    try:
        with os.scandir(base) as entries:
            ours = [
                entry.name for entry in entries if _OWN.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
    except OSError as error:
        _add(errors, error)
        return []
    return [base / name for name in sorted(ours)]


def _walk(top: Path, errors: list[OSError], *, topdown: bool = True) -> Iterator[tuple[str, list[str], list[str]]]:
    return os.walk(top, topdown, lambda error: _add(errors, error))


def _add(errors: list[OSError], error: OSError) -> None:
    if error.errno not in ABSENT:  # another process removed it
        errors.append(error)


def _remove_placeholder(path: Path) -> None:
    """Remove the link whose place a file did not take. A file that takes it at this moment stays."""
    with contextlib.suppress(OSError):  # no link, or another process removed it
        if os.readlink(path) == PLACEHOLDER:
            moved = path.with_name(f"{PLACEHOLDER}-{secrets.token_hex(4)}")
            os.rename(path, moved)
            if moved.is_symlink():
                moved.unlink()
            else:
                os.rename(moved, path)


def _remove_empty(directory: Path, base: Path) -> None:
    """Remove a directory and those above it that are empty; `base` too, if its name is ours."""
    kept = base.parent if base.name.startswith(QUARANTINE) else base
    with contextlib.suppress(OSError):  # not empty, or a mount point
        while directory != kept:
            if os.listdir(directory) == [OWNER]:
                (directory / OWNER).unlink()
            directory.rmdir()
            directory = directory.parent
