"""selfheal: a self-healing file server for Python web apps."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .distribution import DISTRIBUTION

if TYPE_CHECKING:
    from .content.content_types import IMAGE_EXTENSIONS
    from .content.policy import UploadPolicy
    from .db import ImageStorage
    from .errors import (
        CorruptBlob,
        DatabaseUnavailable,
        DiskUnwritable,
        ForeignTables,
        InvalidName,
        MissingExtra,
        NameTaken,
        NotStored,
        SchemaError,
        SelfHealError,
        SettingsError,
        UnstorableName,
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
    "IMAGE_EXTENSIONS",
    "CorruptBlob",
    "DatabaseUnavailable",
    "DiskUnwritable",
    "Event",
    "ForeignTables",
    "ImageStorage",
    "InvalidName",
    "Kind",
    "MissingExtra",
    "NameTaken",
    "NotStored",
    "Record",
    "Saved",
    "SchemaError",
    "SelfHealError",
    "SelfHealMiddleware",
    "Settings",
    "SettingsError",
    "UnstorableName",
    "UploadIncomplete",
    "UploadPolicy",
    "UploadRefused",
    "UploadStore",
    "UploadTooLarge",
    "UploadTypeRefused",
    "define_tables",
]
_MODULES = ("errors", "events", "content.policy", "settings", "sql.models", "sql.schema", "db", "store", "middleware")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a command starts some 50 ms sooner."""
    if name == "__version__":
        return import_module("importlib.metadata").version(DISTRIBUTION)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = (import_module(f".{module}", __name__) for module in _MODULES)
    found = globals()[name] = next(getattr(module, name) for module in modules if hasattr(module, name))
    return found
