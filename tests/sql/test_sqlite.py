"""Reads of a SQLite file in the calling thread: the same rows, no waiting, and nothing left open."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from selfheal import UploadStore
from selfheal.sql.sqlite_reader import KEPT_AT_MOST, SQLiteReader
from tests.support.open_files import descriptors_of
from tests.support.recorded_statements import recorded_statements


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A database with one row, in a directory whose name must be quoted in a URI."""
    directory = tmp_path / "a b%41?c#d"
    directory.mkdir()
    connection = sqlite3.connect(directory / "a.db")
    connection.execute("CREATE TABLE t (n)")
    connection.execute("INSERT INTO t VALUES (7)")
    connection.commit()
    connection.close()
    return directory / "a.db"


def test_threads_that_read_at_once(file: Path) -> None:
    """Threads that read at once all get the rows; after `close` no connection is open."""
    direct = SQLiteReader(file)
    rows: list[object] = []
    threads = [
        threading.Thread(target=lambda: rows.append(direct.rows_in_thread("SELECT n + ? FROM t", [1])))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rows == [[(8,)]] * 8
    direct.close()
    assert descriptors_of(file) == 0


def test_few_connections_stay_open(file: Path) -> None:
    """However many threads have read at once, no more connections stay open than the pool keeps, and they are used
    again.
    """
    direct, start = SQLiteReader(file), threading.Barrier(12)
    before = descriptors_of(file)

    def ask() -> None:
        start.wait()
        for _ in range(50):
            direct.rows_in_thread("SELECT count(*) FROM sqlite_master WHERE name = ?", ("none",))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert descriptors_of(file) - before <= KEPT_AT_MOST
    held = [direct._take() for _ in range(12)]
    for connection in held:
        direct._give_back(connection)
    assert descriptors_of(file) - before == KEPT_AT_MOST
    direct.close()
    assert descriptors_of(file) == before


def test_what_others_commit_is_seen(file: Path) -> None:
    """A read sees what another connection has committed: no transaction stays open between two reads."""
    direct = SQLiteReader(file)
    assert direct.rows_in_thread("SELECT n FROM t", []) == [(7,)]
    with sqlite3.connect(file) as other:
        other.execute("UPDATE t SET n = 8")
    other.close()
    assert direct.rows_in_thread("SELECT n FROM t", []) == [(8,)]
    direct.close()


def test_a_read_does_not_wait_for_a_lock(file: Path) -> None:
    """A read of a locked database raises at once, and does not wait."""
    direct = SQLiteReader(file)
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        direct.rows_in_thread("SELECT n FROM t", [])
    other.execute("ROLLBACK")
    other.close()
    assert direct.rows_in_thread("SELECT n FROM t", []) == [(7,)]
    direct.close()


def test_no_file_is_created(tmp_path: Path) -> None:
    """A read of a database that does not exist raises, and creates nothing."""
    direct = SQLiteReader(tmp_path / "none.db")
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        direct.rows_in_thread("SELECT 1", [])
    assert list(tmp_path.iterdir()) == []


async def test_a_locked_database_is_read_on_a_connection_that_waits(sqlite_store: UploadStore) -> None:
    """A small file is restored as soon as a locked database is free, on a connection that waits."""
    saved = await sqlite_store.save("a.png", b"bytes")
    saved.path.unlink()
    other = sqlite3.connect(sqlite_store.database.url.database or "", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    free = threading.Timer(0.3, lambda: other.execute("ROLLBACK"))
    free.start()
    with recorded_statements() as asked:
        assert await sqlite_store.restorer.restore_to_disk("a.png")
    free.join()
    other.close()
    assert saved.path.read_bytes() == b"bytes"
    assert any("image_chunk" in statement for statement in asked)
