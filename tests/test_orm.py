"""Uploads of an app's own rows: saved and deleted in the transaction of the row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from sqlalchemy import ForeignKey, create_engine, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from selfheal import InvalidName, UploadStore
from selfheal.orm import UploadName, delete_with_rows
from tests.support.disk_files import contents_below
from tests.support.waiting import eventually, wait_until


class Models:
    """The models of an app: new ones for each test, for what listens to them stays."""

    def __init__(self) -> None:
        class Base(DeclarativeBase):
            pass

        class Animal(Base):
            __tablename__ = "animal"
            id: Mapped[int] = mapped_column(primary_key=True)
            kind: Mapped[str]
            age: Mapped[int] = mapped_column(default=0)
            picture: Mapped[str | None] = mapped_column(UploadName)
            thumbnail: Mapped[str | None] = mapped_column("small", UploadName)
            __mapper_args__: ClassVar = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}

        class Cat(Animal):
            __mapper_args__: ClassVar = {"polymorphic_identity": "cat"}

        class Dog(Animal):
            __tablename__ = "dog"
            id: Mapped[int] = mapped_column(ForeignKey("animal.id"), primary_key=True)
            collar: Mapped[str | None] = mapped_column(UploadName)
            __mapper_args__: ClassVar = {"polymorphic_identity": "dog"}

        class Document(Base):
            __tablename__ = "document"
            id: Mapped[int] = mapped_column(primary_key=True)
            scan: Mapped[str | None] = mapped_column(UploadName, deferred=True)

        self.base, self.animal, self.cat, self.dog, self.document = Base, Animal, Cat, Dog, Document


@pytest.fixture
def models() -> Models:
    """The models of an app."""
    return Models()


@pytest.fixture
def uploads(directory: Path, database_tables: str, models: Models) -> Iterator[UploadStore]:
    """A store whose database has the app's tables as well."""
    store = UploadStore(directory, database_tables)
    engine = create_engine(sync_url(store))
    models.base.metadata.create_all(engine)
    engine.dispose()
    delete_with_rows(models.base, store)
    yield store
    engine = create_engine(sync_url(store))
    models.base.metadata.drop_all(engine)
    engine.dispose()
    store.sync.close()


def sync_url(store: UploadStore) -> str:
    """Return the URL of a store's database for a synchronous driver."""
    url = store.database.url
    drivers = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg2"}
    return url.set(drivername=drivers[url.get_backend_name()]).render_as_string(hide_password=False)


@pytest.fixture
def session(uploads: UploadStore) -> Iterator[Session]:
    """A synchronous session of the app."""
    engine = create_engine(sync_url(uploads))
    with Session(engine) as session:
        yield session
    engine.dispose()


def add(uploads: UploadStore, session: Session, kind: Any) -> Any:
    """Add a row with its two uploads, in one transaction."""
    for name in ("big.png", "small.png"):
        uploads.sync.save(name, name.encode(), connection=session)
    session.add(row := kind(picture="big.png", thumbnail="small.png"))
    session.commit()
    uploads.sync.restore("big.png")
    uploads.sync.restore("small.png")
    return row


def is_deleted(uploads: UploadStore, name: str) -> bool:
    """Return whether a name has a tombstone, as opposed to a living record."""
    record = uploads.sync.database.find(name)
    assert record is not None
    return record.is_deleted


@pytest.mark.parametrize("kind", ["animal", "cat"])
def test_deleted_with_the_row(uploads: UploadStore, session: Session, models: Models, kind: str) -> None:
    """The uploads of a deleted row are deleted with the commit: records and files; undo brings them back."""
    row = add(uploads, session, getattr(models, kind))
    session.delete(row)
    session.flush()
    assert not is_deleted(uploads, "big.png")
    session.commit()
    assert is_deleted(uploads, "big.png")
    assert is_deleted(uploads, "small.png")
    wait_until(lambda: contents_below(uploads.disk.path) == {})
    assert uploads.sync.undo("big.png").path.read_bytes() == b"big.png"


def test_a_row_that_stays(uploads: UploadStore, session: Session, models: Models) -> None:
    """After a rollback, and after a change of something else, the uploads are there."""
    row = add(uploads, session, models.cat)
    session.delete(row)
    session.flush()
    session.rollback()
    row.age = 3
    session.commit()
    assert not is_deleted(uploads, "big.png")
    assert contents_below(uploads.disk.path) == {"big.png": b"big.png", "small.png": b"small.png"}


@pytest.mark.parametrize("is_loaded", [True, False], ids=["loaded", "expired"])
def test_another_upload(uploads: UploadStore, session: Session, models: Models, is_loaded: bool) -> None:
    """A row that gets another upload, or none, deletes the one it had."""
    row = add(uploads, session, models.cat)
    if is_loaded:
        assert (row.picture, row.thumbnail) == ("big.png", "small.png")
    uploads.sync.save("new.png", b"new", connection=session)
    row.picture = "new.png"
    row.thumbnail = None
    session.commit()
    assert is_deleted(uploads, "big.png")
    assert is_deleted(uploads, "small.png")
    assert not is_deleted(uploads, "new.png")
    row.picture = "new.png"
    session.commit()
    assert not is_deleted(uploads, "new.png")


