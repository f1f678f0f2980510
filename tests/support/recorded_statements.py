"""Record every SQL statement of this process, below all engines and all connections that bypass one."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event
from sqlalchemy.pool import Pool

from selfheal.sql.postgresql import PostgreSQLReader
from selfheal.sql.sqlite_reader import SQLiteReader


@contextmanager
def recorded_statements() -> Iterator[list[str]]:
    """Yield a list that grows with each statement that a database driver gets inside the block."""
    seen: list[str] = []
    watched: set[int] = set()
    active = True

    def see(statement: Any) -> None:
        if active:
            seen.append(f"{statement.query} {statement.args}" if hasattr(statement, "query") else statement)

    def watch(connection: Any, *_: Any) -> None:
        driver = connection.driver_connection
        if hasattr(driver, "add_query_logger"):
            watch_server(driver)
        elif id(driver) not in watched:
            watched.add(id(driver))
            connection.run_async(lambda driver: driver.set_trace_callback(see))

    def watch_server(driver: Any) -> None:
        if id(driver) not in watched:
            watched.add(id(driver))
            driver.add_query_logger(see)

    take, ask = SQLiteReader._take, PostgreSQLReader.ask

    def ask_watched(readers: PostgreSQLReader, question: Callable[[Any], Awaitable[Any]]) -> Any:
        def watched_question(driver: Any) -> Awaitable[Any]:
            watch_server(driver)
            return question(driver)

        return ask(readers, watched_question)

    def take_watched(direct: SQLiteReader) -> sqlite3.Connection:
        connection = take(direct)
        connection.set_trace_callback(see)
        return connection

    event.listen(Pool, "checkout", watch)
    SQLiteReader._take = take_watched  # type: ignore[method-assign]
    PostgreSQLReader.ask = ask_watched  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        active = False
        event.remove(Pool, "checkout", watch)
        SQLiteReader._take = take  # type: ignore[method-assign]
        PostgreSQLReader.ask = ask  # type: ignore[method-assign]
