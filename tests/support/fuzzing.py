"""What is fuzzed, and what must hold of it: each target takes bytes, makes requests or records of them, and looks.

The same targets are given bytes by Hypothesis (quickly) and by atheris (guided by the coverage of selfheal).
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
from selfheal.blobs.database import chunk_digest
from selfheal.bulk.outcomes import Outcome
from selfheal.content.sources import CHUNK
from selfheal.healing import negative_cache as absent
from tests.support.asgi import Answer, Wrapped, ask_scope
from tests.support.sides import files_below

PREFIX = "/static/uploads"
SECRET = b"nobody may ever see this"


class Dice:
    """Decisions made by bytes; when they are used up every decision is the first one."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, most: int) -> int:
        """From 0 to `most`."""
        size = (most.bit_length() + 7) // 8
        return int.from_bytes(self.take(size), "little") % (most + 1)

    def pick(self, options: Any) -> Any:
        """One of them."""
        return options[self.number(len(options) - 1)]

    def take(self, size: int) -> bytes:
        """So many bytes, or as many as there are."""
        self._at += size
        return self._data[self._at - size : self._at]

    def text(self) -> str:
        """A few characters of any kind."""
        return self.take(self.number(24)).decode("utf-8", "replace").replace("\ufffd", "?")


class Target:
    """A store of its own in a directory of its own; a fuzzer calls `play` as often as it likes."""

    def __init__(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="selfheal-fuzz-"))
        self.directory = self.base / "static" / "uploads"
        self.database = self.base / "catalogue.db"
        self.runner = asyncio.Runner()
        self.absent_for, absent.ABSENT_FOR = absent.ABSENT_FOR, 0.0  # one game knows nothing of the other
        self.store = UploadStore(self.directory, f"sqlite+aiosqlite:///{self.database}")
        self.wrapped = Wrapped()
        self.app = SelfHealMiddleware(self.wrapped, self.store, adopt=False)
        self.runner.run(self.store.database.create_tables())

    def play(self, data: bytes) -> None:
        """One game; fails if anything is not as it must be."""
        self.runner.run(self.game(Dice(data)))

    async def game(self, dice: Dice) -> None:
        """What a target does with its bytes."""
        raise NotImplementedError

    async def asked(self, path: str, raw_path: bytes, headers: list[tuple[bytes, bytes]], method: str) -> Answer:
        """The answer to a request, checked against what HTTP asks of every answer, and all that is done behind it."""
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
            await self.store.tasks.settle(30)

    def close(self) -> None:
        """Leave nothing."""
        absent.ABSENT_FOR = self.absent_for
        self.runner.run(self.store.close())
        self.runner.close()
        shutil.rmtree(self.base)


# -- paths ------------------------------------------------------------------------------------------------------------


