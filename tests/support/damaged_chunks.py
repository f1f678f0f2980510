"""Damage to the chunks of a record in the database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from selfheal import Record
from selfheal.blobs.blob_store import READ_AT_ONCE
from selfheal.content.digests import chunk_digest
from selfheal.content.sources import CHUNK
from tests.support.raw_sql import sql
from tests.support.sample_data import noise

CHUNKS = READ_AT_ONCE + 2
PICTURE = noise(CHUNKS * CHUNK - 777)
"""Bytes that are read in two queries; the last chunk is shorter than the others."""
Damage = Callable[[str, Record], Awaitable[None]]


async def chunk_of(url: str, record: Record, position: int) -> tuple[bytes, bytes]:
    """Return the data and the digest of a stored chunk."""
    query = "SELECT data, digest FROM image_chunk WHERE sha256 = :key AND position = :position"
    ((data, digest),) = await sql(url, query, key=record.sha256, position=position)
    return data, digest


async def rewrite(url: str, record: Record, position: int, **columns: bytes) -> None:
    """Overwrite columns of a chunk."""
    changes = ", ".join(f"{column} = :{column}" for column in columns)
    statement = f"UPDATE image_chunk SET {changes} WHERE sha256 = :key AND position = :position"
    await sql(url, statement, key=record.sha256, position=position, **columns)


def flipped(data: bytes, at: int) -> bytes:
    """Return bytes with one bit flipped."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def a_bit_of_the_data(position: int, at: int) -> Damage:
    """Return a damage that flips one bit of a chunk's data."""

    async def damage(url: str, record: Record) -> None:
        data, _ = await chunk_of(url, record, position)
        await rewrite(url, record, position, data=flipped(data, at))

    return damage


def a_bit_of_the_digest(position: int) -> Damage:
    """Return a damage that flips one bit of a chunk's digest."""

    async def damage(url: str, record: Record) -> None:
        _, digest = await chunk_of(url, record, position)
        await rewrite(url, record, position, digest=flipped(digest, 31))

    return damage


def a_missing_chunk(position: int) -> Damage:
    """Return a damage that deletes a chunk."""

    async def damage(url: str, record: Record) -> None:
        statement = "DELETE FROM image_chunk WHERE sha256 = :key AND position = :position"
        await sql(url, statement, key=record.sha256, position=position)

    return damage


def swapped_chunks(one: int, other: int) -> Damage:
    """Return a damage that swaps two chunks with their digests."""

    async def damage(url: str, record: Record) -> None:
        for here, there in ((one, 1000), (other, one), (1000, other)):
            statement = "UPDATE image_chunk SET position = :there WHERE sha256 = :key AND position = :here"
            await sql(url, statement, key=record.sha256, here=here, there=there)

    return damage


def swapped_data(one: int, other: int) -> Damage:
    """Return a damage that swaps the data of two chunks, without their digests."""

    async def damage(url: str, record: Record) -> None:
        first, _ = await chunk_of(url, record, one)
        second, _ = await chunk_of(url, record, other)
        await rewrite(url, record, one, data=second)
        await rewrite(url, record, other, data=first)

    return damage


def a_chunk_of_other_length(position: int, change: int) -> Damage:
    """Return a damage that makes a chunk longer or shorter, with a matching digest of the chunk."""

    async def damage(url: str, record: Record) -> None:
        data, _ = await chunk_of(url, record, position)
        data = data + bytes(change) if change > 0 else data[:change]
        await rewrite(url, record, position, data=data, digest=chunk_digest(position, data))

    return damage


def an_extra_chunk(data: bytes) -> Damage:
    """Return a damage that adds a chunk after the last one, with a matching digest of the chunk."""

    async def damage(url: str, record: Record) -> None:
        position = -(-record.size // CHUNK)
        await sql(
            url,
            "INSERT INTO image_chunk (sha256, position, digest, data) VALUES (:key, :position, :digest, :data)",
            key=record.sha256,
            position=position,
            digest=chunk_digest(position, data),
            data=data,
        )

    return damage


def a_recorded_size(change: Callable[[int], int]) -> Damage:
    """Return a damage that changes the size in the record."""

    async def damage(url: str, record: Record) -> None:
        statement = "UPDATE image_storage SET size = :size WHERE name = :name"
        await sql(url, statement, name=record.name, size=change(record.size))

    return damage


DAMAGED_CHUNKS: dict[str, tuple[Damage, int]] = {
    **{f"data of chunk {n}": (a_bit_of_the_data(n, 1000), n) for n in (0, READ_AT_ONCE - 1, READ_AT_ONCE, CHUNKS - 1)},
    "first byte": (a_bit_of_the_data(0, 0), 0),
    "last byte": (a_bit_of_the_data(CHUNKS - 1, CHUNK - 778), CHUNKS - 1),
    **{f"digest of chunk {n}": (a_bit_of_the_digest(n), n) for n in (0, READ_AT_ONCE, CHUNKS - 1)},
    **{f"chunk {n} missing": (a_missing_chunk(n), n) for n in (0, 3, READ_AT_ONCE, CHUNKS - 1)},
    "chunks swapped": (swapped_chunks(1, 2), 1),
    "chunks swapped far apart": (swapped_chunks(0, READ_AT_ONCE), 0),
    "data swapped": (swapped_data(4, 5), 4),
    "first chunk longer": (a_chunk_of_other_length(0, 1), 0),
    "middle chunk shorter": (a_chunk_of_other_length(5, -1), 5),
    "last chunk longer": (a_chunk_of_other_length(CHUNKS - 1, 1), CHUNKS - 1),
    "last chunk shorter": (a_chunk_of_other_length(CHUNKS - 1, -1), CHUNKS - 1),
}
"""A damage, and the number of the first chunk that differs."""
OTHER_DAMAGES: dict[str, Damage] = {
    "extra chunk": an_extra_chunk(b"more"),
    "extra whole chunk": an_extra_chunk(noise(CHUNK)),
    "size -1": a_recorded_size(lambda _: -1),
    "size -2**62": a_recorded_size(lambda _: -(2**62)),
    "size 2**62": a_recorded_size(lambda _: 2**62),
    "size 0": a_recorded_size(lambda _: 0),
    "size 1": a_recorded_size(lambda _: 1),
    "a byte less": a_recorded_size(lambda size: size - 1),
    "a byte more": a_recorded_size(lambda size: size + 1),
    "a chunk less": a_recorded_size(lambda size: size // CHUNK * CHUNK),
    "a chunk more": a_recorded_size(lambda size: size + CHUNK),
}
