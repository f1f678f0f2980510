"""The least a middleware can be, with all that selfheal loads: an app with a database has it loaded anyway."""

from __future__ import annotations

from typing import Any

import aiosqlite
import sqlalchemy.ext.asyncio

import selfheal

from .plain import plain

LOADED = (aiosqlite, sqlalchemy.ext.asyncio, selfheal.SelfHealMiddleware, selfheal.UploadStore)


def make() -> Any:
    """The app in it."""

    async def passing(scope: Any, receive: Any, send: Any) -> None:
        await plain(scope, receive, send)

    return passing
