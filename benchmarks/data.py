"""Files for the measurements: random bytes under the same names every time, created once."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .measure import BENCH, PROJECT

KIB, MIB, GIB = 2**10, 2**20, 2**30
PER_FOLDER = 200
os.environ["SELFHEAL_SETTLED_AFTER"] = "0"  # a migration would wait for files that were just made
MODULES = {"migrate": "migrate_images", "verify": "test_image_storage", "restore": "restore_images"}


def name_of(index: int) -> str:
    """Return the name of file number `index`."""
    return f"{index // PER_FOLDER:04}/{index:07}.jpg"


def files(count: int, size: int) -> Path:
    """Return a directory with `count` files of `size` random bytes, 200 per folder. Do not change its files."""
    place = BENCH / "data" / f"{count}x{size}"
    if not place.exists():
        unfinished = place.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        source = random.Random(f"{count}x{size}")
        for index in range(count):
            path = unfinished / name_of(index)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for start in range(0, size, 4 * MIB):
                    file.write(source.randbytes(min(4 * MIB, size - start)))
        unfinished.rename(place)
    warm(place)
    return place


def warm(place: Path) -> None:
    """Read every file below a directory, so that it is in the page cache."""
    subprocess.run(["find", place, "-type", "f", "-exec", "cat", "{}", "+"], stdout=subprocess.DEVNULL, check=True)


def selfheal(command: str, directory: Path, database: str, *arguments: str) -> list[str]:
    """Return the command line of one of the three bulk runs."""
    where = ["--directory", str(directory), "--database", database, "--quiet"]
    return [sys.executable, "-m", f"selfheal.scripts.{MODULES[command]}", *where, *arguments]


def migrate(directory: Path, database: str) -> None:
    """Store the files of a directory in a database."""
    subprocess.run(selfheal("migrate", directory, database), check=True, cwd=PROJECT)


def sqlite(path: Path) -> str:
    """Return the URL of a new SQLite database; an old one is removed."""
    for end in ("", "-journal", "-wal", "-shm"):
        Path(f"{path}{end}").unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite+aiosqlite:///{path}"


def remove(path: Path) -> None:
    """Remove a file or a directory, and sync."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    os.sync()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield an empty directory on the measured disk."""
    BENCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=BENCH) as place:
        yield Path(place)
