"""Shared by the tests: apps and servers they start, clients, faults, and looks at the disk and the database."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""


def environment(**more: str) -> dict[str, str]:
    """Return the environment for a child process that can import what this process can, `tests` included."""
    paths = [str(ROOT), *(path for path in sys.path if path)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | more
