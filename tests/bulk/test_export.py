"""Export to a directory or a tar file, and the way back; archives of other origin."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from selfheal import ImageStorage, SettingsError, bulk
from selfheal.aio.threads import Threads
from selfheal.bulk.archives import open_archive
from selfheal.bulk.export_targets import DryRun, TarTarget, target_of
from selfheal.bulk.import_archive import ArchiveSource
from selfheal.disk.staged_file import StagedFile
from selfheal.sql.models import Version
from tests.support.files import snapshot_of, write_file
from tests.support.raw_sql import sql
from tests.support.runs import Report, report_of
from tests.support.transfers import LARGE, NAMES, bytes_of, damage, fill, state_of

OWN = ".selfheal-export"


@pytest.fixture
async def source(database_tables: str) -> AsyncIterator[ImageStorage]:
    """A database with records, history and tombstones."""
    database = ImageStorage(database_tables)
    database.home.settle()
    await fill(database)
    yield database
    await database.close()


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[ImageStorage]:
    """A database without tables."""
    database = ImageStorage(f"sqlite+aiosqlite:///{tmp_path}/target.db")
    database.home.settle()
    yield database
    await database.close()


@pytest.fixture(params=["out", "out.tar"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where an export goes: a directory, or a tar file."""
    return tmp_path / str(request.param)


async def exported(database: ImageStorage, to: Path) -> Report:
    """Export everything, and return the report."""
    return await report_of(bulk.export(database, target_of(to)))


async def imported(database: ImageStorage, archive: Path, **options: Any) -> Report:
    """Import an archive, and return the report."""
    threads, opened = Threads(), open_archive(archive)
    try:
        return await report_of(bulk.import_all(database, ArchiveSource(opened, threads), **options))
    finally:
        opened.close()
        threads.close()


async def test_there_and_back(source: ImageStorage, target: ImageStorage, place: Path) -> None:
    """An export has everything: an import of it makes the same records, history, tombstones and bytes, once."""
    before = await state_of(source)
    assert (await exported(source, place)).counts == {"restored": NAMES - 2, "ok": 2}
    assert (await imported(target, place, dry_run=True)).counts == {"migrated": NAMES}
    assert (await imported(target, place)).counts == {"migrated": NAMES}
    assert await state_of(target) == before
    assert (await imported(target, place)).counts == {"ok": NAMES}
    assert await state_of(target) == before
    assert await state_of(source) == before


async def test_the_files_are_of_use_without_selfheal(source: ImageStorage, place: Path, tmp_path: Path) -> None:
    """The files have their names, bytes and times; all else is in one hidden folder."""
    await exported(source, place)
    if place.suffix == ".tar":
        with tarfile.open(place) as tar:
            tar.extractall(tmp_path / "extracted", filter="data")
        place = tmp_path / "extracted"
    state = await state_of(source)
    living = {name: now for name, (_, _, now, _) in state.items() if now is not None}
    found = {path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in found.items() if not name.startswith(OWN)} == living
    for name in living:
        assert abs(found[name].stat().st_mtime_ns - state[name][0].modified_ns) < 1000
    first, *lines, last = (place / OWN / "manifest.jsonl").read_text().splitlines()
    assert json.loads(first) == {"selfheal_export": 1}
    assert json.loads(last) == {"records": NAMES}
    assert [json.loads(line)["name"] for line in lines] == sorted(state)


async def test_a_second_export_goes_on(source: ImageStorage, target: ImageStorage, tmp_path: Path) -> None:
    """An export into the directory of another one changes only what changed: saves, deletions, damage, times."""
    out = tmp_path / "out"
    await exported(source, out)
    assert (await exported(source, out)).counts == {"ok": NAMES}
    before = snapshot_of(out)
    assert (await exported(source, out)).counts == {"ok": NAMES}
    assert {path for path, _ in snapshot_of(out).items()} == set(before)
    await source.store_image("a.png", b"three")
    await source.bury("same.jpg")
    (out / "cats" / "tom.jpg").write_bytes(b"torn")
    os.utime(out / "empty.gif", ns=(1, 1))
    assert (await exported(source, out)).counts == {"restored": 2, "ok": NAMES - 2}
    assert not (out / "same.jpg").exists()
    await imported(target, out)
    assert await state_of(target) == await state_of(source)
    record = await source.find("empty.gif")
    assert record is not None
    assert (out / "empty.gif").stat().st_mtime_ns == record.modified_ns


