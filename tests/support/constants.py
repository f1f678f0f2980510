"""Give constants of selfheal other values for one test."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def set_constants(monkeypatch: pytest.MonkeyPatch, **constants: float) -> None:
    """Set the constants in every module of selfheal that has imported them."""
    for name, module in list(sys.modules.items()):
        if name.startswith("selfheal."):
            for constant in constants.keys() & vars(module).keys():
                monkeypatch.setattr(module, constant, constants[constant])
