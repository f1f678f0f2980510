"""A real PgBouncer in transaction mode: a transaction may run on any of its few connections to the server."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.postgres import PostgresServer
from tests.support.requirements import needs
from tests.support.sockets import free_port

SETTINGS = """
[databases]
* = host=127.0.0.1 port={server} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 3
server_round_robin = 1
logfile = {directory}/log
"""


@contextmanager
def running_pooler(server: PostgresServer, directory: Path) -> Iterator[int]:
    """Run a pooler in front of a server, with its files in `directory`; yields its port."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        needs("PgBouncer", "apt-get install pgbouncer")
        raise AssertionError
    port = free_port()
    directory.mkdir()
    settings = directory / "settings.ini"
    settings.write_text(SETTINGS.format(server=server.port, port=port, directory=directory))
    if server.user is not None:
        shutil.chown(directory, server.user)
    process = subprocess.Popen([program, "-q", str(settings)], user=server.user, cwd="/")
    try:
        give_up = time.monotonic() + 10
        while "process up" not in _text_of(directory / "log"):
            assert time.monotonic() < give_up, _text_of(directory / "log")
            time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait()


def _text_of(file: Path) -> str:
    return file.read_text() if file.exists() else ""