class Paths(Target):
    """Any path: it asks for a file below the directory, or the wrapped app answers; nothing else is ever read."""

    PARTS = ("/", "..", ".", "%2e%2e", "%2f", "%5c", "\\", "%00", "%25", "%252e", "a.jpg", "cats", "secret", "/.secret")
    MORE = (
        "static",
        "uploads",
        "uploads_private",
        "link.jpg",
        "way",
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
        os.symlink(self.base, self.directory / "way")

    async def game(self, dice: Dice) -> None:
        raw = dice.pick((f"{PREFIX}/", f"{PREFIX}/", f"{PREFIX}/cats/", "", "/", PREFIX))
        for _ in range(dice.number(dice.pick((2, 4, 12)))):
            raw += dice.pick((*self.PARTS, *self.MORE)) if dice.number(3) else dice.text()
        raw, path = raw.partition("?")[0], unquote(raw.partition("?")[0])
        method = dice.pick(("GET", "HEAD", "GET", "POST"))
        before = len(self.wrapped.scopes)
        answer = await self.asked(path, raw.encode("utf-8", "surrogatepass"), [], method)
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
    """Any header lines: an answer of the contract, whose status is the RFC's and whose body is the right part."""

    DATA = bytes(range(256)) * 3
    SECONDS = 1_700_000_000
    NUMBERS = ("0", "1", "5", "767", "768", "769", "000", "99999999999999999999999", "18446744073709551616")
    KEYS = (b"if-match", b"if-unmodified-since", b"if-none-match", b"if-modified-since", b"range", b"if-range")

    def __init__(self) -> None:
        super().__init__()
        self.directory.mkdir(parents=True)
        (self.directory / "a.jpg").write_bytes(self.DATA)
        os.utime(self.directory / "a.jpg", (self.SECONDS, self.SECONDS))
        answer = self.runner.run(self.asked(f"{PREFIX}/a.jpg", b"", [], "GET"))
        self.tag, self.date = answer.headers["etag"], answer.headers["last-modified"]

    async def game(self, dice: Dice) -> None:
        said = {key: self._value(dice, key) for key in self.KEYS if dice.number(2) == 0}
        lines = {key: value for key, (value, _) in said.items()}
        if dice.number(3) == 0:
            lines[dice.pick(self.KEYS)] = dice.take(dice.number(40))
        method = dice.pick(("GET", "HEAD"))
        answer = await self.asked(f"{PREFIX}/a.jpg", b"", list(lines.items()), method)
        self._is_of_the_contract(answer, method)
        if lines == {key: value for key, (value, _) in said.items()}:
            self._is_right(answer, method, {key: means for key, (_, means) in said.items()})

    def _value(self, dice: Dice, key: bytes) -> tuple[bytes, Any]:
        """A value of a header in the words of the RFC, and what it means."""
        if key == b"range":
            return self._range(dice)
        if key.endswith(b"since"):
            shift = dice.pick((0, -1, 1, -86_400, 86_400, None))
            return (
                (b"yesterday", None)
                if shift is None
                else (formatdate(self.SECONDS + shift, usegmt=True).encode(), shift)
            )
        tags = [dice.pick((self.tag, f"W/{self.tag}", '"other"', 'W/"other"', '""')) for _ in range(1 + dice.number(2))]
        if key == b"if-range":
            value, means = dice.pick(
                ((self.tag, True), (self.date, True), ('"other"', False), (f"W/{self.tag}", False))
            )
            return value.encode(), means
        if dice.number(5) == 0:
            return b"*", ["*"]
        return dice.pick((", ", ",", " ,\t")).join(tags).encode(), tags

    def _range(self, dice: Dice) -> tuple[bytes, tuple[int, int] | None]:
        """A range and the slice that it asks for; None if it is to be ignored."""
        first, last = dice.pick((*self.NUMBERS, "")), dice.pick((*self.NUMBERS, ""))
        unit = dice.pick(("bytes", "bytes", "bytes", "Bytes", "pages"))
        value = f"{unit}={first}-{last}" + dice.pick(("", "", "", ",0-1"))
        size = len(self.DATA)
        if unit == "pages" or value.endswith(",0-1") or not (first or last):
            return value.encode(), None
        if not first:
            return value.encode(), (max(size - int(last), 0) if int(last) else size, size)
        if last and int(last) < int(first):
            return value.encode(), None
        return value.encode(), (min(int(first), size), min(int(last) + 1, size) if last else size)

    def _is_of_the_contract(self, answer: Answer, method: str) -> None:
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

    def _is_right(self, answer: Answer, method: str, said: dict[bytes, Any]) -> None:
        """RFC 9110, section 13.2.2, step by step."""
        if b"if-match" in said:
            if said[b"if-match"] != ["*"] and self.tag not in said[b"if-match"]:
                assert answer.status == 412
                return
        elif said.get(b"if-unmodified-since") is not None and said[b"if-unmodified-since"] < 0:
            assert answer.status == 412
            return
        if b"if-none-match" in said:
            if said[b"if-none-match"] == ["*"] or self.tag in [t.removeprefix("W/") for t in said[b"if-none-match"]]:
                assert answer.status == 304
                return
        elif said.get(b"if-modified-since") is not None and said[b"if-modified-since"] >= 0:
            assert answer.status == 304
            return
        wanted = said.get(b"range") if said.get(b"if-range", True) and method == "GET" else None
        if wanted is None:
            assert answer.status == 200
        elif wanted[0] == len(self.DATA):
            assert answer.status == 416
        else:
            assert (answer.status, answer.body) == (206, self.DATA[slice(*wanted)])


# -- records ----------------------------------------------------------------------------------------------------------


class Records(Target):
    """Any rows that somebody else wrote: what is right is brought back, all else is told, nothing else is written."""

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

    async def game(self, dice: Dice) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        for table in ("image_storage", "image_blob", "image_chunk"):
            self.connection.execute(f"DELETE FROM {table}")
        for _ in range(1 + dice.number(2)):
            self._write(dice)
        self.connection.commit()
        self.records = {
            name: (sha256, size, deleted)
            for name, sha256, size, deleted in self.connection.execute(
                "SELECT name, sha256, size, deleted_at IS NOT NULL FROM image_storage"
            )
        }
        verified = {result.name: result async for result in bulk.verify(self.store)}
        assert self._files() == []
        await self._is_served_right()
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

    def _write(self, dice: Dice) -> None:
        """A record that is right but for what the dice decide."""
        name = dice.pick(self.NAMES) if dice.number(2) else dice.text() or "?"
        data = dice.take(8).ljust(dice.pick(self.SIZES), b"x")
        sha256 = hashlib.sha256(data).hexdigest()
        key = dice.pick((sha256, sha256, sha256, sha256.upper(), "", dice.text(), "0" * 64))
        size = dice.pick((len(data), len(data), len(data), -1, 0, len(data) + 1, 2**62, CHUNK, 20 * 2**20))
        deleted = dice.pick((None, None, None, "2024-01-01 00:00:00"))
        now = "2024-01-01 00:00:00"
        time = dice.pick((0, 10**18, -1, 2**63 - 1, -(2**63)))
        put = self.connection.execute
        put(
            "INSERT OR IGNORE INTO image_storage VALUES (?, ?, ?, 'x', ?, ?, ?, 1, ?)",
            (name, key, size, time, now, now, deleted),
        )
        if dice.number(7):
            put("INSERT OR IGNORE INTO image_blob VALUES (?, ?, ?, ?)", (key, size, dice.pick((1, 0, -1)), now))
        chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
        for position, chunk in enumerate(chunks):
            part = dice.pick((chunk, chunk, chunk, chunk, chunk[:-1], chunk + b"!", b"", chunk[::-1]))
            at = dice.pick((position, position, position, position, position + 1, -1, 2**31))
            digest = chunk_digest(position, chunk)
            digest = dice.pick((digest, digest, digest, digest, chunk_digest(at % 9, b""), b"", "text"))
            put("INSERT OR IGNORE INTO image_chunk VALUES (?, ?, ?, ?, ?)", (key, at, digest, now, part))

    async def _is_served_right(self) -> None:
        for name, (sha256, size, deleted) in self.records.items():
            path = f"{PREFIX}/{name}"
            try:
                answer = await self.asked(path, b"", [], "GET")
            except CorruptBlob:
                continue  # it broke off
            if answer.status == 200:
                assert (hashlib.sha256(answer.body).hexdigest(), len(answer.body)) == (sha256, size)
                assert names.is_valid(name)
                assert not deleted
            elif deleted or not names.is_valid(name) or (self.directory / name).is_dir():  # another name's directory
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
    """What the process runs that atheris drives: the name of a target, then flags of libFuzzer."""
    import atheris  # noqa: PLC0415 - only where it is used

    target = TARGETS[arguments[1]]()
    atheris.Setup([arguments[0], *arguments[2:]], target.play)
    with closing(target):
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit("run: pytest --campaign tests/test_fuzz.py")
