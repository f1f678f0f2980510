"""Fixtures of the asyncio helpers: background tasks, and what the event loop reports."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from selfheal.aio.tasks import Tasks


@pytest.fixture
def tasks() -> Tasks:
    """Background tasks, none of them started."""
    return Tasks()


@pytest.fixture
async def reports() -> list[dict[str, Any]]:
    """What the event loop reports, such as errors that were never retrieved."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    return reported
