"""Rows as values: records, versions, and files to be stored."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from ..content.content_types import content_type
from ..content.digests import Digests
from ..content.times import clamp_ns

RECORD_COLUMNS = 9


@dataclass(frozen=True, slots=True)
class Contents:
    """What a name is, or was: `size` in bytes, `modified_ns` in ns since the epoch."""

    name: str
    sha256: str
    size: int
    content_type: str
    modified_ns: int


@dataclass(frozen=True, slots=True)
class Record(Contents):
    """What the database knows of a name; times are in UTC."""

    generation: int
    created_at: datetime
    changed_at: datetime
    deleted_at: datetime | None = None

    @property
    def is_deleted(self) -> bool:
        """Whether this is a tombstone."""
        return self.deleted_at is not None

    def matches(self, modified_ns: int, size: int) -> bool:
        """Whether a file with this mtime and size can be taken for the recorded one, without a look at its bytes."""
        return (modified_ns, size) == (self.modified_ns, self.size)


@dataclass(frozen=True, slots=True)
class Version(Contents):
    """What a name was before an overwrite or a deletion; or, with a `reason`, a copy that was set aside."""

    generation: int
    replaced_at: datetime
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A record with the first chunk of its blob, that chunk's digest, and whether the blob is complete."""

    record: Record
    first: bytes | None
    digest: bytes | None
    has_blob: bool


@dataclass(frozen=True, slots=True)
class KeyRange:
    """The names from `first` to before `stop` (None: to the end)."""

    first: str
    stop: str | None


@dataclass(frozen=True, slots=True)
class Total:
    """How many names there are, and their bytes; not to be relied on: other programs can write into the tables."""

    count: int
    size: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A range of names in one row; an `unsound` record has a negative size."""

    lines: str
    count: int
    size: float
    unsound: int
    deleted: int


@dataclass(frozen=True, slots=True)
class SmallFile:
    """A file of a few chunks, read whole, to be stored; without a `content_type`, its name says which it has."""

    name: str
    size: int
    modified_ns: int
    chunks: Sequence[bytes]
    digests: Digests
    content_type: str = ""


@dataclass(frozen=True, slots=True)
class Position:
    """How far the catalogue is: `epoch` changes when the database went back in time, `sequence` grows by changes."""

    epoch: str
    sequence: int
    has_unnumbered: bool = False


@dataclass(frozen=True, slots=True)
class Purged:
    """What a purge dropped, or would drop: versions of the history, blobs, and the bytes of those blobs.

    `freed` are the bytes by which the database's file is smaller.
    """

    versions: int
    blobs: int
    size: int
    freed: int = field(default=0, compare=False)


def contents(of: Contents) -> dict[str, Any]:
    """Return the columns that a record and its versions have in common, without the name."""
    return {field.name: getattr(of, field.name) for field in fields(Contents) if field.name != "name"}


def earlier(record: Record, versions: Iterable[Version], generation: int | None) -> Version | None:
    """Return the version that an undo goes back to, or None: of `generation`, else the newest with other bytes.

    A copy that was set aside never was what the name had: without a generation it comes last.
    """
    if generation is not None:
        return next((version for version in versions if version.generation == generation), None)
    others = [version for version in versions if record.is_deleted or version.sha256 != record.sha256]
    return next((version for version in others if not version.reason), next(iter(others), None))


def to_record(row: Sequence[Any]) -> Record:
    """Make a record of a row that begins with the columns of `image_storage`."""
    name, sha256, size, kind, modified_ns, created_at, changed_at, generation, deleted_at = row[:RECORD_COLUMNS]
    deleted_at = None if deleted_at is None else to_utc(deleted_at)
    times = to_utc(created_at), to_utc(changed_at), deleted_at
    return Record(*_contents(name, sha256, size, kind, modified_ns), to_integer(generation), *times)


def to_found(row: Sequence[Any]) -> Found:
    """Make a `Found` of a row: a record, its first chunk, the chunk's digest, a column of the blob."""
    first, digest, chunks = row[RECORD_COLUMNS:]
    return Found(to_record(row), first if isinstance(first, bytes) else None, digest, chunks is not None)


def to_version(row: Sequence[Any]) -> Version:
    """Make a version of a row of `image_history`."""
    name, generation, sha256, size, kind, modified_ns, replaced_at, reason = row
    values = _contents(name, sha256, size, kind, modified_ns)
    return Version(*values, to_integer(generation), to_utc(replaced_at), to_text(reason))


def to_text(value: Any) -> str:
    """Return a text; SQLite's tables that are not STRICT may hold bytes instead, which become an invalid name."""
    return value if isinstance(value, str) else f"\ufffd{value!r}"


def to_integer(value: Any) -> int:
    """Return an integer; what is none, in a table that is not STRICT, becomes -1."""
    return value if isinstance(value, int) else -1


def _contents(name: Any, sha256: Any, size: Any, kind: Any, modified_ns: Any) -> tuple[str, str, int, str, int]:
    sha256 = sha256 if isinstance(sha256, str) and sha256.isascii() else ""
    return to_text(name), sha256, to_integer(size), to_text(kind), to_integer(modified_ns)


@lru_cache(1024)  # names that are saved together have the same time
def to_utc(moment: datetime | str) -> datetime:
    """Return a time in UTC. SQLite has no time zones and returns text; what is not a time becomes the year 1."""
    try:
        moment = moment if isinstance(moment, datetime) else datetime.fromisoformat(moment)
    except (TypeError, ValueError):
        moment = datetime.min.replace(tzinfo=UTC)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def record_values(name: str, sha256: str, size: int, modified_ns: int) -> dict[str, Any]:
    """Return the columns that a new record is made of."""
    time_ns = clamp_ns(modified_ns)
    return {"name": name, "sha256": sha256, "size": size, "content_type": content_type(name), "modified_ns": time_ns}
