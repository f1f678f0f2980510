"""Survey: which recorded names have a file on disk."""

from collections.abc import Iterable
from dataclasses import dataclass

from .. import names
from ..disk.listing import Listing
from ..healing.batch_restore import Wanted
from ..sql.models import Summary
from .outcomes import Outcome, Result, of_error, problem


@dataclass(frozen=True, slots=True)
class Survey:
    """Names that are on the disk, names that are missing, and results for those that are neither."""

    present: list[Wanted]
    missing: list[Wanted]
    wrong: list[Result]


def survey(listing: Listing, wanted: Iterable[Wanted]) -> Survey:
    """Look for names on the disk."""
    valid, wrong = split_valid(wanted)
    found = Survey([], [], wrong)
    for one in valid:
        try:
            (found.present if listing.has(one[0]) else found.missing).append(one)
        except OSError as error:
            wrong.append(of_error(one[0], error))
    return found


def all_present(listing: Listing, summary: Summary) -> bool:
    """Whether all living records of a range are sound, their names valid, and their files on the disk."""
    if not summary.count:
        return True
    lines = summary.lines.split("\n")
    if summary.unsound or len(lines) != summary.count or not names.are_valid(summary.lines):
        return False
    try:
        return listing.has_all(lines)
    except OSError:  # a survey reports which names these are
        return False


def split_valid(wanted: Iterable[Wanted]) -> tuple[list[Wanted], list[Result]]:
    """Return the names that can be restored, and results for those that only other programs can have recorded."""
    valid: list[Wanted] = []
    wrong: list[Result] = []
    for one in wanted:
        name, size = one
        if not names.is_valid(name):
            wrong.append(problem(name, Outcome.INVALID_NAME, names.fault(name)))
        elif size < 0:
            wrong.append(problem(name, Outcome.CORRUPT_IN_DATABASE, f"its size is {size}"))
        else:
            valid.append(one)
    return valid, wrong
