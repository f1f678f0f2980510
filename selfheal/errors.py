"""Everything selfheal raises on purpose: one root, few children, each message says what to do next."""

from __future__ import annotations


class SelfHealError(Exception):
    """The root of all errors of this package."""


class SettingsError(SelfHealError, ValueError):
    """A setting, flag or environment variable cannot be used as it is."""


class MissingExtra(SelfHealError, ImportError):
    """A feature needs a package that is not installed; the message names the extra that brings it."""

    def __init__(self, extra: str, module: str) -> None:
        super().__init__(f"{module!r} is not installed; run: pip install 'selfheal[{extra}]'")
        self.extra = extra


class InvalidName(SelfHealError, ValueError):
    """A name that is not in the grammar of names; it reaches neither disk nor database."""

    def __init__(self, name: object, why: str) -> None:
        super().__init__(f"{name!r} is not a valid name: {why}")
        self.why = why


class DatabaseUnavailable(SelfHealError):
    """The database gave no answer (down, slow, locked, damaged): a name is *unknown*, which is never *absent*."""


class SchemaError(DatabaseUnavailable):
    """The database answers, but its tables are missing or of another version; run `selfheal migrate`."""


class CorruptBlob(SelfHealError):
    """The bytes in the database are not the ones that were recorded; nothing was written."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(
            f"{name!r} is damaged in the database: {why}; `selfheal migrate` mends it from a good disk copy"
        )
        self.name = name
        self.why = why


class DiskUnwritable(SelfHealError):
    """The uploads directory takes no file now (full, read-only, not permitted, mount lost)."""


class NotAFile(SelfHealError):
    """Something that is not a regular file stands at the name: a directory, a link, a FIFO, a socket, a device."""


class NotStored(SelfHealError, LookupError):
    """The database holds no such name (or no such generation of it)."""


class Unsettled(SelfHealError):
    """A file was still being written while it was read; try again once it holds still."""


class UploadRefused(SelfHealError):
    """An upload that breaks the policy; `status` is the HTTP status that says so to the client."""

    status = 422


class UploadTooLarge(UploadRefused):
    """More bytes came than the policy allows; they are counted, not believed (413)."""

    status = 413


class UploadTypeRefused(UploadRefused):
    """The extension is not allowed, or the bytes are not what it says (415)."""

    status = 415


class UploadIncomplete(UploadRefused):
    """The upload is empty, or its end is missing (422)."""
