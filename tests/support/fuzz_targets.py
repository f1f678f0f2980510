"""The targets of the fuzzers: each turns bytes into requests or records, and checks what must hold for them.

Hypothesis generates the bytes quickly; atheris is guided by the coverage of selfheal.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from selfheal import CorruptBlob, SelfHealMiddleware, UploadStore, bulk, names
from selfheal.bulk.outcomes import Outcome
from selfheal.content.digests import chunk_digest
from selfheal.content.sources import CHUNK
from selfheal.healing import negative_cache as absent
from tests.support.asgi import Answer, Wrapped, ask_scope
from tests.support.storage import settle
from tests.support.store_state import files_below

PREFIX = "/static/uploads"
SECRET = b"these bytes must never be sent"


class Decisions:
    """Decisions made from bytes; after the last byte every decision is the first option."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, most: int) -> int:
        """Return a number from 0 to `most`."""
        size = (most.bit_length() + 7) // 8
        return int.from_bytes(self.take(size), "little") % (most + 1)

    def pick(self, options: Any) -> Any:
        """Return one of the options."""
        return options[self.number(len(options) - 1)]

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes, or fewer at the end."""
        self._at += size
        return self._data[self._at - size : self._at]

    def text(self) -> str:
        """Return up to 24 characters of any kind."""
        return self.take(self.number(24)).decode("utf-8", "replace").replace("\ufffd", "?")


class Target:
    """A store in a directory of its own; a fuzzer calls `check` again and again."""

    def __init__(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="selfheal-fuzz-"))
        self.directory = self.base / "static" / "uploads"
        self.database = self.base / "catalogue.db"
        self.runner = asyncio.Runner()
        self.absent_for, absent.FORGET_AFTER = absent.FORGET_AFTER, 0.0  # no case depends on the one before
        self.store = UploadStore(self.directory, f"sqlite+aiosqlite:///{self.database}")
        self.wrapped = Wrapped()
        self.app = SelfHealMiddleware(self.wrapped, self.store, adopt=False)
        self.runner.run(settle(self.store))
        self.runner.run(self.store.database.create_tables())

    def check(self, data: bytes) -> None:
        """Run one case; fail if something does not hold."""
        self.runner.run(self.case(Decisions(data)))

    async def case(self, decisions: Decisions) -> None:
        """Make requests or records from the decisions, and check the answers."""
        raise NotImplementedError

    async def ask(self, path: str, raw_path: bytes, headers: list[tuple[bytes, bytes]], method: str) -> Answer:
        """Return the answer to a request once its background work is done; fail if it violates HTTP."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": method,
            "path": path,
            "raw_path": raw_path,
            "headers": headers,
        }
        try:
            return await ask_scope(self.app, scope)
        finally:
            await self.store.tasks.drain(30)

    def close(self) -> None:
        """Close the store, and remove the directory."""
        absent.FORGET_AFTER = self.absent_for
        self.runner.run(self.store.close())
        self.runner.close()
        shutil.rmtree(self.base)


# -- paths ------------------------------------------------------------------------------------------------------------


