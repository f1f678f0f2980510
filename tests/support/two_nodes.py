"""Two nodes over one database, and everything that can happen to a name, in any order, beside a model.

Hypothesis applies each step to the nodes and to the model; after it, every file, every record and every version of the
history must be what the model says, and nothing may wait in quarantine. Sizes are small: a few bytes are many chunks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator
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

from selfheal import CorruptBlob, NotStored, UploadStore, bulk
from selfheal.bulk.outcomes import Outcome
from tests.support.asgi import ask
from tests.support.catalogue_model import CatalogueModel, Version
from tests.support.node_model import FileCopy, Node
from tests.support.sample_data import pieces_of
from tests.support.storage import settle
from tests.support.store_state import files_below, in_quarantine

SIZES = {
    "CHUNK": 64,
    "READ_AT_ONCE": 2,
    "HASH_AT_ONCE": 1,
    "WRITE_AT_ONCE": 2,
    "MOVED_AT_ONCE": 3,
    "WHOLE_FIRST": 600,
    "LARGE": 400,
}
TIMES = {
    "FOLLOW_EVERY": 0.0,
    "CALL_EVERY": 1e9,
    "SETTLED_AFTER": 0.0,
    "FORGET_AFTER": 0.0,
    "CHANGING_FOR": 1e9,
    "OVERWRITES_EVERY": 0.0,
}
CHUNK = SIZES["CHUNK"]
NAMES = ["tom.jpg", "cats/über @2x.svg"]
PICTURES = [
    random.Random(seed).randbytes(int(seed.rstrip("ab")))
    for seed in ("0", "9a", "9b", "64", "65", "300a", "300b", "900a", "900b")
]
A_DAY = 86_400 * 10**9
TABLES = ("image_storage", "image_blob", "image_chunk", "image_history")

nodes = st.sampled_from([0, 1])
names = st.sampled_from(NAMES)
pictures = st.sampled_from(PICTURES)
moments = st.sampled_from(["long ago", "now", "in future"])


def step(**given: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """Return a rule after which visitors may ask either node, for the name of the step if it has one."""

    def make(do: Callable[..., None]) -> Any:
        def run_step(self: TwoNodes, visits: list[tuple[int, str, bool]], **drawn: Any) -> None:
            self.log(do.__name__, drawn)
            with self.log_in_failures():
                do(self, **drawn)
            for node, name, part in visits:
                self.everything_is_as_the_model_says()
                self.get(node, drawn.get("name", name), part)

        run_step.__name__ = do.__name__
        return rule(visits=st.lists(st.tuples(nodes, names, st.booleans()), max_size=3), **given)(run_step)

    return make


class TwoNodes(RuleBasedStateMachine):
    """Everything that apps, deploys, broken disks and broken databases do, in any order, checked after each step."""

    url: ClassVar[str]
    """The URL of a database whose tables exist."""
    steps: ClassVar[int] = 0

    @initialize()
    def begin(self) -> None:
        self._log: list[str] = []
        self.base = Path(tempfile.mkdtemp(prefix="selfheal-model-"))
        self.runner = asyncio.Runner()
        self.run = self.runner.run
        self.engine = create_async_engine(self.url)
        self.catalogue = CatalogueModel()
        self.run(self.execute(*(f"DELETE FROM {table}" for table in TABLES)))
        directories = [self.base / which / "static" / "uploads" for which in ("one", "two")]
        self.nodes = [Node(directory, self.url, self.catalogue) for directory in directories]
        self.marks: list[tuple[int, int] | None] = [None, None]
        self.crashed: list[UploadStore] = []
        for here in self.nodes:
            self.run(settle(here.store))
            self._first_request(here)

    def log(self, what: str, given: dict[str, Any]) -> None:
        """Remember a step: what depends on time happens once, and Hypothesis cannot replay it."""
        self._log.append(f"{time.time():.3f} {what} {given}")

    @contextlib.contextmanager
    def log_in_failures(self) -> Iterator[None]:
        """Add the steps so far to an error."""
        try:
            yield
        except Exception as error:
            error.add_note("\n".join(self._log))
            raise

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        for store in (*self.crashed, *(node.store for node in self.nodes)):
            self.run(store.close())
        self.run(self.engine.dispose())
        self.runner.close()
        shutil.rmtree(self.base)

    # -- changes by an app --------------------------------------------------------------------------------------------

    @step(node=nodes, name=names, data=pictures)
    def save(self, node: int, name: str, data: bytes) -> None:
        here = self.nodes[node]
        saved = self.run(here.store.save(name, pieces_of(data, 50)))
        self.catalogue.store(name, data, saved.modified_ns)
        here.expect_restored(name)
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
            self.nodes[node].replace_file(name, data, _at("now"))
        here, copy = self.nodes[node], self.nodes[node].copies.get(name)
        deleted = self.run(here.store.delete(name))
        if self.catalogue.names.get(name) is None and copy is not None:
            self.catalogue.store(name, copy.data, copy.modified_ns)
        assert deleted == (self.catalogue.alive(name) is not None)
        if deleted:
            self.catalogue.delete(name)
            here.expect_set_aside(name)
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
            here.expect_restored(name)

    @step(name=names, one=pictures, other=pictures)
    def save_on_both_at_once(self, name: str, one: bytes, other: bytes) -> None:
        state = self.catalogue.alive(name)
        for copy in [node.copies.get(name) for node in self.nodes]:
            if copy is not None and not (state and state.is_recorded(copy.data)):
                return  # whether it is set aside would depend on which save is faster

        async def work() -> list[Any]:
            stores = [node.store for node in self.nodes]
            return await asyncio.gather(stores[0].save(name, one), stores[1].save(name, other))

        saved = self.run(work())
        data = {0: one, 1: other}
        for node in sorted((0, 1), key=lambda node: saved[node].generation):
            self.catalogue.store(name, data[node], saved[node].modified_ns)
        now = self.catalogue.names[name]
        for node, here in enumerate(self.nodes):
            here.forget(name)
            here.failed.add(name)
            copy = here.copies.pop(name, None)
            if copy is not None:
                self.catalogue.damaged.pop(copy.data, None)
            self._expect_one_of(
                here, name, FileCopy(data[node], saved[node].modified_ns), FileCopy(now.data, now.modified_ns)
            )

    # -- changes of the disk ------------------------------------------------------------------------------------------

    @step(node=nodes, name=names, data=pictures, moment=moments)
    def replace_a_file(self, node: int, name: str, data: bytes, moment: str) -> None:
        self.nodes[node].replace_file(name, data, _at(moment))

    @step(node=nodes, name=names, pick=st.integers(0, 5), moment=st.sampled_from(["", "long ago", "now", "in future"]))
    def replace_a_file_by_an_old_version(self, node: int, name: str, pick: int, moment: str) -> None:
        state = self.catalogue.names.get(name)
        if state is not None:
            version = [state, *state.history][pick % (1 + len(state.history))]
            self.nodes[node].replace_file(name, version.data, _at(moment) if moment else version.modified_ns)

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
        self.nodes[node].lose_directory()
        self.marks[node] = None

    @step(node=nodes)
    def crash(self, node: int) -> None:
        here = self.nodes[node]
        if self._is_uncertain(here):
            return
        self.crashed.append(here.store)
        here.start()
        self.run(here.store.open())
        assert not here.directory.exists() or here.mark() is not None
        self._first_request(here)

    @step(node=nodes)
    def follow(self, node: int) -> None:
        """A node learns what others changed, and tries again what failed."""
        here = self.nodes[node]
        if self._is_uncertain(here):
            return
        here.foresee()

        async def work() -> None:
            here.store.background.follow()
            await here.store.tasks.drain(30)

        self.run(work())
        self._expect_followed(here)

    # -- damage and purges of the database ----------------------------------------------------------------------------

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
        state = self.catalogue.names.get(name)
        if state is None:
            return
        data = [*state.history, state][pick % (1 + len(state.history))].data
        if not data or data in self.catalogue.damaged or (state.is_deleted and not state.history):
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
        """Purge everything that may be purged; after that only the bytes of names that are alive are left."""
        soon = timedelta(seconds=-2)
        self.run(self.nodes[node].store.database.purge(soon, grace=soon))
        self.catalogue.purge()
        referenced = self.catalogue.referenced()
        missing = sum(how == "missing" for how in self.catalogue.damaged.values())
        [[blobs]] = self.run(self.rows("SELECT count(*) FROM image_blob"))
        [[chunks]] = self.run(self.rows("SELECT count(*) FROM image_chunk"))
        assert blobs == len(referenced)
        assert chunks == sum(-(-len(data) // CHUNK) for data in referenced) - missing

    # -- visitors and operators ---------------------------------------------------------------------------------------

    @rule(node=nodes, name=names, part=st.booleans())
    def get(self, node: int, name: str, part: bool) -> None:
        """Get a name: the bytes are right; a differing file is served once, and then handled in the background.

        A file that this process has seen is not checked again, even if another node has changed the name since.
        """
        self.log("get", {"node": node, "name": name, "part": part})
        with self.log_in_failures():
            self._get(self.nodes[node], name, part=part)

    def _get(self, here: Node, name: str, *, part: bool) -> None:
        copy, state = here.copies.get(name), self.catalogue.alive(name)
        if copy is not None:
            identity = here.identity(name)
            here.foresee()
            assert self._request(here, name, part=part) == (200, copy.data)
            if here.seen.get(name) != identity:
                is_hidden = state is not None and here.has_recorded_size_and_time(name, state)
                self._expect_compared(here, name)
                now = self.catalogue.alive(name)
                if not is_hidden and (now is None or self.catalogue.can_be_read(now.data)):
                    after = here.copies.get(name)
                    assert (after and after.data) == (now and now.data)
        elif state is None:
            assert self._request(here, name, part=False) == (404, b"wrapped")
        else:
            status, body = self._request(here, name, part=part)
            can_be_read = self.catalogue.can_be_read(state.data)
            assert status == 500 or body == state.data
            if can_be_read:
                assert status == 200
                here.expect_restored(name)
            elif status == 200:
                is_before_the_damage = part and len(state.data) > SIZES["WHOLE_FIRST"]
                assert can_be_read is None or is_before_the_damage
                if can_be_read is None and here.path(name).exists():
                    here.expect_restored(name)

    @step(node=nodes, name=names)
    def check(self, node: int, name: str) -> None:
        here = self.nodes[node]
        if name not in here.copies:
            self.run(here.store.reconciler.check(name))
            return
        state = self.catalogue.alive(name)
        is_damaged = state is not None and state.data in self.catalogue.damaged
        here.foresee()
        try:
            self.run(here.store.reconciler.check(name))
        except CorruptBlob:
            assert is_damaged
        self._expect_agreement(here, name)

    @step(node=nodes, name=names, data=st.none() | pictures)
    def adopt(self, node: int, name: str, data: bytes | None) -> None:
        if data is not None:
            self.nodes[node].replace_file(name, data, _at("now"))
        here, copy, state = self.nodes[node], self.nodes[node].copies.get(name), self.catalogue.names.get(name)
        if copy is not None:
            self.catalogue.store(name, copy.data, copy.modified_ns, only_new=True)
        if copy is None or (state is not None and state.is_deleted):
            with pytest.raises(NotStored):
                self.run(here.store.adopt(name))
        else:
            self.run(here.store.adopt(name))

    @step(node=nodes, name=names)
    def restore_one(self, node: int, name: str) -> None:
        here, state = self.nodes[node], self.catalogue.alive(name)
        if state is None:
            with pytest.raises(NotStored):
                self.run(here.store.restore(name))
        elif name in here.copies:
            self.run(here.store.restore(name))
        else:
            self._restore_one(here, name, lambda: here.store.restore(name))

    @step(node=nodes, verify=st.booleans(), loses=st.none() | names)
    def restore(self, node: int, verify: bool, loses: str | None) -> None:
        if loses is not None:
            self.lose_everywhere(loses)
        self._restore(self.nodes[node], verify=verify)

    @step(node=nodes)
    def restore_and_verify(self, node: int) -> None:
        """After `restore --verify` only damage in the database and files without a record are wrong."""
        here = self.nodes[node]
        self._restore(here, verify=True)
        outcomes = self.run(_run_outcomes(bulk.verify(here.store, jobs=1)))
        for name, outcome in outcomes.items():
            state = self.catalogue.names.get(name)
            expected = Outcome.OK if state is not None else Outcome.MISSING_IN_DATABASE
            is_damaged = state is not None and state.data in self.catalogue.damaged
            assert outcome == (Outcome.CORRUPT_IN_DATABASE if is_damaged else expected)

    @step(node=nodes, drill=st.booleans())
    def verify(self, node: int, drill: bool) -> None:
        here = self.nodes[node]
        expected = {}
        for name in NAMES:
            copy, state = here.copies.get(name), self.catalogue.names.get(name)
            if state is not None and not state.is_deleted:
                is_damaged = state.data in self.catalogue.damaged
                is_same = copy is not None and copy.data == state.data
                found = Outcome.MISSING_ON_DISK if copy is None else Outcome.OK if is_same else Outcome.DIFFERS
                expected[name] = Outcome.CORRUPT_IN_DATABASE if is_damaged else found
            elif copy is not None:
                expected[name] = Outcome.MISSING_IN_DATABASE if state is None else Outcome.DELETED
        assert self.run(_run_outcomes(bulk.verify(here.store, drill=drill, jobs=1))) == expected

    @step(node=nodes, prefer_disk=st.booleans())
    def migrate(self, node: int, prefer_disk: bool) -> None:
        here = self.nodes[node]
        outcomes = self.run(_run_outcomes(bulk.migrate(here.store, prefer_disk=prefer_disk, jobs=1)))
        expected = {}
        in_order = sorted(here.copies, key=os.fsencode)
        new = [name for name in in_order if name not in self.catalogue.names]
        for name in new:
            copy = here.copies[name]
            self.catalogue.store(name, copy.data, copy.modified_ns)
            expected[name] = Outcome.MIGRATED
        for name in [name for name in in_order if name not in new]:
            expected[name] = self._compare(here, name, prefer_disk=prefer_disk)
        assert outcomes == expected

    # -- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        """Compare files and times of both nodes, records and history; there are no other files."""
        TwoNodes.steps += 1
        with self.log_in_failures():
            self._compare_all()

    def _compare_all(self) -> None:
        for number, node in enumerate(self.nodes):
            assert self.marks[number] in (None, node.mark())
            self.marks[number] = node.mark()
            assert files_below(node.directory) == sorted(node.copies)
            for name, copy in node.copies.items():
                path = node.path(name)
                assert (path.read_bytes(), path.stat().st_mtime_ns) == (copy.data, copy.modified_ns), name
            assert in_quarantine(node.store) == []
        query = "SELECT name, generation, sha256, size, modified_ns, deleted_at IS NOT NULL FROM image_storage"
        records = {row[0]: (*row[1:5], bool(row[5])) for row in self.run(self.rows(query))}
        assert records == {name: (*_row(state), state.is_deleted) for name, state in self.catalogue.names.items()}
        query = "SELECT name, generation, sha256, size, modified_ns, reason != '' FROM image_history"
        history = {(*row[:5], bool(row[5])) for row in self.run(self.rows(query))}
        expected = [(name, version) for name, state in self.catalogue.names.items() for version in state.history]
        assert history == {(name, *_row(version), version.is_set_aside) for name, version in expected}

    # -- helpers ------------------------------------------------------------------------------------------------------

    def lose_everywhere(self, name: str) -> None:
        for node in self.nodes:
            node.path(name).unlink(missing_ok=True)
            node.copies.pop(name, None)

    def _request(self, here: Node, name: str, *, part: bool) -> tuple[int, bytes]:
        """Return the status and bytes of a GET after its background work; for a right part, return the whole file.

        An answer that breaks off counts as a 500, which it would be if the damage had been found earlier.
        """
        size = len((here.copies.get(name) or self.catalogue.alive(name) or FileCopy(b"", 0)).data)
        headers = [("range", "bytes=7-250")] if part else []

        async def work() -> tuple[int, bytes, str]:
            try:
                answer = await ask(here.app, f"/static/uploads/{name}", headers=headers)
            except CorruptBlob:
                return 500, b"", ""
            finally:
                await here.store.tasks.drain(30)
            return answer.status, answer.body, answer.headers.get("content-range", "")

        status, body, content_range = self.run(work())
        if not part or status == 500 or not size:  # an empty file has no range
            return status, body
        if size <= 7:
            assert (status, content_range) == (416, f"bytes */{size}")
        else:
            assert (status, content_range) == (206, f"bytes 7-{min(250, size - 1)}/{size}")
        right = (here.copies.get(name) or self.catalogue.names[name]).data
        assert body == right[7:251]
        return 200, right

    def _is_uncertain(self, here: Node) -> bool:
        """Whether the order matters in which files are compared: the bytes of one mend the record of another."""
        return bool(self.catalogue.damaged) and len(here.copies) > 1

    def _first_request(self, here: Node) -> None:
        here.foresee()

        async def work() -> None:
            await ask(here.app, "/")
            await here.store.tasks.drain(30)

        self.run(work())
        self._expect_followed(here)

    def _expect_followed(self, here: Node) -> None:
        """Update the model as a node does that learns what was changed; a new name has no old copies."""
        generations = {name: state.generation for name, state in self.catalogue.names.items()}
        changed = {name for name, generation in generations.items() if generation > here.followed.get(name, 1)}
        here.followed |= generations
        for name in changed:
            here.forget(name)
        for name in (changed | here.failed) & here.copies.keys():
            self._expect_compared(here, name)

    def _expect_compared(self, here: Node, name: str) -> None:
        """Update the model as a comparison in the background does: it is remembered if the file agrees."""
        if not self._expect_agreement(here, name):
            here.failed.add(name)
            return
        here.failed.discard(name)
        if name in here.copies and name not in here.changing:
            here.seen[name] = here.identity(name)

    def _expect_agreement(self, here: Node, name: str) -> bool:
        """Update the model as a comparison of a file with its record does; false if the record is damaged."""
        copy, state = here.copies[name], self.catalogue.names.get(name)
        if state is None:
            self.catalogue.store(name, copy.data, copy.modified_ns)
        elif state.is_deleted:
            here.expect_set_aside(name)
        elif here.has_recorded_size_and_time(name, state):
            pass  # a check of size and time cannot tell; `restore --verify` reads
        elif copy.data == state.data:
            copy.modified_ns = state.modified_ns
        elif self._is_adopted(here, name):
            self.catalogue.store(name, copy.data, copy.modified_ns)
            copy.modified_ns = state.modified_ns
        elif self.catalogue.can_be_read(state.data):
            here.expect_restored(name)
        elif self.catalogue.can_be_read(state.data) is None and _copy_on_disk(here, name) != copy:
            here.expect_restored(name)
        else:
            return False
        return True

    def _is_adopted(self, here: Node, name: str) -> bool:
        """Whether a file was adopted; where both are right, ask the database what happened."""
        foreseen = here.overwrites[name]
        if foreseen is not None:
            return foreseen
        query = f"SELECT sha256 FROM image_storage WHERE name = '{name}'"
        [[digest]] = self.run(self.rows(query))
        return bool(digest == sha256(here.copies[name].data).hexdigest())

    def _restore_one(self, here: Node, name: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Do work that restores a record, or fails because the record is damaged."""
        state = self.catalogue.names[name]
        can_be_read = self.catalogue.can_be_read(state.data)
        try:
            self.run(work())
        except CorruptBlob:
            assert not can_be_read
        else:
            assert can_be_read is not False
            here.expect_restored(name)

    def _restore(self, here: Node, *, verify: bool) -> None:
        """Run a bulk restore, and check its outcomes and what it does."""
        on_disk = {name for name in NAMES if self.catalogue.alive(name) and name in here.copies and not verify}
        outcomes = self.run(_run_outcomes(bulk.restore(here.store, verify=verify, jobs=1), on_disk))
        assert outcomes.keys() >= {name for name in NAMES if self.catalogue.alive(name)}
        for name, outcome in outcomes.items():
            copy, state = here.copies.get(name), self.catalogue.names[name]
            if state.is_deleted:
                assert outcome == Outcome.DELETED
                here.expect_set_aside(name)
            elif copy is not None and (copy.data == state.data or not verify):
                assert outcome == Outcome.OK
                if verify:
                    copy.modified_ns = state.modified_ns
            elif outcome == Outcome.RESTORED:
                assert self.catalogue.can_be_read(state.data) is not False
                here.expect_restored(name)
            else:
                assert outcome == Outcome.CORRUPT_IN_DATABASE
                assert not self.catalogue.can_be_read(state.data)
        assert not any(state.is_deleted and name in here.copies for name, state in self.catalogue.names.items())

    def _compare(self, here: Node, name: str, *, prefer_disk: bool) -> Outcome:
        """Update the model as `migrate` does for a name that has a record, and return the outcome."""
        copy, state = here.copies[name], self.catalogue.names[name]
        if state.is_deleted:
            return Outcome.DELETED
        is_damaged = state.data in self.catalogue.damaged
        if copy.data == state.data:
            self.catalogue.damaged.pop(state.data, None)
            return Outcome.MIGRATED if is_damaged else Outcome.OK
        if not prefer_disk:
            return Outcome.CORRUPT_IN_DATABASE if is_damaged else Outcome.DIFFERS
        self.catalogue.store(name, copy.data, copy.modified_ns)
        copy.modified_ns = state.modified_ns
        return Outcome.MIGRATED

    def _expect_one_of(self, here: Node, name: str, *copies: FileCopy) -> None:
        found = _copy_on_disk(here, name)
        assert found in copies
        here.copies[name] = found

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