@pytest.mark.parametrize(("before", "after"), [(["a/b", "a/c/d"], "a"), (["a"], "a/b"), (["a"], "a/b/c")])
async def test_a_file_where_a_directory_was(
    source: ImageStorage, target: ImageStorage, place: Path, before: list[str], after: str
) -> None:
    """A second export writes a file where an earlier one has a directory whose files were deleted since, and back."""
    for name in before:
        await source.store_image(name, b"before")
    await exported(source, place)
    for name in before:
        await source.bury(name)
    await source.store_image(after, b"after")
    place.unlink() if place.suffix == ".tar" else None
    assert not (await exported(source, place)).problems
    assert not (await imported(target, place)).problems
    assert await state_of(target) == await state_of(source)
    assert place.suffix == ".tar" or (place / after).read_bytes() == b"after"


@pytest.mark.parametrize("is_dry", [True, False])
async def test_a_purge_during_an_export(
    source: ImageStorage, target: ImageStorage, place: Path, monkeypatch: pytest.MonkeyPatch, *, is_dry: bool
) -> None:
    """Versions that are purged after their history was read are left out, and are no damage; others still are."""
    await source.store_image("a.png", b"three")
    history = source.history
    purged: list[str] = []

    async def and_purge(name: str) -> list[Version]:
        versions = await history(name)
        if name == "a.png" and not purged:
            purged.append(name)
            await sql(source.url, "DELETE FROM image_history WHERE name = 'a.png' AND generation = 1")
            await source.purge(timedelta(days=99), grace=timedelta(0))
        return versions

    monkeypatch.setattr(source, "history", and_purge)
    await damage(source, "image_chunk", b"aside")
    to = target_of(place)
    report = await report_of(bulk.export(source, DryRun(to) if is_dry else to))
    assert report.problems == {"aside.png": "corrupt_in_database"}
    if not is_dry:
        await imported(target, place)
        (version,) = await target.history("a.png")
        assert await bytes_of(target, version) == b"two"


async def test_an_export_that_was_broken_off(source: ImageStorage, target: ImageStorage, place: Path) -> None:
    """What an export that was broken off leaves is no export yet; the next one completes it."""
    run = bulk.export(source, target_of(place))
    async for _ in run:
        break
    await run.aclose()
    if place.suffix == ".tar":
        assert list(place.parent.glob("out*")) == []
    else:
        with pytest.raises(SettingsError, match="not finished"):
            await imported(target, place)
    await exported(source, place)
    await imported(target, place)
    assert await state_of(target) == await state_of(source)


async def test_an_export_that_is_not_brought_up_to_date(
    source: ImageStorage, target: ImageStorage, tmp_path: Path
) -> None:
    """If a second export into a directory breaks off, what it did not change can still be imported: it says so."""
    out = tmp_path / "out"
    await exported(source, out)
    before = await state_of(source)
    await source.store_image("a.png", b"three")
    run = bulk.export(source, target_of(out))
    async for _ in run:
        break
    await run.aclose()
    report = await imported(target, out)
    assert report.problems == {"a.png": "corrupt_in_database", "the manifest": "failed"}
    del before["a.png"]
    assert await state_of(target) == before
    await exported(source, out)
    assert not (await imported(target, out)).problems
    assert await state_of(target) == await state_of(source)


async def test_two_exports_at_once(source: ImageStorage, target: ImageStorage, place: Path) -> None:
    """A second export into one place is refused while the first one runs, which is whole; afterwards it may run."""
    run = bulk.export(source, target_of(place))
    await anext(run)
    with pytest.raises(SettingsError, match="another export is writing to"):
        await exported(source, place)
    async for _ in run:
        pass
    assert not (await imported(target, place)).problems
    assert await state_of(target) == await state_of(source)
    assert sorted(path.name for path in place.parent.glob("out*")) == [place.name]
    if place.suffix != ".tar":
        assert (await exported(source, place)).counts == {"ok": NAMES}


async def test_an_export_that_began_as_another_one_ended(source: ImageStorage, tmp_path: Path) -> None:
    """A tar file that another export finished in the meantime is not overwritten."""
    late = target_of(tmp_path / "out.tar")
    late.check()
    await exported(source, tmp_path / "out.tar")
    before = (tmp_path / "out.tar").read_bytes()
    with pytest.raises(SettingsError, match="is there"):
        late.begin()
    late.close()
    assert (tmp_path / "out.tar").read_bytes() == before
    assert [path.name for path in tmp_path.glob("out*")] == ["out.tar"]


