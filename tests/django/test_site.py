"""The example, as its visitors use it: forms, pages, files, a lost disk, deletions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.apps import apps
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from sqlalchemy.engine import make_url

from selfheal import UploadStore
from selfheal.django import SelfHealStorage
from tests.support import ROOT, example_apps, wsgi_servers
from tests.support.docs import blocks_of
from tests.support.sample_images import picture

SETTINGS = """from examples.django_app.settings import *

DATABASES = {{"default": {!r}}}
MEDIA_ROOT = HOME / "uploads"
"""


def shown(page: str) -> list[str]:
    """Return the URLs of the photos on the page."""
    return re.findall(r'<img src="([^"]+)" width="[1-9]', page)


@pytest.fixture
def photo_name(storage: SelfHealStorage) -> Iterator[str]:
    """The name of a photo that was added with the form."""
    Photo = apps.get_model("django_app", "Photo")
    Photo.objects.all().delete()
    answer = Client().post("/", {"image": SimpleUploadedFile("my cat.png", picture("PNG"), "image/png")})
    assert answer.status_code == 302, answer.content
    yield Photo.objects.get().image.name
    Photo.objects.all().delete()


def test_a_model(storage: SelfHealStorage, photo_name: str) -> None:
    """An `ImageField` is saved with its measures; its file is restored when it is read; its deletion can be undone."""
    Photo = apps.get_model("django_app", "Photo")
    photo, png = Photo.objects.get(), picture("PNG")
    assert re.fullmatch(r"photos/\d{4}/my_cat\.png", photo_name)
    assert (photo.width, photo.height) == (photo.image.width, photo.image.height)
    shutil.rmtree(storage.location)
    for _ in range(2):  # the second time Django opens the closed file again
        with photo.image.open() as file:
            assert file.read() == png
        shutil.rmtree(storage.location)
    assert (photo.image.size, photo.image.url) == (len(png), f"/media/{photo_name}")
    photo.image.delete(save=False)
    assert not storage.exists(photo_name)
    assert not Path(storage.location, photo_name).exists()
    storage.uploads.sync.undo(photo_name)
    assert Path(storage.path(photo_name)).read_bytes() == png


def test_a_bad_upload(storage: SelfHealStorage) -> None:
    """What is no image is refused by the form, and nothing is stored."""
    answer = Client().post("/", {"image": SimpleUploadedFile("a.png", b"no image")})
    assert answer.status_code == 200
    assert storage.uploads.sync.database.count() == 0


def test_async_code(storage: SelfHealStorage, photo_name: str) -> None:
    """An async view reaches the storage as Django's documents say: through `sync_to_async`."""

    async def view() -> bytes:
        def read() -> bytes:
            with storage.open(photo_name) as file:
                return bytes(file.read())

        shutil.rmtree(storage.location)
        return await sync_to_async(read)()

    assert async_to_sync(view)() == picture("PNG")


# -- over HTTP ---------------------------------------------------------------------------------------------------------


Server = example_apps.Server | wsgi_servers.Server


@pytest.fixture(params=["uvicorn", "gunicorn preload"])
def server(
    request: pytest.FixtureRequest, tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """The example on an ASGI and a WSGI server: Django's own tables are in the same kind of database as selfheal's."""
    url = make_url(database_url)
    values: dict[str, Any] = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "site.sqlite3")}
    if url.get_backend_name() == "postgresql":
        values = {"HOST": url.host, "PORT": url.port, "USER": url.username, "NAME": url.database}
        values["ENGINE"] = "django.db.backends.postgresql"
    (tmp_path / "site_settings.py").write_text(SETTINGS.format(values))
    monkeypatch.setenv("GALLERY_HOME", str(tmp_path))
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "site_settings")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(tmp_path))))
    environ = os.environ | {"SELFHEAL_DATABASE_URL": database_url}
    subprocess.run([sys.executable, "-m", "django", "migrate", "-v", "0"], env=environ, cwd=tmp_path, check=True)
    if request.param == "uvicorn":
        serving = example_apps.serving("examples.django_app.asgi:application", tmp_path, database_url)
    else:
        serving = wsgi_servers.serving(request.param, "examples.django_app.wsgi", tmp_path, database_url)
    with serving as server:
        yield server


def test_a_site(server: Server, database_url: str) -> None:
    """A photo of the form is shown, comes back after a loss of the disk, and is gone once it is deleted, until undo."""
    png, browser = picture("PNG"), server.browser
    assert browser.post("/", files={"image": ("my cat.png", png)}).status_code == 302
    (url,) = shown(browser.get("/").text)
    assert browser.get(url).content == png
    shutil.rmtree(server.directory / "photos")
    healed = browser.get(url)
    assert (healed.status_code, healed.content, healed.headers["content-type"]) == (200, png, "image/png")
    (deletion,) = re.findall(r'action="(/delete/\d+)"', browser.get("/").text)
    assert browser.post(deletion).status_code == 302
    assert browser.get(url).status_code == 404
    assert shown(browser.get("/").text) == []
    with UploadStore(server.directory, database_url).sync as uploads:
        uploads.undo(url.removeprefix("/media/"))
    assert httpx.get(browser.base_url.join(url), timeout=60, trust_env=False).content == png


@pytest.mark.parametrize("name", ["asgi", "wsgi"])
def test_the_guide(name: str) -> None:
    """The file that the guide shows for a server has the lines of the example's, which the test above runs."""
    (block,) = (block for block in blocks_of("docs/guide.md") if block.file == f"{name}.py")
    example = (ROOT / f"examples/django_app/{name}.py").read_text().splitlines()
    assert [line for line in block.text.splitlines()[1:] if line not in example] == []
