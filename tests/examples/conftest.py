"""Fixtures of the examples: the pictures of the demo."""

from __future__ import annotations

import pytest

from examples.pictures import pictures


@pytest.fixture(scope="session")
def originals() -> dict[str, bytes]:
    """The pictures of the demo, made once."""
    return pictures()