def _copy_on_disk(here: Node, name: str) -> FileCopy:
    return FileCopy(here.path(name).read_bytes(), here.path(name).stat().st_mtime_ns)


async def _run_outcomes(run: Any, counted_ok: Collection[str] = ()) -> dict[str, Outcome]:
    """Return the outcome of a bulk run for each name; the names in `counted_ok` are only counted, as OK."""
    results = [result async for result in run]
    outcomes = {result.name: result.outcome for result in results if result.name}
    counted = [result for result in results if not result.name]
    assert len(outcomes) + len(counted) == len(results)
    assert (sum(result.count for result in counted), {result.outcome for result in counted} - {Outcome.OK}) == (
        len(counted_ok),
        set(),
    )
    assert not outcomes.keys() & set(counted_ok)
    return outcomes | dict.fromkeys(counted_ok, Outcome.OK)


# -- running ----------------------------------------------------------------------------------------------------------


def run_machine(url: str, steps: int) -> int:
    """Run cases of up to 40 rules, each with its visits, until there are enough steps; return how many there were."""
    machine = type("Machine", (TwoNodes,), {"url": url})
    TwoNodes.steps = 0
    asyncio.run(_create_tables(url))
    while TwoNodes.steps < steps:
        left = -(-(steps - TwoNodes.steps) // 100)
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=left,
                stateful_step_count=40,
                suppress_health_check=list(HealthCheck),
            ),
        )
    return TwoNodes.steps


async def _create_tables(url: str) -> None:
    async with UploadStore("/nowhere", url) as store:
        await store.database.create_tables()
