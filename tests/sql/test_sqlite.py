"""SQLite's file, asked in the calling thread: the same rows, no waiting, and nothing left open."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path

import pytest

from selfheal import DatabaseUnavailable, UploadStore
from selfheal.sql.sqlite import IDLE_AT_MOST, Direct
from tests.support.sides import statements


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A database with one row, in a directory whose name needs quoting in a URI."""
    place = tmp_path / "a b%41?c#d"
    place.mkdir()
    connection = sqlite3.connect(place / "a.db")
    connection.execute("CREATE TABLE t (n)")
    connection.execute("INSERT INTO t VALUES (7)")
    connection.commit()
    connection.close()
    return place / "a.db"


def descriptors(file: Path) -> int:
    """How many descriptors of this process lead to a file."""
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(os.path.realpath(link) == str(file) for link in links)


def test_every_thread_asks_for_itself(file: Path) -> None:
    """Threads that ask at once all get the rows; afterwards no connection is left open."""
    direct = Direct(file)
    got: list[object] = []
    threads = [threading.Thread(target=lambda: got.append(direct.rows("SELECT n + ? FROM t", [1]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [[(8,)]] * 8
    direct.close()
    assert descriptors(file) == 0


def test_few_connections_stay_open(file: Path) -> None:
    """However many threads asked at once, no more stay open than a pool keeps, and each is asked again."""
    direct, together = Direct(file), threading.Barrier(12)
    before = descriptors(file)

    def ask() -> None:
        together.wait()
        for _ in range(50):
            direct.rows("SELECT count(*) FROM sqlite_master WHERE name = ?", ("none",))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert descriptors(file) - before <= IDLE_AT_MOST
    held = [direct._connection() for _ in range(12)]
    for connection in held:
        direct._give_back(connection)
    assert descriptors(file) - before == IDLE_AT_MOST
    direct.close()
    assert descriptors(file) == before


def test_what_others_commit_is_seen(file: Path) -> None:
    """No transaction stays open between two questions."""
    direct = Direct(file)
    assert direct.rows("SELECT n FROM t", []) == [(7,)]
    with sqlite3.connect(file) as other:
        other.execute("UPDATE t SET n = 8")
    other.close()
    assert direct.rows("SELECT n FROM t", []) == [(8,)]
    direct.close()


def test_a_lock_is_not_waited_for(file: Path) -> None:
    """Where another process writes just now, the answer is unknown, at once."""
    direct = Direct(file)
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(DatabaseUnavailable, match="locked"):
        direct.rows("SELECT n FROM t", [])
    other.execute("ROLLBACK")
    other.close()
    assert direct.rows("SELECT n FROM t", []) == [(7,)]
    direct.close()


def test_no_file_is_made(tmp_path: Path) -> None:
    """A database that is not there is unknown, and stays away."""
    direct = Direct(tmp_path / "none.db")
    with pytest.raises(DatabaseUnavailable, match="unable to open"):
        direct.rows("SELECT 1", [])
    assert list(tmp_path.iterdir()) == []


async def test_a_locked_database_is_asked_the_long_way(sqlite_store: UploadStore) -> None:
    """A small file whose database is locked for a moment comes back as soon as it is free."""
    saved = await sqlite_store.save("a.png", b"bytes")
    saved.path.unlink()
    other = sqlite3.connect(sqlite_store.database.url.database or "", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    free = threading.Timer(0.3, lambda: other.execute("ROLLBACK"))
    free.start()
    with statements() as asked:
        assert await sqlite_store.is_on_disk_again("a.png")
    free.join()
    other.close()
    assert saved.path.read_bytes() == b"bytes"
    assert any("image_chunk" in statement for statement in asked)
