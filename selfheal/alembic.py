"""Alembic, in an app whose database has the tables of selfheal too: autogenerate leaves them alone."""

from collections.abc import Callable, MutableMapping
from typing import Any

from .sql.table_names import TABLE_NAMES, check_schema, check_table_prefix

IncludeName = Callable[[str | None, str, MutableMapping[Any, str | None]], bool]


def exclude_tables(*, table_prefix: str = "", schema: str | None = None) -> IncludeName:
    """Return an `include_name` for `context.configure`, for a store with this prefix or schema."""
    ours = {check_table_prefix(table_prefix) + name for name in TABLE_NAMES}
    schema = check_schema(schema)

    def include(name: str | None, type_: str, parent_names: MutableMapping[Any, str | None]) -> bool:
        return type_ != "table" or name not in ours or parent_names["schema_name"] != schema

    return include


include_name = exclude_tables()
"""The `include_name` for a store without prefix and schema."""
