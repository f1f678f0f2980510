"""Eight processes work on five names of one disk at once: no error that nobody expects, and nothing is lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from selfheal import UploadStore
from tests.support import ROOT
from tests.support.hammer import NAMES
from tests.support.store_requests import restored_bytes
from tests.support.store_state import in_database, in_quarantine, on_disk

PROCESSES = 8


@pytest.mark.timeout(600)
async def test_eight_processes_on_five_names(
    store: UploadStore, database_url: str, times: Callable[[int, int], int]
) -> None:
    """Every call ends well or with an error that says what others did; then disk and database agree again."""
    seconds = times(3, 120)
    command = [sys.executable, "-m", "tests.support.hammer", str(store.disk.path), database_url]
    running = [
        subprocess.Popen([*command, str(seed), str(seconds)], stdout=-1, stderr=-1, text=True, cwd=ROOT)
        for seed in range(PROCESSES)
    ]
    for process in running:
        output, log = process.communicate(timeout=seconds + 300)
        assert output == ""
        assert "Traceback" not in log
        assert process.returncode == 0
    assert in_quarantine(store) == []
    for name in NAMES:
        await store.reconciler.check(name)
        if on_disk(store, name) is None:
            await restored_bytes(store, name)
        assert on_disk(store, name) == await in_database(store, name)
