"""Two nodes, one database, and all that can befall a name, in any order; beside them a model that says what must be.

Every step is done to the real thing and to the model; after it, every file, every record, every version of the history
and everything in quarantine must be what the model says. Sizes are made small, so that a few bytes are many chunks.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from selfheal import CorruptBlob, NotStored, SelfHealMiddleware, UploadStore, bulk
from selfheal.bulk.outcomes import Outcome
from selfheal.disk.open_file import Identity, identity_of
from tests.support.asgi import Wrapped, ask
from tests.support.sides import execute, files_below, in_quarantine, pieces_of, resize
from tests.support.waiting import eventually

SIZES = {
    "CHUNK": 64,
    "READ_AT_ONCE": 2,
    "HASH_AT_ONCE": 1,
    "WRITE_AT_ONCE": 2,
    "MOVED_AT_ONCE": 3,
    "WHOLE_FIRST": 600,
    "LARGE": 400,
}
TIMES = {"FOLLOWED_EVERY": 1e9, "SETTLED_AFTER": 0.0, "ABSENT_FOR": 0.0, "CHANGING_FOR": 1e9}
CHUNK = SIZES["CHUNK"]
NAMES = ["tom.jpg", "cats/über @2x.svg"]
PICTURES = [
    random.Random(f"{size}{letter}").randbytes(size)
    for size, letter in (
        (0, ""),
        (9, "a"),
        (9, "b"),
        (64, ""),
        (65, ""),
        (300, "a"),
        (300, "b"),
        (900, "a"),
        (900, "b"),
    )
]
A_DAY = 86_400 * 10**9
TABLES = ("image_storage", "image_blob", "image_chunk", "image_history")

nodes = st.sampled_from([0, 1])
names = st.sampled_from(NAMES)
pictures = st.sampled_from(PICTURES)
moments = st.sampled_from(["long ago", "now", "in future"])


# -- the model --------------------------------------------------------------------------------------------------------


@dataclass
class Version:
    """Bytes that a name had, or has."""

    data: bytes
    modified_ns: int
    generation: int


@dataclass
class Known(Version):
    """What the database knows of a name."""

    is_deleted: bool = False
    history: list[Version] = field(default_factory=list)

    def is_recorded(self, data: bytes) -> bool:
        """Whether these bytes are safe, now or as an earlier version."""
        return data in (self.data, *(version.data for version in self.history))


class Catalogue:
    """What the database must hold, and which bytes of it somebody has damaged: in `data`, or only in a `digest`."""

    def __init__(self) -> None:
        self.known: dict[str, Known] = {}
        self.damaged: dict[bytes, str] = {}

    def living(self, name: str) -> Known | None:
        known = self.known.get(name)
        return None if known is None or known.is_deleted else known

    def store(self, name: str, data: bytes, modified_ns: int, *, only_new: bool = False) -> None:
        self.damaged.pop(data, None)  # whoever brings the same bytes again mends them
        known = self.known.get(name)
        if known is None:
            self.known[name] = Known(data, modified_ns, 1)
        elif not (only_new or (not known.is_deleted and known.data == data)):
            self._replace(known, data, modified_ns)

    def bury(self, name: str) -> None:
        known = self.known[name]
        self._remember(known)
        known.generation += 1
        known.is_deleted = True

    def before(self, name: str) -> Version | None:
        """What an undo goes back to."""
        known = self.known.get(name)
        earlier = [] if known is None else [v for v in known.history if known.is_deleted or v.data != known.data]
        return earlier[-1] if earlier else None

    def undo(self, name: str) -> None:
        version = self.before(name)
        assert version is not None
        self._replace(self.known[name], version.data, version.modified_ns)

    def purge(self) -> None:
        for known in self.known.values():
            known.history.clear()
        self.damaged = {data: how for data, how in self.damaged.items() if data in self.wanted()}

    def wanted(self) -> set[bytes]:
        return {known.data for known in self.known.values() if not known.is_deleted}

    def can_be_read(self, data: bytes) -> bool | None:
        """None if nobody promises: a chunk that is right while its own digest is not may be served or refused."""
        how = self.damaged.get(data)
        return True if how is None else None if how == "digest" else False

    def _replace(self, known: Known, data: bytes, modified_ns: int) -> None:
        if not known.is_deleted:
            self._remember(known)
        known.data, known.modified_ns, known.is_deleted = data, modified_ns, False
        known.generation += 1

    def _remember(self, known: Known) -> None:
        known.history.append(Version(known.data, known.modified_ns, known.generation))


# -- a node -----------------------------------------------------------------------------------------------------------


@dataclass
class Copy:
    """A file on a disk."""

    data: bytes
    modified_ns: int


class Node:
    """A process with a disk of its own, and what must be on that disk: `copies`, and what went to quarantine."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory = directory
        self.copies: dict[str, Copy] = {}
        self.aside: Counter[bytes] = Counter()
        self._url = url
        self.start()

    def start(self) -> None:
        """Begin as a process that knows nothing of the one before it."""
        self.started_ns = time.time_ns()
        self.store = UploadStore(self.directory, self._url)
        self.app = SelfHealMiddleware(Wrapped(), self.store)
        self.seen: dict[str, Identity] = {}
        self.changing: set[str] = set()

    def path(self, name: str) -> Path:
        return self.directory / name

    def identity(self, name: str) -> Identity:
        return identity_of(os.stat(self.path(name)))

    def forget(self, name: str) -> None:
        self.seen.pop(name, None)

    def lay(self, name: str, data: bytes, modified_ns: int) -> None:
        """What an app, a deploy or a backup does: a file in place of another, with a time of its own."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name("being laid").write_bytes(data)
        os.utime(path.with_name("being laid"), ns=(modified_ns, modified_ns))
        path.with_name("being laid").rename(path)
        self.store.disk.root()  # as if the second were over after which a lost directory is looked for again
        self.copies[name] = Copy(data, modified_ns)

    def put(self, name: str, known: Known) -> None:
        """A record's file comes to the disk; bytes that no record or version holds are not lost."""
        self.put_aside(name, known)
        self.copies[name] = Copy(known.data, known.modified_ns)

    def put_aside(self, name: str, known: Known) -> None:
        copy = self.copies.pop(name, None)
        if copy is not None and not known.is_recorded(copy.data):
            self.aside[copy.data] += 1

    def looks_like(self, name: str, known: Known) -> bool:
        """Whether size and time are the record's; then nobody reads the bytes but those who are told to verify."""
        return (self.copies[name].modified_ns, len(self.copies[name].data)) == (known.modified_ns, len(known.data))

    def is_overwrite(self, name: str, known: Known) -> bool:
        """Whether the app itself wrote this file: after its process began and after the record, and not an old one."""
        copy = self.copies[name]
        old = {(version.data, version.modified_ns) for version in known.history}
        newer = copy.modified_ns > max(self.started_ns, known.modified_ns)
        return newer and (copy.data, copy.modified_ns) not in old


