"""Addresses of uploads: where an app finds a name on its disk, and where a browser finds it."""

import contextlib
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, Literal, overload

from .. import names
from ..db import ImageStorage
from ..errors import DatabaseUnavailable
from ..healing.reading import Reader
from ..settings import DEFAULT_PREFIX, check_prefix
from .urls import url_of


class Addresses:
    """The paths and URLs of names. `prefix` is the URL path of the uploads, as visitors see it."""

    def __init__(self, database: ImageStorage, reader: Reader, prefix: str) -> None:
        self.database = database
        self.prefix = check_prefix(prefix)
        self._reader = reader

    async def ensure(self, name: str) -> Path:
        """Return the path of a name's file on this disk, restored first if it was missing.

        Raises `NotStored`, `DiskUnwritable`, `CorruptBlob`, `DatabaseUnavailable`.
        """
        return await self.database.home.run(self._reader.ensure, names.check(name))

    @overload
    def url(self, name: str, *, versioned: Literal[False] = False) -> str: ...
    @overload
    def url(self, name: str, *, versioned: Literal[True]) -> Coroutine[Any, Any, str]: ...
    def url(self, name: str, *, versioned: bool = False) -> str | Coroutine[Any, Any, str]:
        """Return the URL path of a name. With `versioned`, await it: it is one that `urls` returns."""
        names.check(name)
        return self._versioned_url(name) if versioned else url_of(self.prefix, name)

    async def urls(self, wanted: Iterable[str]) -> dict[str, str]:
        """Return the URL path of each name with `?v=` and the digest of its bytes, in one query for all of them.

        Caches keep the answer for ever. A name without a record has no `?v=`; none has one without a database.
        """
        wanted = [names.check(name) for name in wanted]
        digests: dict[str, str] = {}
        with contextlib.suppress(DatabaseUnavailable):
            digests = await self.database.home.run(self.database.catalogue.digests, wanted)
        return {name: url_of(self.prefix, name, digests.get(name, "")) for name in wanted}

    def share_prefix(self, prefix: str) -> str:
        """Return the prefix to serve below: `prefix`, the middleware's. Of the two, one that is not set is the other.

        If both are set, the middleware serves below its own (it may be mounted), and URLs begin with the store's.
        """
        prefix = check_prefix(prefix)
        if prefix == DEFAULT_PREFIX:
            return self.prefix
        if self.prefix == DEFAULT_PREFIX:
            self.prefix = prefix
        return prefix

    async def _versioned_url(self, name: str) -> str:
        return (await self.urls([name]))[name]
