"""Exclusions: names that are no uploads (dotfiles, litter of other programs), and those that the user leaves out."""

import re
from collections.abc import Iterable
from fnmatch import translate

from ..errors import SettingsError

LITTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}  # of file managers, in any case
LITTER_PREFIX = "~$"  # locks of offices
LITTER_SUFFIXES = ("~", ".part", ".filepart", ".crdownload")  # backups of editors; transfers under way
LITTER_DIRECTORIES = {"@eadir", "#recycle", "$recycle.bin", "system volume information", "__macosx"}
CACHE_BELOW = "/CACHE/"  # django-imagekit's; in lower case it can be a folder of uploads


def is_litter(name: str) -> bool:
    """Whether a name is a dotfile or one that other programs leave behind, or is in a directory of that kind."""
    *folders, last = name.lower().split("/")
    return (
        name.startswith(".")
        or "/." in name
        or last in LITTER
        or last.endswith(LITTER_SUFFIXES)
        or last.startswith(LITTER_PREFIX)
        or (last.startswith("#") and last.endswith("#"))  # an editor saves there what is not saved yet
        or not LITTER_DIRECTORIES.isdisjoint(folders)
        or CACHE_BELOW in f"/{name}"
    )


class Exclusions:
    """Litter, and what `globs` match: the name of a file or directory, or its whole path if the glob has a `/`."""

    def __init__(self, globs: Iterable[str] = ()) -> None:
        bare = [globs] if isinstance(globs, str) else [glob.strip("/") for glob in globs]
        if isinstance(globs, str) or not all(bare):
            raise SettingsError(f"{globs!r} is no list of globs to exclude, such as ['*.tmp', 'thumbs/*']")
        self._is_empty = not bare
        self._parts = _any_of(glob for glob in bare if "/" not in glob)
        self._paths = _any_of(glob for glob in bare if "/" in glob)

    def covers(self, name: str) -> bool:
        """Whether a file that is not recorded is left alone."""
        return is_litter(name) or self.match(name)

    def match(self, name: str) -> bool:
        """Whether a glob matches a name, or a directory above it."""
        if self._is_empty:
            return False
        parts = name.split("/")
        above = ("/".join(parts[: end + 1]) for end in range(len(parts)))
        return any(map(self._parts.match, parts)) or any(map(self._paths.match, above))


def _any_of(globs: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, globs)) or "(?!)")
