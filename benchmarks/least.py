"""A minimal restore or migration of small files in plain Python: `restore|migrate DIRECTORY DATABASE`.

It makes the same system calls and statements in the same batches, in one thread, without any safety: it does not read a
record again, refuses and reports nothing, and stops at the first error. The difference to it is the cost of selfheal.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sqlite3
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

AT_ONCE = 256
RECORD = "INSERT INTO image_storage (name, sha256, size, content_type, modified_ns) VALUES (?, ?, ?, 'image/jpeg', ?)"
BLOB = "INSERT INTO image_blob (sha256, size, chunks) VALUES (?, ?, 1) ON CONFLICT DO NOTHING"
CHUNK = "INSERT INTO image_chunk (sha256, position, digest, data) VALUES (?, 0, ?, ?) ON CONFLICT DO NOTHING"
ROWS = """SELECT s.name, s.sha256, s.modified_ns, c.data FROM image_storage s
JOIN image_chunk c ON c.sha256 = s.sha256 ORDER BY s.name"""


def restore(directory: Path, database: sqlite3.Connection) -> None:
    """Write files without a name, hash them, sync them together, and only then name them."""
    libc, folders = ctypes.CDLL(None), dict[str, int]()
    rows = iter(database.execute(ROWS))
    while batch := list(islice(rows, AT_ONCE)):
        ready = []
        for name, sha256, modified_ns, data in batch:
            folder, _, last = name.rpartition("/")
            if folder not in folders:
                (directory / folder).mkdir(parents=True, exist_ok=True)
                folders[folder] = os.open(directory / folder, os.O_RDONLY | os.O_DIRECTORY)
            fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o644, dir_fd=folders[folder])
            os.pwrite(fd, data, 0)
            assert hashlib.sha256(data).hexdigest() == sha256
            os.utime(fd, ns=(modified_ns, modified_ns))
            ready.append((fd, folders[folder], last))
        libc.syncfs(ready[0][0])
        for fd, parent, last in ready:
            os.link(f"/proc/self/fd/{fd}", last, src_dir_fd=-100, dst_dir_fd=parent, follow_symlinks=True)
            os.close(fd)


def migrate(directory: Path, database: sqlite3.Connection) -> None:
    """Read files, hash each twice (the whole and its only chunk), and store each in three rows."""
    database.execute("PRAGMA synchronous=FULL")
    files = _files(directory)
    while batch := list(islice(files, 4 * AT_ONCE)):
        database.execute("BEGIN IMMEDIATE")
        database.executemany(RECORD, [(name, sha256, len(data), time) for name, sha256, _, time, data in batch])
        database.executemany(BLOB, [(sha256, len(data)) for _, sha256, _, _, data in batch])
        database.executemany(CHUNK, [(sha256, digest, data) for _, sha256, digest, _, data in batch])
        database.commit()


def _files(directory: Path) -> Iterator[tuple[str, str, bytes, int, bytes]]:
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            fd = os.open(path, os.O_RDONLY)
            stat = os.fstat(fd)
            data = os.pread(fd, stat.st_size + 1, 0)
            os.close(fd)
            digest = hashlib.sha256(bytes(8) + data).digest()
            yield os.path.relpath(path, directory), hashlib.sha256(data).hexdigest(), digest, stat.st_mtime_ns, data


if __name__ == "__main__":
    connection = sqlite3.connect(sys.argv[3], isolation_level=None)
    {"restore": restore, "migrate": migrate}[sys.argv[1]](Path(sys.argv[2]), connection)
