"""selfheal: a self-healing file server for Python web apps."""

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
from .policy import UploadPolicy
from .records import Record
from .settings import Settings
from .store import Saved, UploadStore
from .tables import define_tables

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