async def test_what_is_there_is_not_overwritten(source: ImageStorage, tmp_path: Path) -> None:
    """A directory with other files, a file, and a tar file that is there are refused; an empty directory is taken."""
    write_file(tmp_path / "full" / "mine.txt", b"mine")
    write_file(tmp_path / "mine.tar", b"mine")
    before = snapshot_of(tmp_path / "full")
    for place in ("full", "full/mine.txt", "mine.tar", "no/such/place.tar"):
        with pytest.raises(SettingsError):
            await exported(source, tmp_path / place)
    assert snapshot_of(tmp_path / "full") == before
    assert (tmp_path / "mine.tar").read_bytes() == b"mine"
    (tmp_path / "empty").mkdir()
    assert not (await exported(source, tmp_path / "empty")).problems


async def test_memory_does_not_grow_with_a_file(place: Path, sqlite_url: str, target: ImageStorage) -> None:
    """A file of 48 MiB is exported and imported in pieces."""
    database = ImageStorage(sqlite_url)
    database.home.settle()
    await database.create_tables()
    await database.store_image("large.bin", LARGE * 64)
    await target.create_tables()
    tracemalloc.start()
    assert (await exported(database, place)).counts == {"restored": 1}
    assert (await imported(target, place)).counts == {"migrated": 1}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    await database.close()
    assert peak < 32 * 1024 * 1024


async def test_a_dry_run(source: ImageStorage, place: Path, tmp_path: Path) -> None:
    """A dry run reads everything and writes nothing."""
    before = sorted(tmp_path.iterdir())
    await damage(source, "image_chunk", b"two")
    report = await report_of(bulk.export(source, DryRun(target_of(place))))
    assert report.problems == {"a.png": "corrupt_in_database"}
    assert sorted(tmp_path.iterdir()) == before


async def test_damaged_records(source: ImageStorage, target: ImageStorage, place: Path) -> None:
    """Damaged bytes are reported and not exported, also those of the history; all others are exported and imported."""
    await damage(source, "image_chunk", LARGE)
    await damage(source, "image_chunk", b"one")
    damaged = dict.fromkeys(("cats/tom.jpg", "same.jpg", "a.png"), "corrupt_in_database")
    assert (await exported(source, place)).problems == damaged
    assert (await imported(target, place)).problems == {"a.png": "corrupt_in_database"}
    there = await state_of_readable(target)
    assert set(there) == {"a.png", "empty.gif", "gone.png", "back.png", "aside.png"}


async def state_of_readable(database: ImageStorage) -> dict[str, bool]:
    """Return the names in a database, and whether each is deleted."""
    return {record.name: record.is_deleted async for page in database.pages(deleted=None) for record in page}