def test_a_row_that_was_not_loaded(uploads: UploadStore, session: Session, models: Models) -> None:
    """Deleting a row whose attributes are not loaded deletes its uploads."""
    add(uploads, session, models.cat)
    session.expire_all()
    session.delete(session.scalars(select(models.animal)).one())
    session.commit()
    assert is_deleted(uploads, "big.png")


def test_a_table_of_its_own(uploads: UploadStore, session: Session, models: Models) -> None:
    """With joined inheritance, it is the upload of the changed row that is deleted, not that of another row."""
    rows = []
    for name in ("1.png", "2.png", "3.png"):
        uploads.sync.save(name, name.encode(), connection=session)
        rows.append(models.dog(collar=name))
    session.add_all(rows)
    session.commit()
    rows[1].collar = None
    session.commit()
    assert [is_deleted(uploads, f"{number}.png") for number in (1, 2, 3)] == [False, True, False]


def test_a_deferred_column(uploads: UploadStore, session: Session, models: Models) -> None:
    """An upload whose column is loaded only on demand is deleted with its row."""
    uploads.sync.save("scan.png", b"scan", connection=session)
    session.add(models.document(scan="scan.png"))
    session.commit()
    session.expunge_all()
    session.delete(session.scalars(select(models.document)).one())
    session.commit()
    assert is_deleted(uploads, "scan.png")


def test_changed_then_deleted(uploads: UploadStore, session: Session, models: Models) -> None:
    """A row that gets another upload, and is deleted before that is flushed, keeps neither of the two."""
    row = add(uploads, session, models.cat)
    assert row.picture == "big.png"
    uploads.sync.save("new.png", b"new", connection=session)
    row.picture = "new.png"
    session.delete(row)
    session.commit()
    assert is_deleted(uploads, "big.png")
    assert is_deleted(uploads, "new.png")


def test_handed_to_another_row(uploads: UploadStore, session: Session, models: Models) -> None:
    """An upload that another row gets in the same flush stays: columns swapped, or a row replaced by another one."""
    row = add(uploads, session, models.cat)
    row.picture, row.thumbnail = row.thumbnail, row.picture
    session.commit()
    session.add(models.document(scan=row.picture))
    session.delete(row)
    session.commit()
    assert not is_deleted(uploads, "small.png")
    assert is_deleted(uploads, "big.png")


def test_a_flush_that_fails(uploads: UploadStore, session: Session, models: Models) -> None:
    """What a failed flush would have deleted is not deleted by the next one."""
    row = add(uploads, session, models.cat)
    session.delete(row)
    session.add(models.document(scan="../etc/passwd"))
    with pytest.raises(Exception, match="passwd"):
        session.flush()
    session.rollback()
    session.add(models.document())
    session.commit()
    assert not is_deleted(uploads, "big.png")


def test_deleted_within_a_savepoint(uploads: UploadStore, session: Session, models: Models) -> None:
    """The file goes with the commit of the transaction, not when its savepoint is released."""
    row = add(uploads, session, models.cat)
    with session.begin_nested():
        session.delete(row)
    assert set(contents_below(uploads.disk.path)) == {"big.png", "small.png"}
    session.commit()
    wait_until(lambda: contents_below(uploads.disk.path) == {})


def test_many_commits_of_one_session(uploads: UploadStore, session: Session, models: Models) -> None:
    """A session that deletes rows for a long time has no more listeners than before."""
    before = len(list(session.dispatch.after_commit))
    for _ in range(3):
        session.delete(add(uploads, session, models.cat))
        session.commit()
    assert len(list(session.dispatch.after_commit)) == before


def test_no_other_names(uploads: UploadStore, session: Session, models: Models) -> None:
    """A column takes names only."""
    session.add(models.cat(picture="../etc/passwd"))
    with pytest.raises(Exception, match="passwd") as caught:
        session.flush()
    assert isinstance(caught.value.__cause__, InvalidName) or isinstance(caught.value, InvalidName)


async def test_an_async_session(store: UploadStore, models: Models) -> None:
    """The same in an async session, on the loop of the store."""
    delete_with_rows(models.base, store)
    engine = create_async_engine(store.database.url)
    async with engine.begin() as connection:
        await connection.run_sync(models.base.metadata.create_all)
    async with AsyncSession(engine, expire_on_commit=False) as session:
        saved = await store.save("a.png", b"a", connection=session)
        session.add(row := models.cat(picture=saved.name))
        await session.commit()
        await store.restore("a.png")
        await session.delete(row)
        await session.commit()
    record = await store.database.find("a.png")
    assert record is not None
    assert record.is_deleted
    await eventually(lambda: contents_below(store.disk.path) == {})
    async with engine.begin() as connection:
        await connection.run_sync(models.base.metadata.drop_all)
    await engine.dispose()
