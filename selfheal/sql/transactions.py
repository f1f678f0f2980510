"""Transactions: whole or not at all, whatever the app's own engine begins, commits, or asks when it connects."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from ..errors import DatabaseUnavailable, SelfHealError
from .backend import Backend
from .blocking import BlockingConnection

AnyConnection = AsyncConnection | AsyncSession | Connection | Session
"""What a caller's transaction is open on."""
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
    connection: AnyConnection,
    backend: Backend,
    unavailable: Callable[[BaseException], SelfHealError],
) -> Write:
    """Return what runs work in the caller's transaction: `DatabaseUnavailable` if each statement is committed."""

    async def write(work: Callable[[AsyncConnection], Awaitable[Any]], /) -> Any:
        try:
            inner = await _inner(connection)
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


async def _inner(connection: AnyConnection) -> AsyncConnection:
    if isinstance(connection, AsyncSession):
        return await connection.connection()
    if isinstance(connection, AsyncConnection):
        return connection
    return cast(
        AsyncConnection, BlockingConnection(connection.connection() if isinstance(connection, Session) else connection)
    )