class Paths(Target):
    """Any path gets a file below the directory or the wrapped app's answer; no other file is read."""

    PARTS = ("/", "..", ".", "%2e%2e", "%2f", "%5c", "\\", "%00", "%25", "%252e", "a.jpg", "cats", "secret", "/.secret")
    MORE = (
        "static",
        "uploads",
        "uploads_private",
        "link.jpg",
        "linked",
        PREFIX,
        ".selfheal-quarantine",
        " ",
        "~",
        "CON",
        "a::$DATA",
        "é",
        "%ff",
        "?",
    )

    def __init__(self) -> None:
        super().__init__()
        self.files = {"a.jpg": b"a picture", "cats/a.jpg": b"another", "cats/é %.svg": b"<svg/>"}
        for name, data in self.files.items():
            (self.directory / name).parent.mkdir(parents=True, exist_ok=True)
            (self.directory / name).write_bytes(data)
        for secret in ("secret", "static/secret", "static/uploads/.secret", "static/uploads_private/a.jpg"):
            (self.base / secret).parent.mkdir(exist_ok=True)
            (self.base / secret).write_bytes(SECRET)
        os.symlink(self.base / "secret", self.directory / "link.jpg")
        os.symlink(self.base, self.directory / "linked")

    async def case(self, decisions: Decisions) -> None:
        raw = decisions.pick((f"{PREFIX}/", f"{PREFIX}/", f"{PREFIX}/cats/", "", "/", PREFIX))
        for _ in range(decisions.number(decisions.pick((2, 4, 12)))):
            raw += decisions.pick((*self.PARTS, *self.MORE)) if decisions.number(3) else decisions.text()
        raw, path = raw.partition("?")[0], unquote(raw.partition("?")[0])
        method = decisions.pick(("GET", "HEAD", "GET", "POST"))
        before = len(self.wrapped.scopes)
        answer = await self.ask(path, raw.encode("utf-8", "surrogatepass"), [], method)
        name = path.removeprefix(f"{PREFIX}/")
        if len(self.wrapped.scopes) > before:
            del self.wrapped.scopes[:]
        elif answer.status == 200:
            assert path == f"{PREFIX}/{name}"
            assert names.is_valid(name)
            assert answer.body == (self.files[name] if method == "GET" else b"")
        else:
            assert answer.status == 404
            assert names.OWN_PREFIX in path
        assert SECRET not in answer.body


# -- headers ----------------------------------------------------------------------------------------------------------


