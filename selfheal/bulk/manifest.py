"""The manifest of an export: one line of JSON for each record, with its history; and where an export keeps what."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from ..errors import SelfHealError
from ..names import OWN_PREFIX
from ..sql.models import Record, Version

FOLDER = f"{OWN_PREFIX}-export"  # a dotfile: no upload has such a name
MANIFEST = "manifest.jsonl"
PARTIAL = ".partial"  # the end of the name of what is not finished
BLOBS = "blobs"  # the bytes of earlier versions, by their digests
FORMAT = 1

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TIMES = ("created_at", "changed_at", "deleted_at", "replaced_at")


def blob_name(sha256: str) -> str:
    """Return the path below `BLOBS` of the bytes behind a digest."""
    return f"{sha256[:2]}/{sha256}"


def first_line() -> bytes:
    """Return the first line of a manifest."""
    return _line({"selfheal_export": FORMAT})


def last_line(count: int) -> bytes:
    """Return the last line, after the lines of `count` records: a manifest without it is cut off."""
    return _line({"records": count})


def check_first_line(line: bytes) -> None:
    """Raise `SelfHealError` unless a manifest begins with this line."""
    if line != first_line():
        raise SelfHealError("the manifest of this export cannot be read; was it made by a newer selfheal?")


def to_line(record: Record, versions: Sequence[Version]) -> bytes:
    """Return a record with its history as a line."""
    return _line(_plain(record) | {"versions": [_plain(version) for version in versions]})


def of_line(line: bytes) -> tuple[Record, list[Version]] | int:
    """Return the record of a line with its history; of the last line, the number of records. Raises `ValueError`."""
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")  # noqa: TRY004 - as for any other fault of the line
    if values.keys() == {"records"}:
        return int(values["records"])
    record = Record(**_typed({key: value for key, value in values.items() if key != "versions"}))
    return record, [Version(**_typed(version | {"name": record.name})) for version in values["versions"]]


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _plain(one: Record | Version) -> dict[str, Any]:
    values = {key: value.isoformat() if isinstance(value, datetime) else value for key, value in asdict(one).items()}
    if isinstance(one, Version):
        del values["name"]
    return values


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a record or a version; raise `ValueError` if one is of another type."""
    for key in _TIMES:
        if values.get(key) is not None:
            values[key] = datetime.fromisoformat(values[key])
            if values[key].tzinfo is None:
                raise ValueError(f"{key} has no time zone")
    numbers = (values.get("size"), values.get("modified_ns"), values.get("generation"))
    texts = (values.get("name"), values.get("content_type"), values.get("reason", ""))
    if not all(type(one) is int for one in numbers) or not all(isinstance(one, str) for one in texts):
        raise ValueError("a number or a text is missing")
    if not _SHA256.fullmatch(str(values.get("sha256"))):
        raise ValueError("it has no SHA-256")
    return values
