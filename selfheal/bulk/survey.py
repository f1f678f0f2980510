"""Survey: which recorded names have a file on disk."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .. import names
from ..disk.exclusions import Exclusions
from ..disk.listing import Listing
from ..healing.batch_restore import Wanted
from ..sql.models import Summary
from .outcomes import Outcome, Result, of_error, problem


@dataclass(frozen=True, slots=True)
class Survey:
    """Names that are on the disk, names that are missing, and results for those that are not looked for."""

    present: list[Wanted]
    missing: list[Wanted]
    others: list[Result]


def survey(listing: Listing, wanted: Iterable[Wanted], left_out: Exclusions) -> Survey:
    """Look for names on the disk."""
    valid, others = split_valid(wanted, left_out)
    found = Survey([], [], others)
    for one in valid:
        try:
            (found.present if listing.has(one[0]) else found.missing).append(one)
        except OSError as error:
            others.append(of_error(one[0], error))
    return found


def all_present(listing: Listing, summary: Summary) -> bool:
    """Whether all living records of a range are sound, their names valid, and their files on the disk."""
    if not summary.count:
        return True
    lines = summary.lines.split("\n")
    if summary.unsound or math.isinf(summary.size) or len(lines) != summary.count or not names.are_valid(summary.lines):
        return False
    try:
        return listing.has_all(lines)
    except OSError:  # a survey reports which names these are
        return False


def split_valid(wanted: Iterable[Wanted], left_out: Exclusions) -> tuple[list[Wanted], list[Result]]:
    """Return the names that can be restored, and results for those left out or written by other programs only."""
    valid: list[Wanted] = []
    others: list[Result] = []
    for one in wanted:
        name, size = one
        if left_out.match(name):
            others.append(Result(name, Outcome.SKIPPED))
        elif not names.is_valid(name):
            others.append(problem(name, Outcome.INVALID_NAME, names.fault(name)))
        elif size < 0:
            others.append(problem(name, Outcome.CORRUPT_IN_DATABASE, f"its size is {size}"))
        else:
            valid.append(one)
    return valid, others
