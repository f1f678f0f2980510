"""A write's transaction, whole or not at all, whatever the app's own engine begins, commits, or asks as it connects."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import StaticPool

from ..errors import DatabaseUnavailable

LOCK_PATIENCE = 10.0
"""Seconds for which a writer goes on asking for SQLite's lock: its waiting is not fair."""
LOCK_TURN = 0.9
"""Seconds that a transaction of ours, which holds locks, waits for another one; then it begins anew.

Of two that wait for each other PostgreSQL breaks one off after a second: that must not be the app's own.
"""


def is_shared(engine: AsyncEngine) -> bool:
    """Whether everybody works on one connection, as with a database in memory."""
    return isinstance(engine.pool, StaticPool)


async def check_is_one(connection: AsyncConnection) -> None:
    """Raise `DatabaseUnavailable` if a connection commits each statement: a record could stand there without bytes."""
    if not connection.in_transaction():
        await connection.begin()  # as its first statement would; an app's hook may begin SQLite's own there
    pooled: Any = await connection.get_raw_connection()
    if connection.dialect.name == "sqlite":
        driver = pooled.driver_connection
        commits_each = driver.isolation_level is None and not driver.in_transaction
    else:
        commits_each = getattr(pooled.dbapi_connection, "autocommit", False)
    if commits_each:
        raise DatabaseUnavailable("the connection that was given commits each statement; give one in a transaction")


async def give_way(connection: AsyncConnection) -> None:
    """From now on wait for no lock for longer than `LOCK_TURN`, for others may be waiting for those that are held.

    Not before there are any: who begins anew goes to the end of the queue.
    """
    if connection.dialect.name == "postgresql":
        await connection.exec_driver_sql(f"SET LOCAL lock_timeout = {LOCK_TURN * 1000:.0f}")


@contextlib.asynccontextmanager
async def transaction(connection: AsyncConnection) -> AsyncIterator[None]:
    """A transaction that is committed at its end, or rolled back.

    Raises `DatabaseUnavailable` where that cannot be promised.
    """
    if connection.in_transaction():  # begun by what the app's own engine asks as it connects
        await connection.commit()
    if connection.dialect.name == "sqlite":
        async with _in_sqlite(connection):
            yield
        return
    # what the app or its database asks for may commit each statement, or refuse what has waited for another
    await connection.execution_options(isolation_level="READ COMMITTED")
    yield
    await connection.commit()


@contextlib.asynccontextmanager
async def _in_sqlite(connection: AsyncConnection) -> AsyncIterator[None]:
    """The lock is taken at once: one that is taken later fails at once if another was first."""
    driver: Any = (await connection.get_raw_connection()).driver_connection
    has_always = driver.in_transaction  # with sqlite3's autocommit=False one is begun wherever one ends
    shared = is_shared(connection.engine)
    if has_always and shared:
        raise DatabaseUnavailable("a transaction is open on this engine's only connection")
    await connection.begin()
    if driver.in_transaction:  # begun by the app's own engine, and without the lock
        await driver.execute_fetchall("ROLLBACK")
    try:
        await _lock(driver)
        yield
        await connection.commit()
    except BaseException:
        with contextlib.suppress(sqlite3.Error, ValueError):  # it is closed
            if driver.in_transaction is not has_always and not shared:  # the rest is SQLAlchemy's, if it does it
                await driver.execute_fetchall("BEGIN" if has_always else "ROLLBACK")
        raise
    if driver.in_transaction and not has_always and not shared:
        await driver.execute_fetchall("ROLLBACK")
        raise DatabaseUnavailable("this engine's connections commit nothing; is that sqlite3's autocommit=True?")


async def _lock(driver: Any) -> None:
    give_up = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            await driver.execute_fetchall("BEGIN IMMEDIATE")  # one hop to its thread; by SQLAlchemy it takes three
        except sqlite3.OperationalError as error:
            if time.monotonic() > give_up or "locked" not in str(error):
                raise
        else:
            return
