"""The quarantine: a directory that no server serves, for copies that must not be served."""

import os
import secrets
from datetime import UTC, datetime
from pathlib import Path

from ..names import OWN_PREFIX

QUARANTINE = f"{OWN_PREFIX}-quarantine"
PUBLIC_DIRECTORIES = ("static", "public", "www", "html", "public_html", "htdocs", "assets", "media")


def default_path(uploads: Path) -> Path:
    """Return a directory out of reach of a static file server: beside `uploads`, or beside the public directory."""
    place = uploads.parent
    public = next((above for above in (place, *place.parents) if above.name in PUBLIC_DIRECTORIES), None)
    if public is not None:
        place = public.parent
        while place.name in PUBLIC_DIRECTORIES:
            place = place.parent
    return place / f"{QUARANTINE}-{uploads.name}"


def move(parent: int, name: str, quarantine: Path) -> Path:
    """Move the file of a name from the directory `parent` into a new directory of the quarantine; return its path."""
    os.makedirs(quarantine, 0o700, exist_ok=True)
    own = quarantine / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
    own.mkdir(0o700)
    target = own / name
    os.makedirs(target.parent, exist_ok=True)
    os.rename(name.rpartition("/")[2], target, src_dir_fd=parent)
    return target
