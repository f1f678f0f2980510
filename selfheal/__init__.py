"""selfheal: a self-healing file server for Python web apps."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .content.policy import UploadPolicy
    from .db import ImageStorage
    from .errors import (
        CorruptBlob,
        DatabaseUnavailable,
        DiskUnwritable,
        InvalidName,
        MissingExtra,
        NotStored,
        SchemaError,
        SelfHealError,
        SettingsError,
        UploadIncomplete,
        UploadRefused,
        UploadTooLarge,
        UploadTypeRefused,
    )
    from .events import Event, Kind
    from .middleware import SelfHealMiddleware
    from .settings import Settings
    from .sql.models import Record
    from .sql.schema import define_tables
    from .store import Saved, UploadStore

__all__ = [
    "CorruptBlob",
    "DatabaseUnavailable",
    "DiskUnwritable",
    "Event",
    "ImageStorage",
    "InvalidName",
    "Kind",
    "MissingExtra",
    "NotStored",
    "Record",
    "Saved",
    "SchemaError",
    "SelfHealError",
    "SelfHealMiddleware",
    "Settings",
    "SettingsError",
    "UploadIncomplete",
    "UploadPolicy",
    "UploadRefused",
    "UploadStore",
    "UploadTooLarge",
    "UploadTypeRefused",
    "define_tables",
]

_ROOMS = ("errors", "events", "sql.models", "content.policy", "settings", "sql.schema", "db", "store", "middleware")
"""Where those names are, the lightest first."""


def __getattr__(name: str) -> Any:
    """Import a room once somebody asks for what is in it: commands need few of them, and say themselves which."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    rooms = (import_module(f".{room}", __name__) for room in _ROOMS)
    found = globals()[name] = next(getattr(room, name) for room in rooms if hasattr(room, name))
    return found
