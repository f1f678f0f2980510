"""Where an export goes: a directory, or a tar file. The manifest comes last: without it an export is not finished."""

import os
import tarfile
import tempfile
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import IO, Protocol

from ..aio.threads import Threads
from ..content.sources import CHUNK
from ..disk.directory import UploadsDirectory
from ..disk.file_lock import try_lock
from ..errors import SettingsError
from ..healing.publish import Publisher
from ..sql.models import Contents, Record
from ..sql.models import contents as columns
from .manifest import BLOBS, FOLDER, MANIFEST, PARTIAL, blob_name

Chunks = AsyncGenerator[list[bytes], None]
_EPOCH = datetime.fromtimestamp(0, UTC)


class ExportTarget(Protocol):
    """Takes files, blobs and the lines of the manifest. Raises what the source of the bytes raises, and `OSError`."""

    def check(self) -> None:
        """Raise `SettingsError` if there is something else."""

    def begin(self) -> None:
        """Begin an export, or go on with one. Raises `SettingsError` while another one is writing there."""

    async def put(self, record: Record, chunks: Chunks) -> bool:
        """Write a file; False if it is there."""

    async def put_blob(self, contents: Contents, chunks: Chunks) -> bool:
        """Write the bytes of an earlier version; False if they are there."""

    async def remove(self, name: str) -> None:
        """Remove the file of a name that was deleted since the export was begun."""

    def add_line(self, line: bytes) -> None:
        """Add a line to the manifest."""

    def finish(self) -> None:
        """Write the manifest, and sync everything."""

    def close(self) -> None:
        """Close all files."""


def target_of(path: Path) -> ExportTarget:
    """Return the target for a path: a tar file if that is how its name ends, else a directory."""
    return TarTarget(path) if path.name.lower().endswith(".tar") else DirectoryTarget(path)


