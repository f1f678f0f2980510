"""A caller's synchronous connection (Flask, Django with SQLAlchemy), used like an asynchronous one."""

from typing import Any

from sqlalchemy.engine import Connection, Dialect


class BlockingConnection:
    """What a transaction needs of an `AsyncConnection`; each call is over when it returns."""

    def __init__(self, connection: Connection) -> None:
        self.sync_connection = connection

    @property
    def dialect(self) -> Dialect:
        """The dialect, of a synchronous driver."""
        return self.sync_connection.dialect

    def in_transaction(self) -> bool:
        """Whether a transaction has begun."""
        return self.sync_connection.in_transaction()

    async def begin(self) -> Any:
        """Begin a transaction."""
        return self.sync_connection.begin()

    async def execute(self, statement: Any, parameters: Any = None) -> Any:
        """Execute a statement; its rows can be read at once."""
        return self.sync_connection.execute(statement, parameters)

    async def get_raw_connection(self) -> Any:
        """Return the pooled connection of the driver."""
        return self.sync_connection.connection