async def test_a_full_disk(source: ImageStorage, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that does not fit is reported, leaves nothing, and the others are written; the next run completes it."""
    write, append = StagedFile.write, TarTarget._append

    def write_small(self: StagedFile, chunk: bytes) -> None:
        if len(chunk) > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, chunk)

    def append_small(self: TarTarget, pieces: Any) -> None:
        for piece in pieces:
            append(self, [piece[:1000]])
            if len(piece) > 5000:
                raise OSError(errno.ENOSPC, "No space left on device")
            append(self, [piece[1000:]])

    monkeypatch.setattr(StagedFile, "write", write_small)
    monkeypatch.setattr(TarTarget, "_append", append_small)
    assert (await exported(source, place)).problems == {"cats/tom.jpg": "failed", "same.jpg": "failed"}
    names = [path.name for path in place.parent.rglob("*")]
    assert "tom.jpg" not in names
    if place.suffix == ".tar":
        with tarfile.open(place) as tar:
            assert "cats/tom.jpg" not in tar.getnames()
            assert "a.png" in tar.getnames()
        place.unlink()
    monkeypatch.undo()
    assert not (await exported(source, place)).problems


@pytest.mark.parametrize("kind", ["tar", "above"])
@pytest.mark.parametrize("is_finished", [True, False])
async def test_an_export_inside_its_folder(
    source: ImageStorage, target: ImageStorage, tmp_path: Path, kind: str, *, is_finished: bool
) -> None:
    """An archive that has an export in a folder is refused, and the error says what to do: its names would be wrong."""
    await exported(source, tmp_path / "above" / "out")
    if not is_finished:
        (tmp_path / "above" / "out" / OWN / "manifest.jsonl").unlink()
    with tarfile.open(tmp_path / "tar", "w") as tar:
        tar.add(tmp_path / "above" / "out", "out")
    with pytest.raises(SettingsError, match="import the folder 'out'"):
        await imported(target, tmp_path / kind)
    assert await state_of(target) == {}


# -- archives of other origin -----------------------------------------------------------------------------------------

FILES = {"a.png": b"a", "cats/tom.jpg": LARGE, "empty.gif": b""}


async def bytes_in(database: ImageStorage) -> dict[str, bytes | None]:
    """Return the bytes of every name."""
    return {name: now for name, (_, _, now, _) in (await state_of(database)).items()}


def pack(path: Path, change: Callable[[tarfile.TarFile], object] = lambda tar: None) -> Path:
    """Make a tar file of `FILES`, as `tar -cf path .` does, and of what `change` adds."""
    with tarfile.open(path, "w") as tar:
        for name, data in FILES.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size, info.mtime = len(data), 1_700_000_000
            tar.addfile(info, io.BytesIO(data))
        change(tar)
    return path


async def test_plain_archives(target: ImageStorage, tmp_path: Path) -> None:
    """The files of a directory or a tar file without a manifest are saved as new names, with their times."""
    for name, data in FILES.items():
        write_file(tmp_path / "plain" / name, data)
        os.utime(tmp_path / "plain" / name, ns=(0, 1_700_000_000 * 10**9))
    write_file(tmp_path / "plain" / ".DS_Store", b"litter")
    write_file(tmp_path / "plain" / "con.png", b"a device")
    (tmp_path / "plain" / "link.png").symlink_to("a.png")
    report = await imported(target, tmp_path / "plain")
    expected = dict.fromkeys(FILES, "migrated") | {".DS_Store": "skipped", "con.png": "invalid_name"}
    assert report.outcomes == expected | {"link.png": "failed"}
    assert await bytes_in(target) == FILES
    record = await target.find("a.png")
    assert record is not None
    assert (record.modified_ns, record.content_type) == (1_700_000_000 * 10**9, "image/png")
    assert (await imported(target, pack(tmp_path / "plain.tar"))).outcomes == dict.fromkeys(FILES, "ok")


async def test_hostile_members(target: ImageStorage, tmp_path: Path) -> None:
    """Paths that lead out, links and devices are refused, and every other file is imported (CVE-2007-4559)."""
    (tmp_path / "secret").write_bytes(b"secret")

    def add(tar: tarfile.TarFile) -> None:
        for name in ("../out.png", "/etc/out.png", "deep/../../out.png", "./../out2.png"):
            tar.addfile(tarfile.TarInfo(name))
        kinds = {"soft.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE, "dev.png": tarfile.CHRTYPE}
        for name, kind in (kinds | {"fifo.png": tarfile.FIFOTYPE}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret")
            tar.addfile(info)
        info = tarfile.TarInfo("time.png")
        info.pax_headers = {"mtime": "nan"}
        tar.addfile(info)

    report = await imported(target, pack(tmp_path / "hostile.tar", add))
    out = ("../out.png", "/etc/out.png", "deep/../../out.png", "../out2.png")
    refused = dict.fromkeys(out, "invalid_name")
    refused |= dict.fromkeys(("soft.png", "hard.png", "dev.png", "fifo.png"), "failed")
    assert report.problems == refused
    assert await bytes_in(target) == FILES | {"time.png": b""}


async def test_a_manifest_with_hostile_lines(source: ImageStorage, target: ImageStorage, tmp_path: Path) -> None:
    """Lines that are no record, names that lead out and bytes that are not the recorded ones are reported alone."""
    out = tmp_path / "out"
    await exported(source, out)
    manifest = out / OWN / "manifest.jsonl"
    first, *lines, last = manifest.read_text().splitlines()
    entry = json.loads(lines[0])
    hostile = ["{", "[]", "5", json.dumps(entry | {"name": 5}), json.dumps(entry | {"sha256": "../../etc/passwd"})]
    hostile += [json.dumps(entry | {"extra": 1}), json.dumps(entry | {"created_at": "2020-01-01T00:00:00"})]
    hostile += [json.dumps({"name": "a.png"}), json.dumps(entry | {"versions": [5]}), "[" * 5000]
    outside = json.dumps(entry | {"name": "../../secret"})
    (tmp_path.parent / "secret").write_bytes(b"secret")
    write_file(out / "empty.gif", b"not empty")
    count = len(lines) + len(hostile) + 1
    manifest.write_text("\n".join([first, *lines, *hostile, outside, json.dumps({"records": count})]) + "\n")
    report = await imported(target, out)
    failed = [name for name, outcome in report.problems.items() if outcome == "failed"]
    assert len(failed) == len(hostile)
    others = {name: outcome for name, outcome in report.problems.items() if outcome != "failed"}
    assert others == {"../../secret": "invalid_name", "empty.gif": "corrupt_in_database"}
    assert set(await state_of_readable(target)) == set(await state_of_readable(source)) - {"empty.gif"}
    manifest.write_text("\n".join([first, *lines[:-1]]) + "\n")
    assert (await imported(target, out)).problems["the manifest"] == "failed"
    manifest.write_text("\n".join([json.dumps({"selfheal_export": 2}), *lines, last]) + "\n")
    with pytest.raises(Exception, match="newer selfheal"):
        await imported(target, out)


def with_size(path: Path, number: int, size: bytes) -> Path:
    """Write other bytes for the size of the header that is block `number` of a tar file, with the right checksum."""
    data = bytearray(path.read_bytes())
    header = data[number * 512 : (number + 1) * 512]
    header[124:136], header[148:156] = size, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[number * 512 : (number + 1) * 512] = header
    path.write_bytes(data)
    return path


SIZES = [b"\xff" * 10 + b"\xfa\x00", b"\xff" * 12, b"\xff" + bytes(11), b"\x80" + b"\xff" * 11]


@pytest.mark.parametrize("size", SIZES, ids=["back to the start", "-1", "negative", "without end"])
async def test_tar_files_with_impossible_sizes(target: ImageStorage, tmp_path: Path, size: bytes) -> None:
    """A size that is negative or has no end stops no import: what is before it is imported (CVE-2025-8194)."""
    tar = with_size(pack(tmp_path / "sizes.tar"), 2, size)
    report = await imported(target, tar)
    assert report.outcomes["a.png"] == "migrated"
    assert set(report.problems.values()) == {"failed"}
    assert (await bytes_in(target))["a.png"] == b"a"


@pytest.mark.parametrize(
    "headers", [{"GNU.sparse.map": "0,x"}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, {"size": "-99999"}]
)
async def test_tar_files_with_senseless_headers(target: ImageStorage, tmp_path: Path, headers: dict[str, str]) -> None:
    """An extended header that cannot be read ends the import with a report, not with an error of the library."""

    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo("odd.png")
        info.size, info.pax_headers = 600, headers
        tar.addfile(info, io.BytesIO(bytes(600)))

    tar = pack(tmp_path / "senseless.tar", add)
    assert (await imported(target, tar)).problems == {str(tar): "failed"}
    assert await bytes_in(target) == FILES


async def test_damaged_tar_files(target: ImageStorage, tmp_path: Path) -> None:
    """A tar file that is cut off is reported, and what is whole in it is imported; what is no tar file is refused."""
    data = pack(tmp_path / "plain.tar").read_bytes()
    tar = tmp_path / "cut.tar"
    tar.write_bytes(data[: 3 * 512 + 1000])
    report = await imported(target, tar)
    assert report.problems == {"cats/tom.jpg": "failed", str(tar): "failed"}
    assert await bytes_in(target) == {"a.png": b"a"}
    tar.write_bytes(data[:1024] + b"\xff" * 512 + data[1536:])
    assert (await imported(target, tar)).outcomes == {"a.png": "ok", str(tar): "failed"}
    for bad in (b"", b"no tar at all" * 100, b"\x1f\x8b\x08" + bytes(2000)):
        tar.write_bytes(bad)
        with pytest.raises(SettingsError, match="no tar file"):
            await imported(target, tar)
    with pytest.raises(SettingsError, match="no directory or tar file"):
        await imported(target, tmp_path / "nowhere")


async def test_an_archive_differs(target: ImageStorage, tmp_path: Path) -> None:
    """Names that the database has with other bytes, or deleted, stay as they are; the bytes become versions."""
    await target.create_tables()
    await target.store_image("a.png", b"newer")
    await target.store_image("empty.gif", b"x")
    await target.bury("empty.gif")
    for _ in range(2):
        report = await imported(target, pack(tmp_path / "plain.tar"))
        assert report.problems == {"a.png": "differs", "empty.gif": "deleted"}
    state = await state_of(target)
    assert (state["a.png"][2], state["a.png"][3]) == (b"newer", [b"a"])
    assert (state["empty.gif"][2], state["empty.gif"][3]) == (None, [b"", b"x"])