class Headers(Target):
    """Any header lines get an answer of the contract, with the status of RFC 9110 and the right part of the body."""

    DATA = bytes(range(256)) * 3
    SECONDS = 1_700_000_000
    NUMBERS = ("0", "1", "5", "767", "768", "769", "000", "99999999999999999999999", "18446744073709551616")
    KEYS = (b"if-match", b"if-unmodified-since", b"if-none-match", b"if-modified-since", b"range", b"if-range")

    def __init__(self) -> None:
        super().__init__()
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "a.jpg").write_bytes(self.DATA)
        os.utime(self.directory / "a.jpg", (self.SECONDS, self.SECONDS))
        answer = self.runner.run(self.ask(f"{PREFIX}/a.jpg", b"", [], "GET"))
        self.tag, self.date = answer.headers["etag"], answer.headers["last-modified"]

    async def case(self, decisions: Decisions) -> None:
        values = {key: self._value(decisions, key) for key in self.KEYS if decisions.number(2) == 0}
        lines = {key: value for key, (value, _) in values.items()}
        if decisions.number(3) == 0:
            lines[decisions.pick(self.KEYS)] = decisions.take(decisions.number(40))
        method = decisions.pick(("GET", "HEAD"))
        answer = await self.ask(f"{PREFIX}/a.jpg", b"", list(lines.items()), method)
        self._check_contract(answer, method)
        if lines == {key: value for key, (value, _) in values.items()}:
            self._check_status(answer, method, {key: means for key, (_, means) in values.items()})

    def _value(self, decisions: Decisions, key: bytes) -> tuple[bytes, Any]:
        """Return a valid value for a header, and its meaning."""
        if key == b"range":
            return self._range(decisions)
        if key.endswith(b"since"):
            shift = decisions.pick((0, -1, 1, -86_400, 86_400, None))
            return (
                (b"yesterday", None)
                if shift is None
                else (formatdate(self.SECONDS + shift, usegmt=True).encode(), shift)
            )
        tags = [
            decisions.pick((self.tag, f"W/{self.tag}", '"other"', 'W/"other"', '""'))
            for _ in range(1 + decisions.number(2))
        ]
        if key == b"if-range":
            value, means = decisions.pick(
                ((self.tag, True), (self.date, True), ('"other"', False), (f"W/{self.tag}", False))
            )
            return value.encode(), means
        if decisions.number(5) == 0:
            return b"*", ["*"]
        return decisions.pick((", ", ",", " ,\t")).join(tags).encode(), tags

    def _range(self, decisions: Decisions) -> tuple[bytes, tuple[int, int] | None]:
        """Return a range and the slice that it asks for, or None if it must be ignored."""
        first, last = decisions.pick((*self.NUMBERS, "")), decisions.pick((*self.NUMBERS, ""))
        unit = decisions.pick(("bytes", "bytes", "bytes", "Bytes", "pages"))
        value = f"{unit}={first}-{last}" + decisions.pick(("", "", "", ",0-1"))
        size = len(self.DATA)
        if unit == "pages" or value.endswith(",0-1") or not (first or last):
            return value.encode(), None
        if not first:
            return value.encode(), (max(size - int(last), 0) if int(last) else size, size)
        if last and int(last) < int(first):
            return value.encode(), None
        return value.encode(), (min(int(first), size), min(int(last) + 1, size) if last else size)

    def _check_contract(self, answer: Answer, method: str) -> None:
        size = len(self.DATA)
        assert answer.status in ((200, 206, 304, 412, 416) if method == "GET" else (200, 304, 412))
        assert answer.headers["etag"] == self.tag
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert (answer.headers.get("cache-control") == "no-store") == (answer.status in (412, 416))
        if answer.status == 206:
            first, last = answer.headers["content-range"].removeprefix("bytes ").removesuffix(f"/{size}").split("-")
            assert 0 <= int(first) <= int(last) < size
            assert answer.body == self.DATA[int(first) : int(last) + 1]
        elif answer.status == 200:
            assert answer.headers["content-length"] == str(size)
            assert answer.body == (self.DATA if method == "GET" else b"")
        else:
            assert answer.body == b""
            assert answer.headers.get("content-range", f"bytes */{size}") == f"bytes */{size}"

    def _check_status(self, answer: Answer, method: str, meanings: dict[bytes, Any]) -> None:
        """Check the steps of RFC 9110, section 13.2.2, in their order."""
        if b"if-match" in meanings:
            if meanings[b"if-match"] != ["*"] and self.tag not in meanings[b"if-match"]:
                assert answer.status == 412
                return
        elif meanings.get(b"if-unmodified-since") is not None and meanings[b"if-unmodified-since"] < 0:
            assert answer.status == 412
            return
        if b"if-none-match" in meanings:
            if meanings[b"if-none-match"] == ["*"] or self.tag in [
                t.removeprefix("W/") for t in meanings[b"if-none-match"]
            ]:
                assert answer.status == 304
                return
        elif meanings.get(b"if-modified-since") is not None and meanings[b"if-modified-since"] >= 0:
            assert answer.status == 304
            return
        wanted = meanings.get(b"range") if meanings.get(b"if-range", True) and method == "GET" else None
        if wanted is None:
            assert answer.status == 200
        elif wanted[0] == len(self.DATA):
            assert answer.status == 416
        else:
            assert (answer.status, answer.body) == (206, self.DATA[slice(*wanted)])


# -- records ----------------------------------------------------------------------------------------------------------


