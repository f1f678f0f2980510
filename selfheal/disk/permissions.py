"""Owners and modes: new files and directories are like the directory that they go to, whichever user runs selfheal."""

import os
import stat

from .features import DiskFeatures

_FILE, _DIRECTORY = 0o644, 0o755


def settle_file(fd: int, parent: os.stat_result, mode: int | None, features: DiskFeatures) -> None:
    """Give a new file the owner of its directory, as far as we may, and `mode`, whatever the umask.

    Without a mode it is 0644, and the group may write if it may in the directory.
    """
    is_same_group = _set_owner(fd, parent, features)
    like_parent = _FILE | (parent.st_mode & stat.S_IWGRP if is_same_group else 0)
    features.attempt("set modes", os.fchmod, fd, like_parent if mode is None else mode)


def settle_directory(fd: int, parent: os.stat_result, mode: int | None, features: DiskFeatures) -> None:
    """As `settle_file`, for a directory: without a mode it is 0755, and setgid is as in the directory above, too."""
    is_same_group = _set_owner(fd, parent, features)
    like_parent = _DIRECTORY | (parent.st_mode & (stat.S_ISGID | stat.S_IWGRP) if is_same_group else 0)
    features.attempt("set modes", os.fchmod, fd, like_parent if mode is None else mode)


def first_mode(mode: int | None) -> int:
    """Return the mode to make a directory with: it is never more open than in the end."""
    return _DIRECTORY if mode is None else mode & 0o777


def _set_owner(fd: int, parent: os.stat_result, features: DiskFeatures) -> bool:
    """Return whether the group is now that of the directory. Only root gives files to others."""
    user, group = os.geteuid(), os.getegid()
    uid = parent.st_uid if user == 0 else user
    if (uid, parent.st_gid) == (user, group):
        return True
    if user != 0 and not parent.st_mode & stat.S_ISGID:
        return False
    return features.attempt("set owners", os.fchown, fd, uid, parent.st_gid)
