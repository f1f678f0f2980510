"""Run one of the three scripts in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

SECONDS = 60.0
"""The longest time a script may take."""


def run_script(module: str, *flags: str, directory: Path, database: str) -> tuple[int, dict[str, Any]]:
    """Run a module of `selfheal.scripts` with --json; return its exit code and its report."""
    where = {"SELFHEAL_DIRECTORY": str(directory), "SELFHEAL_DATABASE_URL": database, "SELFHEAL_SETTLED_AFTER": "0"}
    done = subprocess.run(
        [sys.executable, "-m", f"selfheal.scripts.{module}", "--json", *flags],
        env={**os.environ, **where}, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)


def outcome_counts(report: dict[str, Any]) -> Counter[str]:
    """Return how many names of a report had which outcome."""
    return Counter({outcome: count for outcome, count in report["counts"].items() if count})
