"""Transactions: whole or not at all, whatever the app's own engine begins, commits, or asks when it connects."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from ..errors import DatabaseUnavailable, SelfHealError
from .backend import Backend

Write = Callable[[Callable[[AsyncConnection], Awaitable[Any]]], Awaitable[Any]]
"""Runs work in a transaction, one of its own or the caller's, and returns what it returns."""


@contextlib.asynccontextmanager
async def transaction(connection: AsyncConnection, backend: Backend) -> AsyncIterator[None]:
    """Begin a transaction; commit it at the end, or roll it back. Raises `DatabaseUnavailable` if that fails."""
    if connection.in_transaction():  # begun by what the app's engine asks when it connects
        await connection.commit()
    async with backend.transaction(connection):
        yield


def within(
    connection: AsyncConnection | AsyncSession,
    backend: Backend,
    unavailable: Callable[[BaseException], SelfHealError],
) -> Write:
    """Return what runs work in the caller's transaction: `DatabaseUnavailable` if each statement is committed."""

    async def write(work: Callable[[AsyncConnection], Awaitable[Any]], /) -> Any:
        try:
            inner = await connection.connection() if isinstance(connection, AsyncSession) else connection
            if not inner.in_transaction():
                await inner.begin()  # as its first statement would; an app's hook may begin SQLite's own here
            if await backend.is_autocommit(inner):
                raise DatabaseUnavailable(
                    "the connection that was given commits each statement; give one in a transaction"
                )
            return await work(inner)
        except IntegrityError:
            raise
        except DBAPIError as error:
            raise unavailable(error) from error

    return write
