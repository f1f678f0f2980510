"""`UploadStore.save_uploaded_file`: the client's file name is never a path, and the policy holds."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.datastructures import UploadFile

from selfheal import (
    IMAGE_EXTENSIONS,
    InvalidName,
    UploadIncomplete,
    UploadPolicy,
    UploadRefused,
    UploadStore,
    UploadTooLarge,
    UploadTypeRefused,
)
from selfheal.content.sources import CHUNK
from tests.support.open_files import assert_nothing_open_below
from tests.support.store_state import files_below, on_disk_and_in_database
from tests.support.uploads import small_png

UUID4_NAME = re.compile(r"[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}\.png")


def upload_of(data: bytes, filename: str | None) -> UploadFile:
    """Return an upload as a framework hands it to the app."""
    return UploadFile(io.BytesIO(data), filename=filename)


async def test_an_upload_is_saved_under_a_uuid_with_its_extension(store: UploadStore) -> None:
    """The name is a random UUID (version 4) with the extension in lower case; its directory is made."""
    assert files_below(store.disk.path) == []
    saved = await store.save_uploaded_file(upload_of(small_png(), "Tom the CAT.PNG"))
    assert UUID4_NAME.fullmatch(saved.name)
    assert saved.path.is_absolute()
    assert saved.path == store.disk.path / saved.name
    assert saved.path.read_bytes() == small_png()
    assert saved.content_type == "image/png"
    again = await store.save_uploaded_file(upload_of(small_png(), "Tom the CAT.PNG"), folder="cats/2024")
    assert again.name.startswith("cats/2024/")
    assert UUID4_NAME.fullmatch(again.name.removeprefix("cats/2024/"))
    assert await on_disk_and_in_database(store, again.name) == small_png()


@pytest.mark.parametrize("filename", ["tom.jpg", "tom.GIF", "tom.jpeg.webp"])
async def test_an_upload_is_saved_with_the_extension_of_its_true_type(store: UploadStore, filename: str) -> None:
    """A picture whose name says another type is saved with the extension and the content type of its bytes."""
    saved = await store.save_uploaded_file(upload_of(small_png(), filename), folder="cats")
    assert UUID4_NAME.fullmatch(saved.name.removeprefix("cats/"))
    assert saved.content_type == "image/png"
    assert await on_disk_and_in_database(store, saved.name) == small_png()


async def test_svg_is_accepted_if_the_policy_says_so(directory: Path, sqlite_url: str) -> None:
    """An app opts in to SVG; then it is saved like any picture."""
    policy = UploadPolicy(extensions=IMAGE_EXTENSIONS | {"svg"})
    async with UploadStore(directory, sqlite_url, policy=policy) as store:
        await store.database.create_tables()
        saved = await store.save_uploaded_file(upload_of(b"<svg/>", "tom.svg"))
        assert saved.content_type == "image/svg+xml"
        assert saved.path.read_bytes() == b"<svg/>"


NEEDED = "aiosqlite anyio greenlet idna selfheal sqlalchemy starlette typing_extensions"
WITHOUT_EXTRAS = """
import asyncio, io, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in {*sys.stdlib_module_names, *sys.argv[3].split()} and not top.startswith("_"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Refuse())
from selfheal import UploadStore

class Upload(io.BytesIO):
    filename = "tom.png"

async def main():
    async with UploadStore(*sys.argv[1:3]) as store:
        await store.database.create_tables()
        print((await store.save_uploaded_file(Upload(sys.stdin.buffer.read()))).content_type)

asyncio.run(main())
"""


def test_an_upload_needs_no_extra(directory: Path, sqlite_url: str) -> None:
    """`save_uploaded_file` works with the packages that selfheal itself depends on: no extra is missed at an upload."""
    command = [sys.executable, "-c", WITHOUT_EXTRAS, str(directory), sqlite_url, NEEDED]
    done = subprocess.run(command, input=small_png(), capture_output=True, check=False)
    assert (done.stdout, done.stderr) == (b"image/png\n", b"")


HOSTILE_NAMES = [
    "../../../evil.png", "/etc/evil.png", "..", ".", "/", "", None, "evil.png/..", "evil.png/../../x", "a/b/evil.png",
    "..\\..\\evil.png", "C:\\evil.png", "evil.php\x00.png", "evil\x00.png", "evil.png\x00", "evil.p/ng", "evil.png ",
    "evil.png.", ".png", ".htaccess", "evil.", "evil", "nul.png", "evil.png::$DATA", "%2e%2e%2fevil.png", "evil.ｐｎｇ",
    "evil." + "g" * 300, "x" * 5000 + ".png", "\ud800.png", "evil.png\r\nX-Evil: 1", "~root/evil.png", "a;b|c`d`.png",
]  # fmt: skip


async def test_the_clients_file_name_is_never_a_path(sqlite_store: UploadStore, tmp_path: Path) -> None:
    """For every file name of the client, the upload gets a UUID as its name or is refused (CVE-2021-28658)."""
    saved = []
    for filename in HOSTILE_NAMES:
        try:
            saved.append((await sqlite_store.save_uploaded_file(upload_of(small_png(), filename))).name)
        except UploadRefused:
            continue
    assert all(UUID4_NAME.fullmatch(name) for name in saved)
    assert files_below(sqlite_store.disk.path) == sorted(saved)
    outside = [path for path in files_below(tmp_path) if not path.startswith("app/static/uploads/")]
    assert all(path.startswith("catalogue.db") for path in outside)
    assert await sqlite_store.database.count() == len(saved)


@pytest.mark.parametrize("folder", ["..", "../x", "/etc", "a//b", ".git", "a\\b", "a/"])
async def test_a_folder_outside_the_grammar_is_refused(sqlite_store: UploadStore, tmp_path: Path, folder: str) -> None:
    """The folder is a part of the name and obeys the same grammar."""
    with pytest.raises(InvalidName):
        await sqlite_store.save_uploaded_file(upload_of(small_png(), "tom.png"), folder=folder)
    kept = ("catalogue.db", ".selfheal-disk")
    assert [path for path in files_below(tmp_path) if not path.rpartition("/")[2].startswith(kept)] == []


REFUSED: dict[str, tuple[bytes, str, type[UploadRefused], int]] = {
    "too large": (small_png() + b"\0" * CHUNK, "tom.png", UploadTooLarge, 413),
    "extension not allowed": (small_png(), "tom.exe", UploadTypeRefused, 415),
    "other bytes than the extension says": (b"<html>", "tom.gif", UploadTypeRefused, 415),
    "SVG, which the policy has to name": (b"<svg/>", "tom.svg", UploadTypeRefused, 415),
    "empty": (b"", "tom.png", UploadIncomplete, 422),
    "truncated": (small_png()[:-6], "tom.png", UploadIncomplete, 422),
}


@pytest.mark.parametrize(("data", "filename", "error", "status"), REFUSED.values(), ids=REFUSED)
async def test_a_refused_upload_leaves_nothing(
    directory: Path, sqlite_url: str, data: bytes, filename: str, error: type[UploadRefused], status: int
) -> None:
    """An upload that breaks the policy is a typed error with its HTTP status, and nothing of it is stored."""
    async with UploadStore(directory, sqlite_url, policy=UploadPolicy(max_bytes=CHUNK)) as store:
        await store.database.create_tables()
        with pytest.raises(error) as raised:
            await store.save_uploaded_file(upload_of(data, filename))
        assert raised.value.status == status
        assert await store.database.count() == 0
        assert files_below(directory) == []
    await assert_nothing_open_below(directory)
