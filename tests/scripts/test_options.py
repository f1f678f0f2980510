"""The event loop of every command, and the store on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import aiosqlite.core
import pytest

LATE_DRIVER = """
import sys, time
import aiosqlite.core as core
from selfheal import DatabaseUnavailable, UploadStore
from selfheal.scripts.options import run_on

real = core._connection_worker_thread

class Late:
    def __init__(self, queue):
        self.queue = queue
    def get(self):
        call = self.queue.get()
        time.sleep(0.05)
        return call

def _connection_worker_thread(queue):
    real(Late(queue))

core._connection_worker_thread = _connection_worker_thread
try:
    store = UploadStore(sys.argv[1] + "/uploads", "sqlite:///" + sys.argv[1] + "/nowhere/a.db")
    run_on(store, lambda store: store.database.count())
except DatabaseUnavailable:
    print("no answer")
time.sleep(0.2)
"""


def test_a_driver_that_reports_a_failed_connection_late(tmp_path: Path) -> None:
    """The event loop of a command stays open until the driver's thread has ended: otherwise that prints a traceback."""
    if not hasattr(aiosqlite.core, "_connection_worker_thread"):
        pytest.skip("before 0.22 aiosqlite's thread has no function that can be slowed down")
    command = [sys.executable, "-c", LATE_DRIVER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("no answer\n", "")
