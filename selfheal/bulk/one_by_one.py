"""Batches of names in which one is refused: it alone fails, not all those that are asked for with it."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from sqlalchemy.exc import DBAPIError

from ..errors import DatabaseUnavailable, SelfHealError

A = TypeVar("A")
R = TypeVar("R")

FAILURES = (SelfHealError, OSError, DBAPIError, ArithmeticError, ValueError, TypeError)
"""What can be raised because of one name; `is_refusal` tells whether it was."""
_OF_A_VALUE = {"DataError", "IntegrityError"}  # names of PEP 249: every driver has them
_DATA_EXCEPTION, _CONSTRAINT_VIOLATION = "22", "23"  # classes of SQLSTATE


async def in_halves(
    work: Callable[[Sequence[A]], Awaitable[R]], items: Sequence[A]
) -> tuple[list[R], list[tuple[A, Exception]]]:
    """Return what `work` returns for all items, or for parts of them, and the items that are refused."""
    try:
        return [await work(items)], []
    except FAILURES as error:
        if not is_refusal(error):
            raise
        if len(items) == 1:
            return [], [(items[0], error)]
    half = len(items) // 2
    first, refused = await in_halves(work, items[:half])
    second, others = await in_halves(work, items[half:])
    return first + second, refused + others


def is_refusal(error: BaseException) -> bool:
    """Whether one value is the cause of an error, such as a name that the database's encoding does not have."""
    if isinstance(error, SelfHealError) and not isinstance(error, DatabaseUnavailable):
        return not isinstance(error, ImportError)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ArithmeticError | ValueError | TypeError):  # UnicodeError is a ValueError
            return True
        if any(base.__name__ in _OF_A_VALUE for base in type(cause).__mro__):
            return True
        if str(getattr(cause, "sqlstate", None))[:2] in (_DATA_EXCEPTION, _CONSTRAINT_VIOLATION):
            return True
        cause = cause.__cause__
    return False
