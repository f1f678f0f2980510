"""Operations that are interrupted: the deployment before each of them, and the bytes that every name may have after."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from selfheal import UploadStore
from tests.support.operations import Operation
from tests.support.postgres import PostgresServer


@dataclass(frozen=True)
class Deployment:
    """An uploads directory and a database."""

    base: Path
    database: str

    @property
    def directory(self) -> Path:
        """The uploads directory."""
        return self.base / "app" / "static" / "uploads"

    def store(self) -> UploadStore:
        """Return a store over both, in this process."""
        return UploadStore(self.directory, self.database, settled_after=0.0)


class DeploymentTemplate:
    """A deployment as it is before an operation, and copies of it."""

    def __init__(self, base: Path, postgres: PostgresServer | None = None) -> None:
        self._base = base
        self._postgres = postgres
        self._template = uuid4().hex[:12]
        self.original = self._make(self._template)
        self.original.base.mkdir()
        if postgres is not None:
            postgres.sql(f"CREATE DATABASE w{self._template}")

    @contextlib.contextmanager
    def copy(self) -> Iterator[Deployment]:
        """Make a copy that is removed at the end of the block."""
        name = uuid4().hex[:12]
        deployment = self._make(name)
        shutil.copytree(self.original.base, deployment.base)
        if self._postgres is not None:
            self._postgres.sql(f"CREATE DATABASE w{name} TEMPLATE w{self._template}")
        try:
            yield deployment
        finally:
            shutil.rmtree(deployment.base)
            if self._postgres is not None:
                self._postgres.sql(f"DROP DATABASE w{name} WITH (FORCE)")

    def _make(self, name: str) -> Deployment:
        base = self._base / name
        if self._postgres is not None:
            return Deployment(base, self._postgres.url(f"w{name}"))
        return Deployment(base, f"sqlite+aiosqlite:///{base}/catalogue.db")


@dataclass(frozen=True)
class ExpectedBytes:
    """The bytes of a name before and after an operation (None: 404), and other bytes that may be on the disk."""

    before: bytes | None
    after: bytes | None
    other_on_disk: bytes | None = None


@dataclass(frozen=True)
class Scenario:
    """An operation, the deployment that it needs, and what it does to each name."""

    title: str
    operation: Operation
    expected: dict[str, ExpectedBytes]
    prepare: Callable[[UploadStore], Awaitable[None]]

    def __str__(self) -> str:
        return self.title

    def operation_in(self, deployment: Deployment) -> Operation:
        """Return the operation for one deployment."""
        return replace(self.operation, directory=str(deployment.directory), database=deployment.database)

    async def set_up(self, template: DeploymentTemplate) -> None:
        """Create the state before the operation."""
        async with template.original.store() as store:
            await store.database.create_tables()
            await self.prepare(store)
