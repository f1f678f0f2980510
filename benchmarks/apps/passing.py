"""An empty middleware that imports all that selfheal imports, as an app with a database does anyway."""

from __future__ import annotations

from typing import Any

import aiosqlite
import sqlalchemy.ext.asyncio

import selfheal

from .plain import plain

LOADED = (aiosqlite, sqlalchemy.ext.asyncio, selfheal.SelfHealMiddleware, selfheal.UploadStore)


def make() -> Any:
    """Return the app in the empty middleware."""

    async def passing(scope: Any, receive: Any, send: Any) -> None:
        await plain(scope, receive, send)

    return passing