class DirectoryTarget(ExportTarget):
    """Files under their names, with their times; the manifest and the blobs in a hidden folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._own = path / FOLDER
        self._threads = Threads()
        self._files = UploadsDirectory(path, threads=self._threads)
        self._blobs = UploadsDirectory(self._own / BLOBS, threads=self._threads)
        self._folder = -1
        self._manifest: IO[bytes] = BytesIO()

    def check(self) -> None:
        if not self._path.exists():
            return
        if not self._path.is_dir() or (any(self._path.iterdir()) and not self._own.is_dir()):
            raise SettingsError(f"{self._path} is not empty, and is no export; name another directory, or FILE.tar")

    def begin(self) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        self._own.mkdir(0o700, exist_ok=True)
        self._folder = os.open(self._own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if not try_lock(self._folder):
            raise _in_use(self._path)
        (self._own / BLOBS).mkdir(exist_ok=True)
        self._files.sweep()
        # an earlier manifest stays until this one is whole: its database may be lost now
        self._manifest = open(self._own / (MANIFEST + PARTIAL), "wb")  # noqa: SIM115 - closed in `close`

    async def put(self, record: Record, chunks: Chunks) -> bool:
        return await self._put(self._files, record, chunks)

    async def put_blob(self, contents: Contents, chunks: Chunks) -> bool:
        name = blob_name(contents.sha256)
        record = Record(name, **columns(contents), generation=0, created_at=_EPOCH, changed_at=_EPOCH)
        return await self._put(self._blobs, record, chunks)

    async def remove(self, name: str) -> None:
        await self._threads.run(self._files.remove, name)

    def add_line(self, line: bytes) -> None:
        self._manifest.write(line)

    def finish(self) -> None:
        self._manifest.flush()
        os.fsync(self._manifest.fileno())
        os.replace(self._own / (MANIFEST + PARTIAL), self._own / MANIFEST)
        _sync_folder(self._own)

    def close(self) -> None:
        self._manifest.close()
        self._files.close()
        self._blobs.close()
        if self._folder >= 0:
            os.close(self._folder)

    async def _put(self, disk: UploadsDirectory, record: Record, chunks: Chunks) -> bool:
        if await self._threads.run(_is_there, disk, record):
            return False
        publisher = Publisher(disk)
        with await self._threads.run(disk.stage, record.name) as staged:
            async with aclosing(publisher.write_all(staged, chunks)) as sizes:
                async for _ in sizes:
                    pass
            await self._threads.run(disk.remove, record.name)  # other bytes, which the history has
            (published,) = await self._threads.run(publisher.publish, [(record, staged)])
        if published.error is not None:
            raise published.error
        return True


class TarTarget(ExportTarget):
    """The same as a tar file. One that was broken off is begun again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + PARTIAL)
        self._threads = Threads()
        self._written: set[str] = set()
        self._file, self._size = -1, 0
        self._manifest: IO[bytes] = BytesIO()

    def check(self) -> None:
        if self._path.exists():
            raise SettingsError(f"{self._path} is there; name another file")
        if not self._path.parent.is_dir():
            raise SettingsError(f"there is no directory {self._path.parent} for {self._path.name}")

    def begin(self) -> None:
        fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not (try_lock(fd) and _has_name(fd, self._partial)):
            os.close(fd)
            raise _in_use(self._path)
        self._file = fd
        self.check()  # another export may have ended since
        os.ftruncate(fd, 0)
        self._manifest = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115 - closed in `close`

    async def put(self, record: Record, chunks: Chunks) -> bool:
        await self._put(record.name, record, chunks)
        return True

    async def put_blob(self, contents: Contents, chunks: Chunks) -> bool:
        if contents.sha256 in self._written:
            return False
        await self._put(f"{FOLDER}/{BLOBS}/{blob_name(contents.sha256)}", contents, chunks)
        self._written.add(contents.sha256)
        return True

    async def remove(self, name: str) -> None:
        """Remove nothing: a tar file is always begun anew."""

    def add_line(self, line: bytes) -> None:
        self._manifest.write(line)

    def finish(self) -> None:
        size = self._manifest.tell()
        self._manifest.seek(0)
        self._append([_header(f"{FOLDER}/{MANIFEST}", size, 0.0)])
        self._append(iter(lambda: self._manifest.read(CHUNK), b""))
        self._append([_padding(size), bytes(2 * tarfile.BLOCKSIZE)])
        os.fsync(self._file)
        os.replace(self._partial, self._path)
        _sync_folder(self._path.parent)

    def close(self) -> None:
        """Remove what was not finished: it may fill a disk."""
        if self._file >= 0:
            if _has_name(self._file, self._partial):
                self._partial.unlink()
            os.close(self._file)
        self._file = -1
        with suppress(OSError):  # of a full disk, which was reported when it was met
            self._manifest.close()
        self._threads.close()

    async def _put(self, path: str, contents: Contents, chunks: Chunks) -> None:
        """Append a file; take it back if its bytes cannot be read, or written, to their end."""
        start = self._size
        try:
            await self._threads.run(self._append, [_header(path, contents.size, contents.modified_ns / 10**9)])
            async with aclosing(chunks):
                async for some in chunks:
                    await self._threads.run(self._append, some)
            await self._threads.run(self._append, [_padding(contents.size)])
        except BaseException:
            os.ftruncate(self._file, start)
            self._size = start
            raise

    def _append(self, pieces: Iterable[bytes]) -> None:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                written = os.pwrite(self._file, view, self._size)
                self._size += written
                view = view[written:]


class DryRun(ExportTarget):
    """Reads everything as for another target, and writes nothing."""

    def __init__(self, target: ExportTarget) -> None:
        self._target = target

    def check(self) -> None:
        self._target.check()

    def begin(self) -> None:
        """Write nothing."""

    async def put(self, record: Record, chunks: Chunks) -> bool:
        return await self.put_blob(record, chunks)

    async def put_blob(self, _contents: Contents, chunks: Chunks) -> bool:
        async with aclosing(chunks):
            async for _ in chunks:
                pass
        return True

    async def remove(self, name: str) -> None:
        """Remove nothing."""

    def add_line(self, line: bytes) -> None:
        """Write nothing."""

    def finish(self) -> None:
        """Write nothing."""

    def close(self) -> None:
        self._target.close()


def _is_there(disk: UploadsDirectory, record: Record) -> bool:
    file = disk.open(record.name)
    if file is None:
        return False
    with file:
        if file.sha256() != record.sha256:
            return False
        if file.modified_ns != disk.kept_ns(record.modified_ns):
            disk.set_time(file, record.modified_ns)
        return True


def _in_use(path: Path) -> SettingsError:
    return SettingsError(f"another export is writing to {path}; wait until it has ended, or name another place")


def _has_name(fd: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(fd))
    return False


def _header(path: str, size: int, seconds: float) -> bytes:
    info = tarfile.TarInfo(path)
    info.size, info.mtime, info.mode = size, seconds, 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # not every file system can
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
