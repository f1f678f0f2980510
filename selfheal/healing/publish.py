"""Publish: the only place that writes bytes to the disk, checks them, syncs them, and gives them a name."""

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass

from ..aio.streams import prefetch
from ..disk.directory import UploadsDirectory
from ..disk.root import OpenFolders
from ..disk.staged_file import StagedFile
from ..errors import CorruptBlob, NotAFile, SelfHealError
from ..sql.models import Found, Record

TRIES = 3  # how often a name is tried that another process takes and frees


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a record: a file is at its name unless `error`. `inode` is 0 if another took the name."""

    record: Record
    error: Exception | None = None
    inode: int = 0
    modified_ns: int = 0


def outdated(published: Iterable[Published], generations: Mapping[str, int | None]) -> list[Published]:
    """Return those whose records were changed or deleted since they were read; `generations` are today's."""
    return [one for one in published if generations.get(one.record.name) != one.record.generation]


class Publisher:
    """Writes records to the uploads directory. All but `write_all` may wait for a disk: call it in a thread."""

    def __init__(self, disk: UploadsDirectory) -> None:
        self._disk = disk

    def write(self, staged: StagedFile, chunks: Iterable[bytes]) -> None:
        """Append chunks to a staged file. Raises `DiskUnwritable`."""
        with self._disk.refusals.raised(staged.name):
            for chunk in chunks:
                staged.write(chunk)

    async def write_all(
        self, staged: StagedFile, source: AsyncGenerator[list[bytes], None]
    ) -> AsyncGenerator[int, None]:
        """Append all chunks of `source`, which is read ahead; yield the size of the file after each list."""
        async with aclosing(prefetch(source)) as lists:
            async for chunks in lists:
                await self._disk.threads.run(self.write, staged, chunks)
                yield staged.size

    def publish(self, staged: Iterable[tuple[Record, StagedFile]]) -> list[Published]:
        """Check written files against their records, sync all of them at once, and give each its name."""
        results: list[Published] = []
        sealed: list[tuple[Record, StagedFile]] = []
        for record, file in staged:
            try:
                if file.size != record.size or file.sha256 != record.sha256:
                    raise CorruptBlob(record.name, f"its {file.size} bytes do not match the recorded digest")
                file.seal(record.modified_ns, self._disk.file_mode)
                sealed.append((record, file))
            except (SelfHealError, OSError) as error:
                results.append(Published(record, self._meaning(error, record)))
        try:
            self._sync([file for _, file in sealed])
        except OSError as error:
            return results + [Published(record, self._meaning(error, record)) for record, _ in sealed]
        return results + [self._name(record, file) for record, file in sealed]

    def publish_small(self, found: Iterable[Found]) -> list[Published]:
        """Write and publish records whose first chunk is the only one."""
        results: list[Published] = []
        staged: list[tuple[Record, StagedFile]] = []
        with OpenFolders() as folders, ExitStack() as files:
            for one in found:
                try:
                    file = files.enter_context(self._disk.stage_among(folders, one.record.name))
                    if one.first:
                        file.write(one.first)
                    staged.append((one.record, file))
                except (SelfHealError, OSError) as error:
                    results.append(Published(one.record, self._meaning(error, one.record)))
            return results + self.publish(staged)

    def take_back(self, published: Iterable[Published]) -> None:
        """Remove files that were published here, unless the app has put another file in their place."""
        for one in published:
            there = self._disk.stat(one.record.name) if one.inode else None
            if there is not None and there.st_ino == one.inode:
                self._disk.remove(one.record.name)

    def _sync(self, files: Sequence[StagedFile]) -> None:
        if len(files) == 1:
            files[0].sync()
        elif files:
            self._disk.sync(files)

    def _name(self, record: Record, staged: StagedFile) -> Published:
        try:
            is_new = self._is_published(record.name, staged)
            measured = staged.measure()
        except (SelfHealError, OSError) as error:
            return Published(record, self._meaning(error, record))
        return Published(record, None, measured.st_ino if is_new else 0, measured.st_mtime_ns)

    def _is_published(self, name: str, staged: StagedFile) -> bool:
        """Publish a file; return False if there is one. Raises `NotAFile` if something else has the name."""
        for _ in range(TRIES):
            if staged.publish():
                return True
            if self._disk.stat(name) is not None:
                return False
        raise NotAFile(name)  # it did not vanish between the two calls every time

    def _meaning(self, error: SelfHealError | OSError, record: Record) -> Exception:
        return self._disk.refusals.meaning(error, record.name) if isinstance(error, OSError) else error
