"""The quarantine: directories that no server serves, for copies that must not be served until the database has them."""

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from ..names import OWN_PREFIX
from . import syscalls

QUARANTINE = f"{OWN_PREFIX}-quarantine"
PUBLIC_DIRECTORIES = ("static", "public", "www", "html", "public_html", "htdocs", "assets", "media")


class Quarantine:
    """A directory of mode 0700, by default beside the uploads, or beside the public directory that holds them.

    Where files cannot be moved there (another file system), it is a hidden directory below the uploads.
    """

    def __init__(self, uploads: Path, path: str | os.PathLike[str] | None) -> None:
        self.path = default_path(uploads.resolve()) if path is None else Path(path).absolute()
        self._inside = uploads / QUARANTINE

    def move(self, parent: int, name: str) -> Path:
        """Move the file of a name out of the directory `parent`; return its new path."""
        found = os.lstat(name.rpartition("/")[2], dir_fd=parent)  # makes no directories for a file that is gone
        if stat.S_ISDIR(found.st_mode):  # of other files
            raise syscalls.failure(errno.EISDIR, name)
        with contextlib.suppress(OSError):
            return _move(parent, name, self.path)
        if self._inside.is_symlink():
            raise syscalls.failure(errno.ELOOP, str(self._inside))
        return _move(parent, name, self._inside)

    def remove(self, path: Path) -> None:
        """Remove a file that was moved here, and the directories that are empty then."""
        path.unlink(missing_ok=True)
        base = self.path if path.is_relative_to(self.path) else self._inside
        _remove_empty(path.parent, base)

    def entries(self, age: float) -> Iterator[tuple[str, Path]]:
        """Yield the name and the path of every file that was moved here at least `age` seconds ago."""
        for base in (self.path, self._inside):
            for own in sorted(base.iterdir()) if base.is_dir() and not base.is_symlink() else ():
                if own.is_dir() and time.time() - own.stat().st_mtime >= age:
                    for path in sorted(own.rglob("*")):
                        if path.is_file() and not path.is_symlink():
                            yield str(path.relative_to(own)), path


def default_path(uploads: Path) -> Path:
    """Return a directory out of reach of a static file server: beside `uploads`, or beside the public directory."""
    place = uploads.parent
    public = next((above for above in (place, *place.parents) if above.name in PUBLIC_DIRECTORIES), None)
    if public is not None:
        place = public.parent
        while place.name in PUBLIC_DIRECTORIES:
            place = place.parent
    return place / f"{QUARANTINE}-{uploads.name}"


def _move(parent: int, name: str, quarantine: Path) -> Path:
    os.makedirs(quarantine, 0o700, exist_ok=True)
    own = quarantine / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
    own.mkdir(0o700)
    target = own / name
    try:
        os.makedirs(target.parent, exist_ok=True)
        with contextlib.suppress(OSError):  # a disk without links
            target.symlink_to("nothing")  # a file takes its place; a directory that has just got the name does not
        os.rename(name.rpartition("/")[2], target, src_dir_fd=parent)
    except OSError:
        target.unlink(missing_ok=True)
        _remove_empty(target.parent, quarantine)
        raise
    return target


def _remove_empty(directory: Path, base: Path) -> None:
    """Remove a directory and those above it that are empty; `base` too, if its name is ours."""
    kept = base.parent if base.name.startswith(QUARANTINE) else base
    with contextlib.suppress(OSError):  # not empty, or a mount point
        while directory != kept:
            directory.rmdir()
            directory = directory.parent
