"""SelfHealStorage: what Django, its fields and other packages call."""

from __future__ import annotations

import errno
import io
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured, SuspiciousFileOperation
from django.core.files import File
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.core.files.uploadedfile import InMemoryUploadedFile, SimpleUploadedFile, TemporaryUploadedFile
from django.db import connection, transaction
from django.test import override_settings
from PIL import Image

from selfheal import DatabaseUnavailable, UploadStore
from selfheal.content.sources import CHUNK
from selfheal.django import SelfHealStorage, uploads
from tests.django.conftest import storages_of
from tests.support.faults import BrokenDisk
from tests.support.sample_data import noise
from tests.support.sample_images import picture
from tests.support.store_state import files_below

OLD, NEW = b"old bytes", b"new bytes"


def read(storage: Any, name: str) -> bytes:
    """Return the bytes of a file."""
    with storage.open(name) as file:
        return bytes(file.read())


def wipe(storage: SelfHealStorage) -> None:
    """Remove every file of the disk."""
    shutil.rmtree(storage.location)


# -- saving -----------------------------------------------------------------------------------------------------------


def _temporary(data: bytes, _: Path) -> TemporaryUploadedFile:
    file = TemporaryUploadedFile("a.bin", "application/octet-stream", len(data), None)
    file.write(data)  # its position is at the end
    return file


def _in_memory(data: bytes, _: Path) -> InMemoryUploadedFile:
    return InMemoryUploadedFile(io.BytesIO(data), None, "a.bin", "application/octet-stream", len(data), None)


def _half_read(data: bytes, path: Path) -> File:
    path.write_bytes(data)
    file = File(path.open("rb"))
    file.read(7)
    return file


