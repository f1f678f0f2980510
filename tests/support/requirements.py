"""Skip a test that needs a program which this machine lacks, and say how to install it."""

from __future__ import annotations

import pytest

NOT_INSTALLED = "is not installed; run: "
"""Part of the reason of every such skip; the end of the run lists these reasons."""


def needs(program: str, command: str) -> None:
    """Skip the test; the reason names the missing program and the command that installs it."""
    pytest.skip(f"{program} {NOT_INSTALLED}{command}")