# -- the machine ------------------------------------------------------------------------------------------------------


def step(**given: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """A rule after which visitors may come, to either node: for its name, or for any if it has none."""

    def make(do: Callable[..., None]) -> Any:
        def play(self: TwoNodes, visits: list[tuple[int, str, bool]], **drawn: Any) -> None:
            do(self, **drawn)
            for node, name, part in visits:
                self.everything_is_as_the_model_says()
                self.get(node, drawn.get("name", name), part)

        play.__name__ = do.__name__
        return rule(visits=st.lists(st.tuples(nodes, names, st.booleans()), max_size=3), **given)(play)

    return make


class TwoNodes(RuleBasedStateMachine):
    """Everything that apps, deploys, broken disks and broken databases do, one step after the other."""

    url: ClassVar[str]
    """Of a database with tables in it."""
    steps: ClassVar[int] = 0

    @initialize()
    def begin(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="selfheal-model-"))
        self.runner = asyncio.Runner()
        self.run = self.runner.run
        self.engine = create_async_engine(self.url)
        self.catalogue = Catalogue()
        self.run(self.execute(*(f"DELETE FROM {table}" for table in TABLES)))
        self.nodes = [Node(self.base / which / "static" / "uploads", self.url) for which in ("one", "two")]
        self.crashed: list[UploadStore] = []

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        for store in (*self.crashed, *(node.store for node in self.nodes)):
            self.run(store.close())
        self.run(self.engine.dispose())
        self.runner.close()
        shutil.rmtree(self.base)

    # -- what an app does ---------------------------------------------------------------------------------------------

    @step(node=nodes, name=names, data=pictures)
    def save(self, node: int, name: str, data: bytes) -> None:
        here = self.nodes[node]
        saved = self.run(here.store.save(name, pieces_of(data, 50)))
        self.catalogue.store(name, data, saved.modified_ns)
        here.put(name, self.catalogue.known[name])
        here.forget(name)

    @step(node=nodes, name=names, data=pictures)
    def save_that_breaks_off(self, node: int, name: str, data: bytes) -> None:
        async def broken() -> AsyncIterator[bytes]:
            async for piece in pieces_of(data, 50):
                yield piece
            raise ConnectionResetError

        with pytest.raises(ConnectionResetError):
            self.run(self.nodes[node].store.save(name, broken()))

    @step(node=nodes, name=names, data=pictures, commits=st.booleans())
    def save_in_a_transaction(self, node: int, name: str, data: bytes, commits: bool) -> None:
        here = self.nodes[node]

        async def work() -> int:
            async with self.engine.connect() as connection:
                saved = await here.store.save(name, data, connection=connection)
                await (connection.commit() if commits else connection.rollback())
            return saved.modified_ns

        modified_ns = self.run(work())
        if commits:
            self.catalogue.store(name, data, modified_ns)
        here.forget(name)
        here.changing.add(name)

    @step(node=nodes, name=names, data=st.none() | pictures)
    def delete(self, node: int, name: str, data: bytes | None) -> None:
        if data is not None:
            self.nodes[node].lay(name, data, _at("now"))
        here, copy = self.nodes[node], self.nodes[node].copies.get(name)
        deleted = self.run(here.store.delete(name))
        if self.catalogue.known.get(name) is None and copy is not None:
            self.catalogue.store(name, copy.data, copy.modified_ns)
        assert deleted == (self.catalogue.living(name) is not None)
        if deleted:
            known = self.catalogue.known[name]
            self.catalogue.bury(name)
            if name in here.copies and here.looks_like(name, known):
                del here.copies[name]
            here.put_aside(name, known)
            here.forget(name)

    @step(node=nodes, name=names)
    def undo(self, node: int, name: str) -> None:
        here, version = self.nodes[node], self.catalogue.before(name)
        if version is None:
            with pytest.raises(NotStored):
                self.run(here.store.undo(name))
            return
        can_be_read = self.catalogue.can_be_read(version.data)
        try:
            self.run(here.store.undo(name))
        except CorruptBlob:
            assert not can_be_read  # and nothing has changed
        else:
            assert can_be_read is not False
            self.catalogue.undo(name)
            here.forget(name)
            here.put(name, self.catalogue.known[name])

    @step(name=names, one=pictures, other=pictures)
    def save_on_both_at_once(self, name: str, one: bytes, other: bytes) -> None:
        known = self.catalogue.living(name)
        for copy in [node.copies.get(name) for node in self.nodes]:
            if copy is not None and not (known and known.is_recorded(copy.data)):
                return  # whether it is set aside would depend on who is faster

        async def work() -> list[Any]:
            stores = [node.store for node in self.nodes]
            return await asyncio.gather(stores[0].save(name, one), stores[1].save(name, other))

        saved = self.run(work())
        data = {0: one, 1: other}
        for node in sorted((0, 1), key=lambda node: saved[node].generation):
            self.catalogue.store(name, data[node], saved[node].modified_ns)
        now = self.catalogue.known[name]
        for node, here in enumerate(self.nodes):
            here.forget(name)
            here.copies.pop(name, None)
            self._either(here, name, Copy(data[node], saved[node].modified_ns), Copy(now.data, now.modified_ns))

    # -- what befalls the disk ----------------------------------------------------------------------------------------

    @step(node=nodes, name=names, data=pictures, moment=moments)
    def lay(self, node: int, name: str, data: bytes, moment: str) -> None:
        self.nodes[node].lay(name, data, _at(moment))

    @step(node=nodes, name=names, pick=st.integers(0, 5), moment=st.sampled_from(["", "long ago", "now", "in future"]))
    def lay_back_an_old_version(self, node: int, name: str, pick: int, moment: str) -> None:
        known = self.catalogue.known.get(name)
        if known is not None:
            version = [known, *known.history][pick % (1 + len(known.history))]
            self.nodes[node].lay(name, version.data, _at(moment) if moment else version.modified_ns)

    @step(node=nodes, name=names, bit=st.integers(0, 10_000))
    def flip_a_bit(self, node: int, name: str, bit: int) -> None:
        copy = self.nodes[node].copies.get(name)
        if copy is None or not copy.data:
            return
        path, at = self.nodes[node].path(name), bit // 8 % len(copy.data)
        data = bytearray(copy.data)
        data[at] ^= 1 << bit % 8
        with path.open("r+b") as file:
            file.write(data)
        os.utime(path, ns=(copy.modified_ns, copy.modified_ns))
        copy.data = bytes(data)

    @step(node=nodes, name=names, size=st.integers(0, 1000))
    def change_the_size(self, node: int, name: str, size: int) -> None:
        copy = self.nodes[node].copies.get(name)
        if copy is not None and size != len(copy.data):
            os.truncate(self.nodes[node].path(name), size)
            os.utime(self.nodes[node].path(name), ns=(copy.modified_ns, copy.modified_ns))
            copy.data = copy.data[:size].ljust(size, b"\0")

    @step(node=nodes, name=names)
    def lose_a_file(self, node: int, name: str) -> None:
        self.nodes[node].path(name).unlink(missing_ok=True)
        self.nodes[node].copies.pop(name, None)

    @step(node=nodes)
    def lose_the_directory(self, node: int) -> None:
        shutil.rmtree(self.nodes[node].directory, ignore_errors=True)
        self.nodes[node].copies.clear()

    @step(node=nodes)
    def crash(self, node: int) -> None:
        here = self.nodes[node]
        self.crashed.append(here.store)
        here.start()
        self.run(here.store.open())

    # -- what befalls the database ------------------------------------------------------------------------------------

    @step(
        name=names,
        pick=st.integers(0, 5),
        how=st.sampled_from(["data", "digest", "missing"]),
        last=st.booleans(),
        then=st.sampled_from(["", "lost", "lost and restored"]),
    )
    def damage_the_database(self, name: str, pick: int, how: str, last: bool, then: str) -> None:
        self._damage(name, pick, how, last=last)
        if then:
            self.lose_everywhere(name)
        if then == "lost and restored":
            self._restore(self.nodes[pick % 2], verify=False)

    def _damage(self, name: str, pick: int, how: str, *, last: bool) -> None:
        known = self.catalogue.known.get(name)
        if known is None:
            return
        data = [*known.history, known][pick % (1 + len(known.history))].data
        if not data or data in self.catalogue.damaged or (known.is_deleted and not known.history):
            return
        position = (len(data) - 1) // CHUNK if last else 0
        where = f"WHERE sha256 = '{sha256(data).hexdigest()}' AND position = {position}"
        if how == "missing":
            self.run(self.execute(f"DELETE FROM image_chunk {where}"))
        else:
            column = "data" if how == "data" else "digest"
            [[good]] = self.run(self.rows(f"SELECT {column} FROM image_chunk {where}"))
            bad = bytes([good[0] ^ 64]) + good[1:]
            self.run(self.execute(f"UPDATE image_chunk SET {column} = :bad {where}", bad=bad))
        self.catalogue.damaged[data] = how

    @step(node=nodes)
    def purge(self, node: int) -> None:
        """As if nothing were to be kept for a second; then nothing but the living's bytes is left."""
        soon = timedelta(seconds=-2)
        self.run(self.nodes[node].store.database.purge(soon, grace=soon))
        self.catalogue.purge()
        wanted = self.catalogue.wanted()
        missing = sum(how == "missing" for how in self.catalogue.damaged.values())
        [[blobs]] = self.run(self.rows("SELECT count(*) FROM image_blob"))
        [[chunks]] = self.run(self.rows("SELECT count(*) FROM image_chunk"))
        assert blobs == len(wanted)
        assert chunks == sum(-(-len(data) // CHUNK) for data in wanted) - missing

    # -- what visitors and operators do -------------------------------------------------------------------------------

    @rule(node=nodes, name=names, part=st.booleans())
    def get(self, node: int, name: str, part: bool) -> None:
        """A visitor gets the right bytes; a wrong copy that somebody laid is served once, and settled behind that.

        A copy that this process has seen already is not looked at again, even if another node changed the name since.
        """
        here = self.nodes[node]
        copy, living = here.copies.get(name), self.catalogue.living(name)
        if copy is not None:
            identity = here.identity(name)
            assert self._asked(here, name, part=part) == (200, copy.data)
            if here.seen.get(name) != identity:
                is_hidden = living is not None and here.looks_like(name, living)
                self._look(here, name)
                if name not in here.changing:
                    here.seen[name] = identity
                now = self.catalogue.living(name)
                if not is_hidden and (now is None or self.catalogue.can_be_read(now.data)):
                    after = here.copies.get(name)
                    assert (after and after.data) == (now and now.data)
        elif living is None:
            assert self._asked(here, name, part=False) == (404, b"wrapped")
        else:
            status, body = self._asked(here, name, part=part)
            can_be_read = self.catalogue.can_be_read(living.data)
            assert status == 500 or body == living.data
            if can_be_read:
                assert status == 200
                here.put(name, living)
            elif status == 200:
                lies_before_the_damage = part and len(living.data) > SIZES["WHOLE_FIRST"]
                assert can_be_read is None or lies_before_the_damage
                if can_be_read is None and here.path(name).exists():
                    here.put(name, living)

    @step(node=nodes, name=names)
    def look(self, node: int, name: str) -> None:
        here = self.nodes[node]
        if name not in here.copies:
            self.run(here.store.check(name))
            return
        known = self.catalogue.living(name)
        is_damaged = known is not None and known.data in self.catalogue.damaged
        try:
            self.run(here.store.check(name))
        except CorruptBlob:
            assert is_damaged
        self._look(here, name)

    @step(node=nodes, name=names, data=st.none() | pictures)
    def adopt(self, node: int, name: str, data: bytes | None) -> None:
        if data is not None:
            self.nodes[node].lay(name, data, _at("now"))
        here, copy, known = self.nodes[node], self.nodes[node].copies.get(name), self.catalogue.known.get(name)
        if copy is not None:
            self.catalogue.store(name, copy.data, copy.modified_ns, only_new=True)
        if copy is None or (known is not None and known.is_deleted):
            with pytest.raises(NotStored):
                self.run(here.store.adopt(name))
        else:
            self.run(here.store.adopt(name))

    @step(node=nodes, name=names)
    def restore_one(self, node: int, name: str) -> None:
        here, living = self.nodes[node], self.catalogue.living(name)
        if living is None:
            with pytest.raises(NotStored):
                self.run(here.store.restore(name))
        elif name in here.copies:
            self.run(here.store.restore(name))
        else:
            self._put(here, name, lambda: here.store.restore(name))

    @step(node=nodes, verify=st.booleans(), loses=st.none() | names)
    def restore(self, node: int, verify: bool, loses: str | None) -> None:
        if loses is not None:
            self.lose_everywhere(loses)
        self._restore(self.nodes[node], verify=verify)

    @step(node=nodes)
    def restore_and_verify(self, node: int) -> None:
        """After a restore that verifies nothing is wrong, unless it is damaged in the database, or only on disk."""
        here = self.nodes[node]
        self._restore(here, verify=True)
        said = self.run(_outcomes(bulk.verify(here.store, jobs=1)))
        for name, outcome in said.items():
            known = self.catalogue.known.get(name)
            expected = Outcome.OK if known is not None else Outcome.MISSING_IN_DATABASE
            is_damaged = known is not None and known.data in self.catalogue.damaged
            assert outcome == (Outcome.CORRUPT_IN_DATABASE if is_damaged else expected)

    @step(node=nodes, drill=st.booleans())
    def verify(self, node: int, drill: bool) -> None:
        here = self.nodes[node]
        expected = {}
        for name in NAMES:
            copy, known = here.copies.get(name), self.catalogue.known.get(name)
            if known is not None and not known.is_deleted:
                is_damaged = known.data in self.catalogue.damaged
                is_same = copy is not None and copy.data == known.data
                found = Outcome.MISSING_ON_DISK if copy is None else Outcome.OK if is_same else Outcome.DIFFERS
                expected[name] = Outcome.CORRUPT_IN_DATABASE if is_damaged else found
            elif copy is not None:
                expected[name] = Outcome.MISSING_IN_DATABASE if known is None else Outcome.DELETED
        assert self.run(_outcomes(bulk.verify(here.store, drill=drill, jobs=1))) == expected

    @step(node=nodes, prefer_disk=st.booleans())
    def migrate(self, node: int, prefer_disk: bool) -> None:
        here = self.nodes[node]
        said = self.run(_outcomes(bulk.migrate(here.store, prefer_disk=prefer_disk, jobs=1)))
        expected = {}
        in_order = sorted(here.copies, key=os.fsencode)
        new = [name for name in in_order if name not in self.catalogue.known]
        for name in new:
            copy = here.copies[name]
            self.catalogue.store(name, copy.data, copy.modified_ns)
            expected[name] = Outcome.MIGRATED
        for name in [name for name in in_order if name not in new]:
            expected[name] = self._compare(here, name, prefer_disk=prefer_disk)
        assert said == expected

    # -- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        """Files, times and quarantine of both nodes; records and history. Nothing else lies below the directories."""
        TwoNodes.steps += 1
        for node in self.nodes:
            assert files_below(node.directory) == sorted(node.copies)
            for name, copy in node.copies.items():
                path = node.path(name)
                assert (path.read_bytes(), path.stat().st_mtime_ns) == (copy.data, copy.modified_ns), name
            assert Counter(in_quarantine(node.store)) == node.aside
            shutil.rmtree(node.store.disk.quarantine_path, ignore_errors=True)
            node.aside.clear()
        query = "SELECT name, generation, sha256, size, modified_ns, deleted_at IS NOT NULL FROM image_storage"
        records = {row[0]: (*row[1:5], bool(row[5])) for row in self.run(self.rows(query))}
        assert records == {name: (*_row(known), known.is_deleted) for name, known in self.catalogue.known.items()}
        query = "SELECT name, generation, sha256, size, modified_ns FROM image_history"
        history = {tuple(row) for row in self.run(self.rows(query))}
        assert history == {(name, *_row(v)) for name, known in self.catalogue.known.items() for v in known.history}

    # -- inside -------------------------------------------------------------------------------------------------------

    def lose_everywhere(self, name: str) -> None:
        for node in self.nodes:
            node.path(name).unlink(missing_ok=True)
            node.copies.pop(name, None)

    def _asked(self, here: Node, name: str, *, part: bool) -> tuple[int, bytes]:
        """The status and bytes of a GET, once all that is done behind it is done; a part is put into its whole.

        An answer that breaks off is told as the 500 that it would have been if it had not begun.
        """
        size = len((here.copies.get(name) or self.catalogue.living(name) or Copy(b"", 0)).data)
        headers = [("range", "bytes=7-250")] if part else []

        async def work() -> tuple[int, bytes, str]:
            try:
                answer = await ask(here.app, f"/static/uploads/{name}", headers=headers)
            except CorruptBlob:
                return 500, b"", ""
            finally:
                await here.store.tasks.settle(30)
            return answer.status, answer.body, answer.headers.get("content-range", "")

        status, body, content_range = self.run(work())
        if not part or status == 500:
            return status, body
        if size <= 7:
            assert (status, content_range) == (416, f"bytes */{size}")
        else:
            assert (status, content_range) == (206, f"bytes 7-{min(250, size - 1)}/{size}")
        right = (here.copies.get(name) or self.catalogue.known[name]).data
        assert body == right[7:251]
        return 200, right

    def _look(self, here: Node, name: str) -> None:
        """What is settled behind the first hit of a file."""
        copy, known = here.copies[name], self.catalogue.known.get(name)
        if known is None:
            self.catalogue.store(name, copy.data, copy.modified_ns)
        elif known.is_deleted:
            here.put_aside(name, known)
        elif here.looks_like(name, known):
            pass  # who only looks at size and time cannot tell; `restore --verify` reads
        elif copy.data == known.data:
            copy.modified_ns = known.modified_ns
        elif here.is_overwrite(name, known):
            self.catalogue.store(name, copy.data, copy.modified_ns)
        elif self.catalogue.can_be_read(known.data):
            here.put(name, known)
        elif self.catalogue.can_be_read(known.data) is None and _there(here, name) != copy:
            here.put(name, known)

    def _put(self, here: Node, name: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Do what brings a living record to the disk, or fails because the record is damaged."""
        known = self.catalogue.known[name]
        can_be_read = self.catalogue.can_be_read(known.data)
        try:
            self.run(work())
        except CorruptBlob:
            assert not can_be_read
        else:
            assert can_be_read is not False
            here.put(name, known)

    def _restore(self, here: Node, *, verify: bool) -> None:
        """A bulk restore: what it says of each name, and what it does."""
        there = {name for name in NAMES if self.catalogue.living(name) and name in here.copies and not verify}
        said = self.run(_outcomes(bulk.restore(here.store, verify=verify, jobs=1), there))
        assert said.keys() >= {name for name in NAMES if self.catalogue.living(name)}
        for name, outcome in said.items():
            copy, known = here.copies.get(name), self.catalogue.known[name]
            if known.is_deleted:
                assert outcome == Outcome.DELETED
                here.put_aside(name, known)
            elif copy is not None and (copy.data == known.data or not verify):
                assert outcome == Outcome.OK
                if verify:
                    copy.modified_ns = known.modified_ns
            elif outcome == Outcome.RESTORED:
                assert self.catalogue.can_be_read(known.data) is not False
                here.put(name, known)
            else:
                assert outcome == Outcome.CORRUPT_IN_DATABASE
                assert not self.catalogue.can_be_read(known.data)
        assert not any(known.is_deleted and name in here.copies for name, known in self.catalogue.known.items())

    def _compare(self, here: Node, name: str, *, prefer_disk: bool) -> Outcome:
        """What a migration does about a file that the database knows."""
        copy, known = here.copies[name], self.catalogue.known[name]
        if known.is_deleted:
            return Outcome.DELETED
        is_damaged = known.data in self.catalogue.damaged
        if copy.data == known.data or (here.looks_like(name, known) and not is_damaged):
            self.catalogue.damaged.pop(known.data, None)
            return Outcome.MIGRATED if is_damaged else Outcome.OK
        if not prefer_disk:
            return Outcome.CORRUPT_IN_DATABASE if is_damaged else Outcome.DIFFERS
        self.catalogue.store(name, copy.data, copy.modified_ns)
        return Outcome.MIGRATED

    def _either(self, here: Node, name: str, *copies: Copy) -> None:
        there = _there(here, name)
        assert there in copies
        here.copies[name] = there

    async def rows(self, query: str) -> Any:
        async with self.engine.connect() as connection:
            return (await connection.execute(text(query))).all()

    async def execute(self, *statements: str, **values: Any) -> None:
        async with self.engine.begin() as connection:
            for statement in statements:
                await connection.execute(text(statement), values)


def _at(moment: str) -> int:
    return time.time_ns() + {"long ago": -A_DAY, "now": 0, "in future": A_DAY}[moment]


def _row(version: Version) -> tuple[int, str, int, int]:
    return version.generation, sha256(version.data).hexdigest(), len(version.data), version.modified_ns


def _there(here: Node, name: str) -> Copy:
    return Copy(here.path(name).read_bytes(), here.path(name).stat().st_mtime_ns)


async def _outcomes(run: Any, together: Collection[str] = ()) -> dict[str, Outcome]:
    """What a bulk run says of each name, of none of them twice; those `together` it only counts, as all well."""
    results = [result async for result in run]
    said = {result.name: result.outcome for result in results if result.name}
    counted = [result for result in results if not result.name]
    assert len(said) + len(counted) == len(results)
    assert (sum(result.count for result in counted), {result.outcome for result in counted} - {Outcome.OK}) == (
        len(together),
        set(),
    )
    assert not said.keys() & set(together)
    return said | dict.fromkeys(together, Outcome.OK)


# -- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 bytes, answers that stream from 600 bytes on, and nothing that waits for the clock."""
    resize(monkeypatch, **SIZES, **TIMES)


def play(url: str, steps: int) -> int:
    """Play games of up to 40 moves, each with its visits, until there are enough of them; how many there were."""
    machine = type("Play", (TwoNodes,), {"url": url})
    TwoNodes.steps = 0
    asyncio.run(_make_tables(url))
    while TwoNodes.steps < steps:
        left = -(-(steps - TwoNodes.steps) // 100)
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=left,
                stateful_step_count=40,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    return TwoNodes.steps


async def _make_tables(url: str) -> None:
    async with UploadStore("/nowhere", url) as store:
        await store.database.create_tables()


@pytest.mark.timeout(7200)  # a failure is made small before it is told
def test_two_nodes_over_sqlite(
    sqlite_url: str, small_parts: None, times: Callable[[int, int], int], record_property: Callable[[str, object], None]
) -> None:
    """Whatever happens in whatever order, both disks and the database hold what the model says, and nothing else."""
    record_property("steps", f"{play(sqlite_url, times(1_500, 45_000)):,}")


@pytest.mark.timeout(7200)
def test_two_nodes_over_postgres(
    postgres_url: str,
    small_parts: None,
    times: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """The same over PostgreSQL."""
    record_property("steps", f"{play(postgres_url, times(100, 10_000)):,}")


@pytest.mark.parametrize("change", ["delete", "save"])
async def test_a_change_reaches_every_node(sqlite_store: UploadStore, tmp_path: Path, change: str) -> None:
    """What is deleted or overwritten on one node is not served as it was by another, but for a few seconds."""
    name, path = NAMES[0], f"/static/uploads/{NAMES[0]}"
    async with UploadStore(tmp_path / "elsewhere", sqlite_store.database.url) as other:
        app = SelfHealMiddleware(Wrapped(), other)
        await sqlite_store.save(name, b"old")
        for _ in range(2):
            assert (await ask(app, path)).body == b"old"
            await other.tasks.settle(30)
        await (sqlite_store.delete(name) if change == "delete" else sqlite_store.save(name, b"new"))

        async def followed() -> bool:
            return (await ask(app, path)).body == {"delete": b"wrapped", "save": b"new"}[change]

        await eventually(followed)


async def test_an_undo_to_damaged_bytes_changes_nothing(sqlite_store: UploadStore) -> None:
    """An undo that cannot bring its bytes back leaves the name as it is, on both sides."""
    name = NAMES[0]
    await sqlite_store.save(name, b"first")
    now = await sqlite_store.save(name, b"second")
    (version,) = await sqlite_store.database.history(name)
    await execute(sqlite_store, "UPDATE image_chunk SET data = x'00' WHERE sha256 = :sha256", sha256=version.sha256)
    with pytest.raises(CorruptBlob):
        await sqlite_store.undo(name)
    record = await sqlite_store.database.find(name)
    assert record is not None
    assert (record.sha256, record.generation) == (now.sha256, now.generation)
