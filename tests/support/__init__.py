"""What the tests share: apps and servers that they start, clients, faults, and a look at both sides."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that imports what this one can, `tests` among it."""
    places = [str(ROOT), *(place for place in sys.path if place)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(places)} | more
