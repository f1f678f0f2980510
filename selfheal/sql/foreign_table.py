"""A table of another app: its rows are read in pages by their key, and the bytes of each row in pieces."""

import asyncio
import warnings
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, NoSuchTableError, SAWarning, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..errors import DatabaseUnavailable, FileChanged, NotStored, SettingsError
from .backends import backend_of, database_url

ROWS_AT_ONCE = 200
READ_WITH_ROW = 64 * 1024  # bytes up to which a value comes with its row: a query for each would take most of the time
PIECE = 4 * 1024 * 1024  # bytes of one value in memory
_KEY = "selfheal_key_{}".format


@dataclass(frozen=True, slots=True)
class ForeignColumns:
    """Where uploads are: a table, its columns of names, bytes and types, and an SQL condition that is used as it is."""

    table: str
    name: str
    data: str
    type: str | None = None
    where: str | None = None
    schema: str | None = None


@dataclass(frozen=True, slots=True)
class ForeignRow:
    """A row, with its bytes as `data` if they are few; `place` is where the backend finds them otherwise.

    `size` is None if the row has no bytes.
    """

    key: Sequence[Any]
    place: Any
    name: Any
    type: Any
    size: Any
    data: Any


class ForeignTable:
    """Reads a table of another app, and changes nothing."""

    def __init__(self, url: str, columns: ForeignColumns, *, timeout: float) -> None:
        parsed = database_url(url)
        self._backend = backend_of(parsed)
        file = self._backend.file(parsed)
        if file is not None and not file.exists():
            raise DatabaseUnavailable(f"there is no database {file} to import from")
        self._engine = self._backend.create_plain_engine(parsed, timeout)
        self._columns = columns
        names = [one for one in (columns.name, columns.data, columns.type) if one is not None]
        self._table = sa.table(columns.table, *map(sa.column, names), schema=columns.schema)
        self._data = self._table.c[columns.data]
        self._length = sa.func.length(self._data)
        self._errors: tuple[type[Exception], ...] = (SQLAlchemyError, OSError, *self._backend.driver_errors())
        self._keys: list[sa.ColumnElement[Any]] = []
        self._place: sa.ColumnElement[Any] = sa.null()

    async def close(self) -> None:
        """Close the connections."""
        await self._engine.dispose()

    async def rows(self) -> AsyncGenerator[ForeignRow, None]:
        """Yield all rows, in the order of their key. Raises `SettingsError` if the table or a column is not there."""
        await self._find_keys()
        keys = self._keys
        page, after = self._page(keys), None
        while True:
            found = await self._ask(page if after is None else page.where(_compared(keys, ">", after)))
            for *key, place, name, kind, size, data in found:
                yield ForeignRow(key, place, name, kind, size, data)
            if len(found) < ROWS_AT_ONCE:
                return
            after = found[-1][: len(keys)]

    async def read(self, row: ForeignRow) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a row. Raises `NotStored` if the column has none (text), or the row is gone.

        Raises `FileChanged` if it has another number of bytes now: what was read of it is the start of another value.
        """
        pieces = range(0, row.size, PIECE) if row.data is None else ()
        if row.data is not None:
            yield _bytes(row.data)
        for start in pieces:
            found, size = await self._piece(row, start, min(PIECE, row.size - start))
            if size != row.size:
                raise FileChanged("its row was changed while it was read; run again")
            yield _bytes(found)

    async def _piece(self, row: ForeignRow, start: int, size: int) -> tuple[Any, int]:
        """Return a part of the bytes of a row, and how many it has now."""
        if row.place is not None:
            read = self._backend.read_part
            with self._named_errors():
                part = await asyncio.to_thread(read, self._engine.url, self._data, row.place, start, size)
            if part is not None:
                return part
        piece = sa.func.substr(self._data, start + 1, size)
        query = sa.select(piece, self._length).select_from(self._table).where(_compared(self._keys, "=", row.key))
        return next(iter(await self._ask(query)), (None, row.size))

    def _page(self, keys: Sequence[sa.ColumnElement[Any]]) -> sa.Select[Any]:
        table, columns = self._table.c, self._columns
        kind = sa.null() if columns.type is None else table[columns.type]
        named = [key.label(_KEY(number)) for number, key in enumerate(keys)]
        data = sa.case((self._length <= READ_WITH_ROW, self._data))
        page = sa.select(*named, self._place, table[columns.name], kind, self._length, data).select_from(self._table)
        if columns.where is not None:
            page = page.where(sa.literal_column(f"({columns.where}\n)"))
        return page.order_by(*keys).limit(ROWS_AT_ONCE)

    async def _find_keys(self) -> None:
        """Find the columns of the primary key; without one, where the database keeps the row."""
        async with self._connection() as connection:
            try:
                key, columns = await connection.run_sync(_primary_key, self._columns)
            except NoSuchTableError as error:
                why = f"there is no table {self._table.fullname} to import from; check --table and --from-schema"
                raise SettingsError(why) from error
            self._place = await self._backend.place_of_bytes(connection, self._data, columns)
        self._keys = [sa.column(name) for name in key] or [*self._backend.place_of_row(columns)]

    async def _ask(self, query: sa.Select[Any]) -> Sequence[Any]:
        async with self._connection() as connection:
            rows: Sequence[Any] = (await connection.execute(query)).all()
            return rows

    @asynccontextmanager
    async def _connection(self) -> AsyncGenerator[AsyncConnection, None]:
        with self._named_errors():
            async with self._engine.connect() as connection:
                yield connection

    @contextmanager
    def _named_errors(self) -> Generator[None, None, None]:
        try:
            yield
        except self._errors as error:
            cause = getattr(error, "orig", None) or error
            message = str(cause).partition("\n")[0]
            if isinstance(error, DBAPIError) and self._backend.is_wrong_statement(cause):
                hint = "check --table, --name, --data, --type and --where"
                raise SettingsError(f"the table {self._table.fullname} cannot be read: {message}; {hint}") from error
            raise DatabaseUnavailable(f"the database to import from gave no answer: {message}") from error


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise NotStored("the column holds no bytes, or the row is gone")
    return value


def _primary_key(connection: sa.Connection, columns: ForeignColumns) -> tuple[list[str], list[str]]:
    """Return the columns of the primary key, and all columns.

    The key is empty if a column of it can be NULL, which SQLite allows and nothing compares to.
    """
    inspector = sa.inspect(connection)
    if columns.table in inspector.get_view_names(columns.schema):
        raise SettingsError(
            f"{columns.table} is a view, which has no key to read it by; name the table, and use --where"
        )
    key = inspector.get_pk_constraint(columns.table, columns.schema)["constrained_columns"]
    with warnings.catch_warnings(category=SAWarning, action="ignore"):  # of types that are of no interest here
        found = inspector.get_columns(columns.table, columns.schema)
    nullable = {one["name"] for one in found if one["nullable"]}
    return [] if nullable & set(key) else key, [one["name"] for one in found]


def _compared(keys: Sequence[sa.ColumnElement[Any]], operator: str, to: Sequence[Any]) -> sa.ColumnElement[bool]:
    """Compare a key with values. They have no type here: the database takes that of the column."""
    values = [_bound(_KEY(number), value) for number, value in enumerate(to)]
    if len(keys) == 1:
        return keys[0].op(operator, is_comparison=True)(values[0])
    return sa.tuple_(*keys).op(operator, is_comparison=True)(sa.tuple_(*values))


def _bound(parameter: str, value: object) -> sa.ColumnElement[Any]:
    if isinstance(value, str) and not value.isascii():  # SQLite: a text that is not UTF-8 can only be bound as bytes
        data = value.encode(errors="surrogateescape")
        if data != value.encode(errors="replace"):
            return sa.cast(sa.bindparam(parameter, data, type_=sa.LargeBinary()), sa.Text())
    return sa.bindparam(parameter, value, type_=sa.types.NullType())
