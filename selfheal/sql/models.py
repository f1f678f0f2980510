"""What the database knows, as values: records, versions, and files on their way in or out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from ..content.digests import Digests

RECORD_COLUMNS = 9


@dataclass(frozen=True, slots=True)
class Record:
    """What the database knows of a name. `size` in bytes, `modified_ns` in ns since the epoch, times in UTC."""

    name: str
    sha256: str
    size: int
    content_type: str
    modified_ns: int
    generation: int
    created_at: datetime
    changed_at: datetime
    deleted_at: datetime | None = None

    @property
    def is_deleted(self) -> bool:
        """Whether this is a tombstone."""
        return self.deleted_at is not None


@dataclass(frozen=True, slots=True)
class Version:
    """What a name was before an overwrite or a deletion."""

    name: str
    generation: int
    sha256: str
    size: int
    content_type: str
    modified_ns: int
    replaced_at: datetime


@dataclass(frozen=True, slots=True)
class Found:
    """A record with the first chunk of its bytes, that chunk's own digest, and whether its blob has a row that fits."""

    record: Record
    first: bytes | None
    digest: bytes | None
    has_blob: bool


@dataclass(frozen=True, slots=True)
class KeyRange:
    """The names from `first` on, those from `stop` on not among them (None: all there are), as the driver gave them."""

    first: Any
    stop: Any | None


@dataclass(frozen=True, slots=True)
class Summary:
    """The living names of a range as `lines`, without a look at each: how many there are, how many bytes their records
    have together, and how many of those are `unsound`; and how many names in it are `deleted`.
    """

    lines: str
    count: int
    size: float
    unsound: int
    deleted: int


@dataclass(frozen=True, slots=True)
class SmallFile:
    """A file of a few chunks, whole, on its way into the database."""

    name: str
    size: int
    modified_ns: int
    chunks: Sequence[bytes]
    digests: Digests


@dataclass(frozen=True, slots=True)
class Purged:
    """What a purge dropped (or would drop): versions of the history, blobs, and the bytes of those blobs."""

    versions: int
    blobs: int
    size: int


def contents(version: Record | Version) -> dict[str, Any]:
    """What an overwrite replaces: the values of a record that its version keeps."""
    return {
        "sha256": version.sha256,
        "size": version.size,
        "content_type": version.content_type,
        "modified_ns": version.modified_ns,
    }


def earlier(record: Record, versions: Iterable[Version], generation: int | None) -> Version | None:
    """Which of its versions, newest first, a name goes back to: the `generation`, or the last that was different."""
    for version in versions:
        if version.generation == generation:
            return version
        if generation is None and (record.is_deleted or version.sha256 != record.sha256):
            return version
    return None


def to_record(row: Sequence[Any]) -> Record:
    """A record from a row that begins with the columns of `image_storage`, in their order.

    SQLite keeps whatever type somebody else writes: what is no text or number becomes one that no sound record has.
    """
    name, sha256, size, kind, modified_ns, created_at, changed_at, generation, deleted_at = row[:RECORD_COLUMNS]
    name, size = to_name((name, size))
    if not isinstance(modified_ns, int):
        modified_ns = 0
    gone = None if deleted_at is None else to_utc(deleted_at)
    return Record(
        name, _to_digest(sha256), size, kind, modified_ns, generation, to_utc(created_at), to_utc(changed_at), gone
    )


def to_name(row: Sequence[Any]) -> tuple[str, int]:
    """A name and the size of its record, from a row of the two; what is no text or number as in `to_record`."""
    name, size = row
    if not isinstance(name, str):
        name = name.decode(errors="replace") if isinstance(name, bytes) else repr(name)
    return name, size if isinstance(size, int) else -1


def to_version(row: Sequence[Any]) -> Version:
    """A version from a row of `image_history`, its columns in their order."""
    name, generation, sha256, size, kind, modified_ns, replaced_at = row
    return Version(name, generation, _to_digest(sha256), size, kind, modified_ns, to_utc(replaced_at))


def _to_digest(sha256: str) -> str:
    """What is no digest becomes the digest of nothing that is stored."""
    return sha256 if sha256.isascii() else ""


def to_utc(moment: datetime | str) -> datetime:
    """SQLite has no zones, and gives the clock as text: what it says is UTC. What is no time is the first there is."""
    if not isinstance(moment, datetime):
        return _parsed(moment)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@lru_cache(1024)  # what was saved together has the same time
def _parsed(moment: str) -> datetime:
    try:
        return to_utc(datetime.fromisoformat(moment))
    except (TypeError, ValueError):
        return datetime.min.replace(tzinfo=UTC)
