"""All errors that selfheal raises: one root, few children; each message says what to do next."""

from .distribution import DISTRIBUTION


class SelfHealError(Exception):
    """The base class of all errors of this package."""


class SettingsError(SelfHealError, ValueError):
    """A setting, flag or environment variable cannot be used as it is."""


class MissingExtra(SelfHealError, ImportError):
    """A feature needs a package that is not installed; the message names the extra that brings it."""

    def __init__(self, extra: str, module: str) -> None:
        super().__init__(f"{module!r} is not installed; run: pip install '{DISTRIBUTION}[{extra}]'")
        self.extra = extra


class InvalidName(SelfHealError, ValueError):
    """The name is not in the grammar of names; neither disk nor database is asked for it."""

    def __init__(self, name: object, why: str) -> None:
        super().__init__(f"{name!r} is not a valid name: {why}")
        self.why = why


class UnstorableName(SelfHealError, ValueError):
    """The database's encoding cannot hold the name, which so has no record; a database in UTF8 holds all names."""


class DatabaseUnavailable(SelfHealError):
    """The database gave no answer (down, slow, locked, damaged): the name is *unknown*, which is never *absent*."""


class SchemaError(DatabaseUnavailable):
    """The tables are missing, or of another version; run `selfheal migrate`."""


class NewerTables(SchemaError):
    """The tables are of a newer selfheal; upgrade this one."""


class ForeignTables(SchemaError, SettingsError):
    """A table has one of our names and belongs to another app; nothing was changed."""


class CorruptBlob(SelfHealError):
    """The bytes in the database are not the recorded ones; nothing was written."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(
            f"{name!r} is damaged in the database: {why}; `selfheal migrate` mends it from a good disk copy"
        )
        self.name = name
        self.why = why


class DiskUnwritable(SelfHealError):
    """The uploads directory takes no file now (full, read-only, no permission, mount lost)."""


class NotAFile(SelfHealError):
    """The name is taken by something that is not a regular file: a directory, link, FIFO, socket or device."""


class NameTaken(SelfHealError):
    """The name has a living record, which stays as it is; save under another name."""


class NotStored(SelfHealError, LookupError):
    """There is no such name, or no such generation of it."""


class FileChanged(SelfHealError):
    """The file changed while it was read; try again when its writer is done."""


class UploadRefused(SelfHealError):
    """The upload breaks the policy; `status` is the HTTP status of the answer."""

    status = 422


class UploadTooLarge(UploadRefused):
    """More bytes came than the policy allows, whatever `Content-Length` said (413)."""

    status = 413


class UploadTypeRefused(UploadRefused):
    """The extension is not allowed, or the bytes are not what it says (415)."""

    status = 415


class UploadIncomplete(UploadRefused):
    """The upload is empty, or its end is missing (422)."""