CONTENTS: dict[str, Callable[[bytes, Path], Any]] = {
    "ContentFile": lambda data, _: ContentFile(data),
    "file object": lambda data, _: io.BytesIO(data),
    "File, half read": _half_read,
    "InMemoryUploadedFile": _in_memory,
    "SimpleUploadedFile": lambda data, _: SimpleUploadedFile("a.bin", data),
    "TemporaryUploadedFile": _temporary,
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("size", [0, 10, CHUNK + 1])
def test_every_kind_of_file(sqlite_storage: SelfHealStorage, tmp_path: Path, kind: str, size: int) -> None:
    """Whatever Django hands over is saved whole, wherever its position is, on both sides."""
    data = noise(size)
    content = CONTENTS[kind](data, tmp_path / "source")
    name = sqlite_storage.save("a.bin", content)
    content.close()
    assert Path(sqlite_storage.location, name).read_bytes() == data
    wipe(sqlite_storage)
    with sqlite_storage.open(name) as file:
        assert file.read() == data


def test_text(sqlite_storage: SelfHealStorage) -> None:
    """Text is saved as UTF-8 and can be read as text, as with Django's own storage."""
    name = sqlite_storage.save("a.txt", ContentFile("grüße\n"))
    wipe(sqlite_storage)
    with sqlite_storage.open(name, "r") as file:
        assert file.read() == "grüße\n"


@pytest.mark.parametrize("make", [SimpleUploadedFile, lambda name, data: _named(_temporary(data, Path()), name)])
def test_an_uploaded_file_without_a_storage(sqlite_storage: SelfHealStorage, make: Callable[..., Any]) -> None:
    """`save_uploaded_file` takes Django's uploads, and reads them from their start."""
    upload = make("me.PNG", png := picture("PNG"))
    upload.seek(len(png))
    saved = uploads().sync.save_uploaded_file(upload)
    upload.close()
    assert saved.path.read_bytes() == png
    assert saved.name.endswith(".png")


def _named(upload: Any, name: str) -> Any:
    upload.name = name
    return upload


def test_a_taken_name(storage: SelfHealStorage) -> None:
    """A name that is taken gets a suffix, also if only its file is lost; both files stay."""
    first = storage.save("cats/tom.jpg", ContentFile(OLD))
    wipe(storage)
    second = storage.save("cats/tom.jpg", ContentFile(NEW))
    assert first == "cats/tom.jpg"
    assert second.startswith("cats/tom_")
    assert second.endswith(".jpg")
    assert [read(storage, name) for name in (first, second)] == [OLD, NEW]


def test_a_file_that_is_only_on_disk(sqlite_storage: SelfHealStorage) -> None:
    """A file that has no record yet keeps its name."""
    path = Path(sqlite_storage.location, "tom.jpg")
    path.write_bytes(OLD)
    assert sqlite_storage.exists("tom.jpg")
    assert sqlite_storage.save("tom.jpg", ContentFile(NEW)) != "tom.jpg"
    assert path.read_bytes() == OLD


def test_one_name_at_once(storage: SelfHealStorage) -> None:
    """Threads that save one name at once get a name each: no bytes are lost, even equal ones are not shared."""
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda number: storage.save("tom.jpg", ContentFile(b"%d" % (number // 2))), range(16)))
    assert len(set(names)) == 16
    assert "tom.jpg" in names
    wipe(storage)
    assert [read(storage, name) for name in names] == [b"%d" % (number // 2) for number in range(16)]


def test_a_deleted_name_is_free(storage: SelfHealStorage, store: UploadStore) -> None:
    """A deleted file is gone on both sides; its name can be saved anew, and each version comes back."""
    name = storage.save("tom.jpg", ContentFile(OLD))
    storage.delete(name)
    assert not storage.exists(name)
    assert not Path(storage.location, name).exists()
    with pytest.raises(FileNotFoundError):
        storage.open(name)
    assert storage.save(name, ContentFile(NEW)) == name
    storage.delete(name)
    storage.delete(name)  # silent, as Django's own
    store.sync.undo(name)
    assert read(storage, name) == NEW


def test_a_full_disk(sqlite_storage: SelfHealStorage, broken_disk: BrokenDisk) -> None:
    """On a full disk files are saved in the database, and opened from there."""
    broken_disk.fail("pwrite", errno.ENOSPC)
    name = sqlite_storage.save("tom.jpg", ContentFile(OLD))
    with sqlite_storage.open(name) as file:
        assert (file.read(), file.seek(4), file.read()) == (OLD, 4, OLD[4:])
    assert sqlite_storage.size(name) == len(OLD)
    assert sqlite_storage.url(name) == "/media/tom.jpg"


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../a.png", "a/../../b.png", "/etc/passwd", ".env", "a//b.png", "nul.png", "a" * 300])
def test_names_outside_the_grammar(sqlite_storage: SelfHealStorage, name: str) -> None:
    """A name outside the grammar is refused by every call, as Django refuses it: a 400 for the client."""
    calls: list[Callable[[], Any]] = [
        lambda: sqlite_storage.save(name, ContentFile(OLD)),
        *(lambda call=call: call(name) for call in (sqlite_storage.open, sqlite_storage.exists, sqlite_storage.path)),
        *(lambda call=call: call(name) for call in (sqlite_storage.delete, sqlite_storage.size)),
    ]
    for call in calls:
        with pytest.raises(SuspiciousFileOperation):
            call()
    assert files_below(Path(sqlite_storage.location)) == []


@pytest.mark.parametrize(
    ("given", "valid"),
    [
        ("my cat (1).jpg", "my_cat_1.jpg"),
        (".htaccess", "htaccess"),
        ("aux.png", "_aux.png"),
        ("end.", "end"),
        ("猫" * 200 + ".png", "猫" * 78 + ".png"),
        ("a\ufffdb.png", "ab.png"),
    ],
)
def test_names_of_clients(sqlite_storage: SelfHealStorage, given: str, valid: str) -> None:
    """What a client calls its file becomes a name that can be saved, twice: the second one gets a suffix."""
    assert sqlite_storage.generate_filename(f"2026/{given}") == f"2026/{valid}"
    for _ in range(2):
        sqlite_storage.save(sqlite_storage.generate_filename(f"2026/{given}"), ContentFile(OLD))
    assert len(sqlite_storage.listdir("2026")[1]) == 2


def test_backslashes(sqlite_storage: SelfHealStorage) -> None:
    """A backslash is a slash, as everywhere in Django."""
    assert sqlite_storage.save("cats\\tom.jpg", ContentFile(OLD)) == "cats/tom.jpg"
    assert sqlite_storage.exists("cats\\tom.jpg")


def test_the_length_of_the_field(sqlite_storage: SelfHealStorage) -> None:
    """A name never gets longer than its field, also if it is taken."""
    for _ in range(3):
        assert len(sqlite_storage.save("a" * 40 + ".jpg", ContentFile(OLD), max_length=30)) <= 30


# -- reading ----------------------------------------------------------------------------------------------------------


def test_a_lost_disk(storage: SelfHealStorage) -> None:
    """Every call answers for a lost file as before the loss."""

    def answers() -> list[Any]:
        times = storage.get_modified_time(name), storage.get_created_time(name)
        return [storage.exists(name), storage.size(name), *times, storage.listdir(""), storage.listdir("cats")]

    name = storage.save("cats/tom.jpg", ContentFile(OLD))
    storage.save("dog.jpg", ContentFile(NEW))
    before = answers()
    wipe(storage)
    assert answers() == before
    assert before[4:] == [(["cats"], ["dog.jpg"]), ([], ["tom.jpg"])]
    assert Path(storage.path(name)).read_bytes() == OLD


def test_image_libraries(storage: SelfHealStorage) -> None:
    """Pillow opens a lost file by its path and as a file."""
    name = storage.save("a.png", ContentFile(picture("PNG")))
    wipe(storage)
    with Image.open(storage.path(name)) as by_path:
        size = by_path.size
    wipe(storage)
    with storage.open(name) as file, Image.open(file) as opened:
        assert opened.size == size


def test_missing_names(storage: SelfHealStorage) -> None:
    """A name that was never saved is missing for each call; only `path` says where it would be."""
    assert not storage.exists("no.jpg")
    for call in (storage.open, storage.size, storage.get_modified_time, storage.get_created_time):
        with pytest.raises(FileNotFoundError, match="no such file"):
            call("no.jpg")
    assert storage.path("no.jpg") == str(Path(storage.location, "no.jpg"))
    assert storage.listdir("no") == ([], [])
    storage.delete("no.jpg")


@pytest.mark.parametrize("mode", ["wb", "w", "ab", "r+b"])
def test_modes_that_write(sqlite_storage: SelfHealStorage, mode: str) -> None:
    """A file cannot be opened to be written; the error says what to call."""
    with pytest.raises(io.UnsupportedOperation, match="save"):
        sqlite_storage.open("a.jpg", mode)


@pytest.mark.parametrize("is_aware", [True, False])
def test_times(sqlite_storage: SelfHealStorage, is_aware: bool) -> None:
    """Times are aware with `USE_TZ`, else local."""
    name = sqlite_storage.save("tom.jpg", ContentFile(OLD))
    with override_settings(USE_TZ=is_aware):
        for moment in (sqlite_storage.get_modified_time(name), sqlite_storage.get_created_time(name)):
            assert (moment.tzinfo is not None) is is_aware
            assert abs((datetime.now(UTC if is_aware else None) - moment).total_seconds()) < 30


@pytest.mark.parametrize("prefix", ["/media", "/media/", "https://cdn.example/media/"])
def test_urls(site: Path, prefix: str) -> None:
    """A URL is the prefix and the quoted name."""
    assert SelfHealStorage(prefix=prefix).url("my cat/100%#1?é.jpg") == (
        f"{prefix.rstrip('/')}/my%20cat/100%25%231%3F%C3%A9.jpg"
    )
    assert SelfHealStorage().url("tom.jpg") == "/media/tom.jpg"
    assert uploads().url("my cat.jpg") == "/media/my%20cat.jpg"
    with override_settings(MEDIA_URL=""), pytest.raises(ImproperlyConfigured, match="MEDIA_URL"):
        SelfHealStorage().url("tom.jpg")


def test_database_down(site: Path, directory: Path, tmp_path: Path) -> None:
    """Without its database a file on disk can be read; what is not there is unknown, never missing."""
    with storages_of(directory=directory, database=f"sqlite:///{tmp_path}/no/such.db"):
        uploads().disk.path_of("tom.jpg").write_bytes(OLD)
        assert read(default_storage, "tom.jpg") == OLD
        assert default_storage.path("tom.jpg") == str(directory / "tom.jpg")
        assert default_storage.exists("tom.jpg")
        for call in (default_storage.open, default_storage.exists, default_storage.size, default_storage.delete):
            with pytest.raises(DatabaseUnavailable):
                call("no.jpg")


# -- transactions ------------------------------------------------------------------------------------------------------


def test_djangos_own_transaction_in_the_same_file(site: Path, directory: Path) -> None:
    """A save that would wait for its caller's own transaction fails at once and says what to do; outside it works."""
    with storages_of(directory=directory, database=f"sqlite:///{connection.settings_dict['NAME']}"):
        uploads().sync.database.create_tables()
        default_storage.save("before.jpg", ContentFile(OLD))
        with transaction.atomic():
            with pytest.raises(transaction.TransactionManagementError, match=r"OPTIONS\['database'\]"):
                default_storage.save("a.jpg", ContentFile(OLD))
            with pytest.raises(transaction.TransactionManagementError, match="outside"):
                default_storage.delete("before.jpg")
            assert read(default_storage, "before.jpg") == OLD
            transaction.on_commit(lambda: default_storage.save("after.jpg", ContentFile(NEW)))
        assert read(default_storage, "after.jpg") == NEW


def test_transactions_elsewhere(storage: SelfHealStorage) -> None:
    """Inside a transaction on another database, or another file, a save works; a rollback does not undo it."""
    with transaction.atomic():
        storage.save("a.jpg", ContentFile(OLD))
        transaction.set_rollback(True)
    assert read(storage, "a.jpg") == OLD
