"""Lineage: whether a name in a source is what the name in the database became, or the two went different ways."""

from collections.abc import Sequence

from ..sql.models import Contents, Record, Version


def is_same(record: Contents, versions: Sequence[Version], found: Record, known: Sequence[Version]) -> bool:
    """Whether the database has all that the source has: the record with its history, or, without one, the bytes."""
    if not isinstance(record, Record):
        return not found.is_deleted and found.sha256 == record.sha256
    return found == record and set(versions) <= set(known)


def continues(record: Contents, versions: Sequence[Version], found: Record, known: Sequence[Version]) -> bool:
    """Whether the record of a source can replace the found one: its history has all that the database has.

    Generations count the changes of a name. So the source is ahead if what the database has is an earlier generation
    there. A tombstone leaves no version; the one before it has the moment of the deletion.
    """
    if not isinstance(record, Record) or found.generation > record.generation:
        return False
    if found == record:
        return True
    theirs = {version.generation: version for version in versions}
    if any(theirs[one.generation].sha256 != one.sha256 for one in known if one.generation in theirs):
        return False
    if found.is_deleted:
        last = max(known, key=lambda version: version.generation, default=None)
        is_earlier = found.generation < record.generation and found.generation not in theirs
        return is_earlier and last is not None and last in versions
    if found.sha256 == record.sha256 and not record.is_deleted:
        return True
    before = theirs.get(found.generation)
    return before is not None and before.sha256 == found.sha256
