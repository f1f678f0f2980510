"""`UploadStore.save_uploaded_file`: the client's file name is never a path, and the policy holds."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from starlette.datastructures import UploadFile

from selfheal import (
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
    assert not store.disk.path.exists()
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
    assert [path for path in files_below(tmp_path) if not path.startswith("catalogue.db")] == []


REFUSED: dict[str, tuple[bytes, str, type[UploadRefused], int]] = {
    "too large": (small_png() + b"\0" * CHUNK, "tom.png", UploadTooLarge, 413),
    "extension not allowed": (small_png(), "tom.exe", UploadTypeRefused, 415),
    "other bytes than the extension says": (small_png(), "tom.gif", UploadTypeRefused, 415),
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
