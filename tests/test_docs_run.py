"""Every code block of the documentation runs, in the order of its page, in an empty directory."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast
from wsgiref.simple_server import demo_app

import httpx
import pytest
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from flask import Flask
from sqlalchemy import MetaData, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from starlette.datastructures import UploadFile

import selfheal
from selfheal import UploadStore
from selfheal.errors import UploadTypeRefused
from selfheal.wsgi import SelfHealMiddleware as WsgiMiddleware
from tests.support import ROOT
from tests.support.docs import Block, Reader, blocks_of, is_server
from tests.support.files import write_file
from tests.support.postgres import PostgresServer
from tests.support.requirements import needs
from tests.support.uploads import small_png
from tests.support.wsgi import as_asgi

PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
PICTURE = small_png()
RUN = ("README.md", "docs/commands.md", "docs/guide.md")
NOT_RUN = {
    ("README.md", "git clone … && cd selfheal"): "it clones this repository, and runs these tests",
    ("CONTRIBUTING.md", "git clone … && cd selfheal"): "it clones this repository, and runs these tests",
    (
        "docs/architecture.md",
        (
            " layer 6   scripts/        the commands and the three script modules"
            "     django/    a storage of Django, over all below"
        ),
    ): "a picture",
    (
        "docs/commands.md",
        "migrate: 6 backed up, 2 skipped (not valid names), 1 failed · 15.6 KB in 0.3 s",
    ): "an example of output; `test_problems_are_reported` and `test_the_first_migration` check such lines",
    (
        "docs/guide.md",
        "selfheal import --table pictures --name filename --data image_data --type mimetype --dry-run",
    ): "it needs a table of another app; `tests/bulk/test_import_table.py` has such tables",
    (
        "docs/guide.md",
        'selfheal import --from sqlite:///selfheal.db --database "$POSTGRES"     # while the servers run',
    ): "it needs a second database with the same uploads; `tests/bulk/test_import_database.py` copies between them",
    (
        "docs/guide.md",
        "# settings.py, with: pip install 'selfheal-uploads[django]'",
    ): "a part of the settings of a Django project; `tests/django` has whole ones",
    ("docs/commands.md", "{"): "an example of output; `test_the_json_example` checks it",
}
"""The blocks that no test here runs, with the reason."""
OPTIONAL = {
    "django": "pip install django",
    "litestar": "pip install litestar",
    "quart": "pip install quart",
    "nginx": "apt-get install nginx",
    "jq": "apt-get install jq",
}
"""What single blocks need that a machine may lack, and how it is installed: the blocks run where it is there."""


def is_missing(needed: str) -> bool:
    """Return whether a program or package is not installed."""
    return shutil.which(needed) is None and importlib.util.find_spec(needed) is None


def needed_by(block: Block) -> str | None:
    """Return what of `OPTIONAL` a block needs."""
    signs = {needed: (f"from {needed}", f"| {needed} ") for needed in OPTIONAL}
    found = (needed for needed, of_it in signs.items() if any(sign in block.text for sign in of_it))
    return "nginx" if block.language == "nginx" else next(found, None)


async def read(page: str, reader: Reader, visit: Callable[[str], None]) -> None:
    """Run the blocks of a page; `visit` is called with the URL of each server that a block starts."""
    for block in blocks_of(page):
        needed = needed_by(block)
        if (page, block.first_line) in NOT_RUN or (needed and is_missing(needed)):
            continue
        if block.file:
            reader.write(block)
        elif block.language == "python":
            await reader.python(block)
            await check_apps(block, reader.names)
        elif block.language == "crontab":
            assert reader.cron(block.text) == ""  # cron sends a mail of what a command prints
        elif block.language == "nginx":
            reader.nginx(block.text)
        else:
            assert block.language == "sh", f"say in NOT_RUN why this block of {page} is not run: {block.text}"
            lines = block.text.splitlines()
            reader.shell("\n".join(line for line in lines if not is_server(line)))
            for line in filter(is_server, lines):
                with reader.server(line) as url:
                    visit(url)


async def check_apps(block: Block, names: dict[str, Any]) -> None:
    """The app that a block makes serves an upload whose file is missing."""
    for name in ("app", "application", "flask_app"):
        if f"\n{name} = " not in f"\n{block.text}":
            continue
        store = names["uploads"]
        await store.save("cats/tom.jpg", PICTURE)
        (store.disk.path / "cats/tom.jpg").unlink()
        is_wsgi = isinstance(names[name], WsgiMiddleware | Flask)
        transport = httpx.ASGITransport(as_asgi(names[name]) if is_wsgi else names[name])
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.get("/static/uploads/cats/tom.jpg")).content == PICTURE, block.text


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_named(page: str) -> None:
    """A block that is not run is in the list `NOT_RUN`, with the reason, and the list has no other blocks."""
    left = {block.first_line for block in blocks_of(page) if page not in RUN or (page, block.first_line) in NOT_RUN}
    assert left == {line for of_page, line in NOT_RUN if of_page == page}


@pytest.mark.parametrize("needed", OPTIONAL)
def test_what_blocks_need(needed: str) -> None:
    """The end of the run lists the programs and packages without which blocks are left out."""
    if is_missing(needed):
        needs(needed, OPTIONAL[needed])


async def test_the_readme(tmp_path: Path) -> None:
    """The app of the README saves an upload, and serves it after its file is deleted."""

    def visit(url: str) -> None:
        answer = httpx.post(f"{url}/upload", files={"picture": ("tom.png", PICTURE)}, timeout=60)
        assert answer.status_code == 200, answer.text
        (file,) = tmp_path.glob("app/static/uploads/*.png")
        file.unlink()
        assert httpx.get(f"{url}{answer.json()}", timeout=60).content == PICTURE

    await read("README.md", Reader(tmp_path), visit)
    assert len(list(tmp_path.glob("app/static/uploads/*.png"))) == 1


async def test_the_commands(tmp_path: Path, postgres_url: str) -> None:
    """Each example of the commands ends with 0, and a server serves a file that was missing."""
    write_file(tmp_path / "app/static/uploads/cats/tom.jpg", PICTURE)
    write_file(tmp_path / "shop/main.py", b"from starlette.applications import Starlette\n\napp = Starlette()\n")

    def visit(url: str) -> None:
        (tmp_path / "app/static/uploads/cats/tom.jpg").unlink()
        assert httpx.get(f"{url}/static/uploads/cats/tom.jpg", timeout=60).content == PICTURE

    postgres = postgres_url.replace("+asyncpg", "")
    variables = {"DATABASE_URL": f"sqlite:///{tmp_path}/selfheal.db", "POSTGRES": postgres}
    await read("docs/commands.md", Reader(tmp_path, variables), visit)


@pytest.fixture
async def guide_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres: PostgresServer, postgres_url: str
) -> AsyncIterator[Reader]:
    """A reader with what the guide says that the reader's app has."""
    monkeypatch.chdir(tmp_path)
    engines = create_async_engine(postgres_url), create_engine(postgres_url.replace("asyncpg", "psycopg2"))
    async with UploadStore("app/static/uploads", postgres_url) as uploads, AsyncSession(engines[0]) as session:
        await uploads.database.create_tables()
        given = {
            "__name__": "__main__",
            "connection": engines[1].connect(),
            "data": PICTURE,
            "database": postgres_url,
            "handlers": [],
            "metadata": MetaData(),
            "session": session,
            "source": PICTURE,
            "sync_session": Session(engines[1]),
            "upload": UploadFile(io.BytesIO(PICTURE), filename="tom.png"),
            "uploads": uploads,
            "wsgi_app": demo_app,
        }
        names = {name: getattr(selfheal, name) for name in selfheal.__all__} | given
        url = postgres_url.replace("+asyncpg", "")
        paths = os.pathsep.join([str(postgres.programs), os.environ["PATH"]])
        monkeypatch.setenv("PATH", paths)
        yield Reader(tmp_path, {"DATABASE_URL": url}, names)
    await engines[0].dispose()
    engines[1].dispose()


async def test_the_guide(guide_reader: Reader) -> None:
    """Each block of the guide runs over PostgreSQL, and each app that it makes heals."""
    with EnvironmentContext(Config(), cast(Any, None)):  # as in an `env.py`
        await read("docs/guide.md", guide_reader, lambda _url: None)
    app = guide_reader.names["app"]

    @app.post("/refused")
    async def refuse() -> None:
        raise UploadTypeRefused("it is no picture")

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.post("/refused")
    assert (answer.status_code, answer.text) == (415, "it is no picture")