class Records(Target):
    """Any rows of another program: right ones are restored, wrong ones are reported, and nothing else is written."""

    NAMES = (
        "a.jpg",
        "cats/tom.jpg",
        "../out.jpg",
        "/etc/out.jpg",
        "a//b",
        "..",
        ".hidden",
        "a/../../out.jpg",
        "CON",
    )
    SIZES = (0, 1, 10, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK)

    def __init__(self) -> None:
        super().__init__()
        self.connection = sqlite3.connect(self.database)
        self.connection.execute("PRAGMA synchronous = OFF")

    async def case(self, decisions: Decisions) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        for table in ("image_storage", "image_blob", "image_chunk"):
            self.connection.execute(f"DELETE FROM {table}")
        for _ in range(1 + decisions.number(2)):
            self._write(decisions)
        self.connection.commit()
        self.records = {
            name: (sha256, size, deleted)
            for name, sha256, size, deleted in self.connection.execute(
                "SELECT name, sha256, size, deleted_at IS NOT NULL FROM image_storage"
            )
        }
        verified = {result.name: result async for result in bulk.verify(self.store)}
        assert self._files() == []
        await self._check_served()
        shutil.rmtree(self.directory, ignore_errors=True)
        restored = {result.name: result async for result in bulk.restore(self.store)}
        files = self._files()
        assert sorted(files) == sorted(name for name, result in restored.items() if result.outcome == Outcome.RESTORED)
        for name, (sha256, size, deleted) in self.records.items():
            if deleted:
                assert name not in files
                continue
            if name in files:
                data = (self.directory / name).read_bytes()
                assert (hashlib.sha256(data).hexdigest(), len(data)) == (sha256, size)
            else:
                assert restored[name].is_problem, name
                assert verified[name].outcome in (Outcome.CORRUPT_IN_DATABASE, Outcome.INVALID_NAME), name
            assert names.is_valid(name) or restored[name].outcome == Outcome.INVALID_NAME
        assert not (self.base / "out.jpg").exists()

    def _write(self, decisions: Decisions) -> None:
        """Write a record that is right except for what the decisions change."""
        name = decisions.pick(self.NAMES) if decisions.number(2) else decisions.text() or "?"
        data = decisions.take(8).ljust(decisions.pick(self.SIZES), b"x")
        sha256 = hashlib.sha256(data).hexdigest()
        key = decisions.pick((sha256, sha256, sha256, sha256.upper(), "", decisions.text(), "0" * 64))
        size = decisions.pick((len(data), len(data), len(data), -1, 0, len(data) + 1, 2**62, CHUNK, 20 * 2**20))
        deleted = decisions.pick((None, None, None, "2024-01-01 00:00:00"))
        now = "2024-01-01 00:00:00"
        time = decisions.pick((0, 10**18, -1, 2**63 - 1, -(2**63)))
        put = self.connection.execute
        put(
            "INSERT OR IGNORE INTO image_storage VALUES (?, ?, ?, 'x', ?, ?, ?, 1, ?, 0)",
            (name, key, size, time, now, now, deleted),
        )
        if decisions.number(7):
            put("INSERT OR IGNORE INTO image_blob VALUES (?, ?, ?, ?)", (key, size, decisions.pick((1, 0, -1)), now))
        chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
        for position, chunk in enumerate(chunks):
            part = decisions.pick((chunk, chunk, chunk, chunk, chunk[:-1], chunk + b"!", b"", chunk[::-1]))
            at = decisions.pick((position, position, position, position, position + 1, -1, 2**31))
            digest = chunk_digest(position, chunk)
            digest = decisions.pick((digest, digest, digest, digest, chunk_digest(at % 9, b""), b"", b"text"))
            put("INSERT OR IGNORE INTO image_chunk VALUES (?, ?, ?, ?, ?)", (key, at, digest, now, part))

    async def _check_served(self) -> None:
        for name, (sha256, size, deleted) in self.records.items():
            path = f"{PREFIX}/{name}"
            try:
                answer = await self.ask(path, b"", [], "GET")
            except CorruptBlob:
                continue  # the body broke off
            if answer.status == 200:
                assert (hashlib.sha256(answer.body).hexdigest(), len(answer.body)) == (sha256, size)
                assert names.is_valid(name)
                assert not deleted
            elif (
                deleted or not names.is_valid(name) or (self.directory / name).is_dir()
            ):  # the directory of another name
                assert answer.status == 404
            else:
                assert answer.status == 500

    def _files(self) -> list[str]:
        return files_below(self.directory) if self.directory.exists() else []

    def close(self) -> None:
        self.connection.close()
        super().close()


TARGETS = {"paths": Paths, "headers": Headers, "records": Records}


def fuzz(arguments: list[str]) -> None:
    """Fuzz a target with atheris; the arguments are the name of the target and flags of libFuzzer."""
    import atheris  # noqa: PLC0415 - installed only on some machines

    target = TARGETS[arguments[1]]()
    atheris.Setup([arguments[0], *arguments[2:]], target.check)
    with closing(target):
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit("run: pytest --campaign tests/campaigns/test_fuzz.py")
