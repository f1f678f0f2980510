"""Every kind of damage that the bulk runs must report: files on disk, blobs and records in the database."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from selfheal import UploadStore, bulk
from selfheal.content.sources import CHUNK
from tests.support.files import MODIFIED_NS, flip_a_bit, noise, write_file
from tests.support.runs import SQL, outcomes, report_of
from tests.support.sockets import make_socket

SMALL, LARGE = 5000, 2 * CHUNK + 77
"""Sizes in bytes: one chunk, several chunks."""

# -- on disk ----------------------------------------------------------------------------------------------------------

HEALTHY = ("good.png", "cats/tom.jpg", "large.bin", "empty.png")
DIFFERENT = ("truncated.png", "emptied.png", "longer.png", "flipped.png", "rotten.png", "large-rotten.bin")
BLOCKED = ("linked.png", "a directory.png", "fifo.png")
"""Names where something other than a regular file is."""
TOUCHED = "touched.png"
"""A file whose bytes are right, with another mtime."""
REMOVED = ("removed.png", "gone/removed.bin")
DELETED = ("deleted.png", "deleted-other.png")
"""Names with a tombstone whose files were put back; the second with other bytes."""
NOT_RECORDED = ("extra.png", "new/extra.bin", "extra-empty.png")
INVALID_NAMES = ("CON", "nul.png", "dot.", "space ", "back\\slash.png", "bell\a.png", "a::$DATA")
UNDECODABLE = os.fsdecode(b"latin-\xe9.png")
NO_UPLOADS = outcomes(invalid_name=(*INVALID_NAMES, UNDECODABLE), failed=("pipe", "socket"))
"""Names without a record that are problems."""
LINKS = ("link.png", "dangling.png", "link to directory")
LITTER = (".hidden", "cats/.htaccess", ".gitkeep", ".DS_Store", "cats/Thumbs.db", ".git/config")
"""Names without a record that are skipped; `.git` counts as one."""
SKIPPED = (*LINKS, *LITTER[:-1], ".git", "a directory.png/.gitkeep")


@dataclass
class DamagedDisk:
    """Uploads whose files were damaged in every way; `images` are the recorded bytes."""

    images: dict[str, bytes]
    outside: Path


async def damage_disk(store: UploadStore, directory: Path, outside: Path) -> DamagedDisk:
    """Record uploads, damage their files in every way, and add entries that are no uploads."""
    recorded = (*HEALTHY, *DIFFERENT, *BLOCKED, TOUCHED, *REMOVED, *DELETED)
    sizes = {"empty.png": 0, "large.bin": 3 * CHUNK + 5, "large-rotten.bin": 3 * CHUNK, "gone/removed.bin": 5 * 2**20}
    images = {name: noise(sizes.get(name, SMALL), name) for name in recorded}
    for name, data in images.items():
        write_file(directory / name, data)
    assert (await report_of(bulk.migrate(store))).counts == {"migrated": len(images)}
    write_file(outside / "secret.png", b"secret")

    os.truncate(directory / "truncated.png", 4000)
    os.truncate(directory / "emptied.png", 0)
    write_file(directory / "longer.png", images["longer.png"] + b"x")
    first_byte_flipped = bytes([images["flipped.png"][0] ^ 1]) + images["flipped.png"][1:]
    write_file(directory / "flipped.png", first_byte_flipped, modified_ns=MODIFIED_NS + 1)
    flip_a_bit(directory / "rotten.png")
    flip_a_bit(directory / "large-rotten.bin")
    os.utime(directory / TOUCHED, ns=(MODIFIED_NS + 7, MODIFIED_NS + 7))
    for name in (*REMOVED, *BLOCKED):
        (directory / name).unlink()
    (directory / "linked.png").symlink_to(outside / "secret.png")
    (directory / "a directory.png").mkdir()
    (directory / "a directory.png" / ".gitkeep").touch()
    os.mkfifo(directory / "fifo.png")
    for name in DELETED:
        await store.delete(name)
    write_file(directory / "deleted.png", images["deleted.png"])
    write_file(directory / "deleted-other.png", b"other bytes")

    for name in (*NOT_RECORDED, *INVALID_NAMES, UNDECODABLE):
        write_file(directory / name, b"" if name == "extra-empty.png" else noise(70_000, name))
    for name in LITTER:
        write_file(directory / name, b"litter")
    (directory / "link.png").symlink_to(outside / "secret.png")
    (directory / "dangling.png").symlink_to(outside / "nothing")
    (directory / "link to directory").symlink_to(outside)
    os.mkfifo(directory / "pipe")
    make_socket(directory / "socket")
    return DamagedDisk(images, outside)


# -- in the database --------------------------------------------------------------------------------------------------

FLIP = "UPDATE image_chunk SET data = :flipped WHERE sha256 = :sha256 AND position = :last"
BYTES_DAMAGED = {
    "data flipped": [FLIP],
    "data cut short": ["UPDATE image_chunk SET data = :cut WHERE sha256 = :sha256 AND position = :last"],
    "data emptied": ["UPDATE image_chunk SET data = :empty WHERE sha256 = :sha256 AND position = 0"],
    "data and digest": [
        FLIP,
        "UPDATE image_chunk SET digest = :digest WHERE sha256 = :sha256 AND position = :last",
    ],
    "chunk missing": ["DELETE FROM image_chunk WHERE sha256 = :sha256 AND position = :last"],
    "first chunk missing": ["DELETE FROM image_chunk WHERE sha256 = :sha256 AND position = 0"],
    "all chunks missing": ["DELETE FROM image_chunk WHERE sha256 = :sha256"],
    "nothing left": [
        "DELETE FROM image_chunk WHERE sha256 = :sha256",
        "DELETE FROM image_blob WHERE sha256 = :sha256",
    ],
    "order swapped": [
        "UPDATE image_chunk SET position = 1000 WHERE sha256 = :sha256 AND position = 0",
        "UPDATE image_chunk SET position = 0 WHERE sha256 = :sha256 AND position = 1",
        "UPDATE image_chunk SET position = 1 WHERE sha256 = :sha256 AND position = 1000",
    ],
}
"""Damage after which the bytes cannot be restored; `migrate` can mend all of it from a good file."""
BYTES_WHOLE = {
    "blob row missing": ["DELETE FROM image_blob WHERE sha256 = :sha256"],
    "blob of another size": ["UPDATE image_blob SET size = size + 1 WHERE sha256 = :sha256"],
}
"""Damage after which the bytes can still be restored."""
RECORD_WRONG = {
    "negative size": ["UPDATE image_storage SET size = -1 WHERE name = :name"],
    "another size": ["UPDATE image_storage SET size = size + 1 WHERE name = :name"],
    "huge size": ["UPDATE image_storage SET size = 9000000000000000000 WHERE name = :name"],
}
"""Damage of the record itself; the bytes on disk cannot mend it."""


def damage_of(name: str) -> str:
    """Return the damage that a name is called after."""
    return name.partition("/")[0]


def named_after(*damages: Mapping[str, list[str]]) -> dict[str, bytes]:
    """Return names called after their damage, one small and one large file each, with their undamaged bytes."""
    return {
        f"{damage}/{size}.png": noise(size, damage) for kind in damages for damage in kind for size in (SMALL, LARGE)
    }


async def damage_record(sql: SQL, name: str, data: bytes) -> None:
    """Damage the record of a name, or its blob, in the way that the name is called after."""
    last = (len(data) - 1) // CHUNK
    chunk = data[last * CHUNK :]
    flipped = bytes([chunk[0] ^ 1]) + chunk[1:]
    values = {
        "name": name,
        "sha256": sha256_of(data),
        "last": last,
        "flipped": flipped,
        "cut": chunk[:-1],
        "empty": b"",
        "digest": hashlib.sha256(last.to_bytes(8, "big") + flipped).digest(),
    }
    for statement in (BYTES_DAMAGED | BYTES_WHOLE | RECORD_WRONG)[damage_of(name)]:
        wanted = {key: value for key, value in values.items() if f":{key}" in statement}
        await sql(statement, **wanted)


def sha256_of(data: bytes) -> str:
    """Return the digest of a file as a record has it."""
    return hashlib.sha256(data).hexdigest()
