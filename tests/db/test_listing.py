"""Names that look alike, and pages of all records. Over every database."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfheal import ImageStorage, UploadStore
from tests.support.raw_sql import sql
from tests.support.records import sha256_of, small_file
from tests.support.similar_names import SIMILAR_NAMES


async def test_similar_names(images: ImageStorage) -> None:
    """Names that differ in case, accents, composition or signs are different names."""
    for name in SIMILAR_NAMES:
        await images.store_image(name, name.encode())
    assert await images.count() == len(SIMILAR_NAMES)
    assert {name: found.first for name, found in (await images.blobs.fetch(SIMILAR_NAMES)).items()} == {
        name: name.encode() for name in SIMILAR_NAMES
    }
    for name in SIMILAR_NAMES:
        record = await images.find(name)
        assert record is not None
        assert (record.name, record.sha256, record.generation) == (name, sha256_of(name.encode()), 1)
    await images.bury("a.png")
    records = await images.catalogue.find(SIMILAR_NAMES)
    assert [name for name in SIMILAR_NAMES if records[name].is_deleted] == ["a.png"]


@pytest.mark.parametrize("size", [1, 7, len(SIMILAR_NAMES), 1000])
async def test_pages(images: ImageStorage, size: int) -> None:
    """Pages have every record once, in the order of the names' bytes, and at most `size` records each."""
    await images.store_many([small_file(name, name.encode()) for name in SIMILAR_NAMES])
    pages = [page async for page in images.pages(size=size)]
    assert all(0 < len(page) <= size for page in pages)
    got = [record for page in pages for record in page]
    assert [record.name for record in got] == sorted(SIMILAR_NAMES, key=str.encode)
    assert {record.name: record for record in got} == await images.catalogue.find(SIMILAR_NAMES)


@pytest.mark.parametrize("size", [1, 2, 1000])
async def test_children(images: ImageStorage, size: int) -> None:
    """The folders and files right below a folder are found, with names before and after those of its neighbours."""
    stored = [
        "a.png",
        "cat",
        "cats!/x",
        "cats/a",
        "cats/b/c/d",
        "cats/b0",
        "cats/\U0010ffff",
        "cats0",
        "cats.png",
        "é/x",
    ]
    await images.store_many([small_file(name, name.encode()) for name in (*stored, "cats/gone", "gone/x")])
    for name in ("cats/gone", "gone/x"):
        await images.bury(name)
    children = images.catalogue.children
    assert await children("", size) == ({"cats!", "cats", "é"}, {"a.png", "cat", "cats0", "cats.png"})
    assert await children("cats/", size) == ({"b"}, {"a", "b0", "\U0010ffff"})
    assert await children("cats/b/", size) == ({"c"}, set())
    assert await children("none/", size) == (set(), set())


async def test_pages_of_text_that_is_no_utf8(directory: Path, sqlite_url: str) -> None:
    """Pages have names that are not UTF-8, which SQLite may store, once, and the names after them."""
    async with UploadStore(directory, sqlite_url) as store:
        images = store.database
        await images.create_tables()
        for name in ("a", "b", "c", "d", "e", "é"):
            await images.store_image(name, b"x")
        for name, value in {"b": "CAST(x'61ff' AS TEXT)", "c": "CAST(x'61fe' AS TEXT)"}.items():
            await sql(sqlite_url, f"UPDATE image_storage SET name = {value} WHERE name = '{name}'")
        records = [record.name async for page in images.pages(size=1) for record in page]
        names = [
            name
            async for key_range in images.catalogue.key_ranges(1)
            for name, _ in await images.catalogue.names_in(key_range)
        ]
    assert records == names == ["a", "a\udcfe", "a\udcff", "d", "e", "é"]


async def test_pages_of_alive_and_deleted_names(images: ImageStorage) -> None:
    """Pages have the alive names, the deleted ones, or all."""
    for name in "abcdef":
        await images.store_image(name, b"x")
    for name in "bdf":
        await images.bury(name)
    for deleted, names in ((False, "ace"), (True, "bdf"), (None, "abcdef")):
        got = [record.name for record in [r async for page in images.pages(deleted=deleted, size=2) for r in page]]
        assert got == list(names)


async def test_pages_without_bytes(images: ImageStorage, database_url: str) -> None:
    """Listing and counting need no table of bytes."""
    for name in "abc":
        await images.store_image(name, b"x")
    await sql(database_url, "DROP TABLE image_chunk")
    await sql(database_url, "DROP TABLE image_blob")
    assert [[record.name for record in page] async for page in images.pages(size=2)] == [["a", "b"], ["c"]]
    assert await images.count() == 3


async def test_pages_while_records_change(images: ImageStorage) -> None:
    """Changes while pages are read neither stop them nor repeat a name."""
    names = [f"{number:02}" for number in range(20)]
    await images.store_many([small_file(name, b"x") for name in names])
    got = []
    async for page in images.pages(size=3):
        got += [record.name for record in page]
        await images.bury(page[0].name)
        await images.store_image(f"0-{page[-1].name}", b"y")
        await images.store_image("99", b"z")
    assert [name for name in got if name in names] == names
    assert len(set(got)) == len(got)


async def test_no_pages(images: ImageStorage) -> None:
    """An empty catalogue has no page."""
    assert [page async for page in images.pages()] == []
    assert await images.count() == 0
