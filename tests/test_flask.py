"""`selfheal.flask`: where its settings come from, and how an app finds it."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path

import pytest
from flask import Flask, current_app

from selfheal import MissingExtra, SettingsError, UploadStore
from selfheal.flask import SelfHeal
from tests.support.middleware import PICTURE


@pytest.fixture
def app(tmp_path: Path) -> Flask:
    """An app in a directory of its own, with a database."""
    app = Flask("shop", root_path=str(tmp_path / "shop"))
    app.config["SELFHEAL_DATABASE_URL"] = f"sqlite:///{tmp_path}/shop.db"
    return app


@pytest.fixture
def heal() -> Iterator[SelfHeal]:
    """An extension without an app."""
    heal = SelfHeal(cache_control="max-age=60")
    yield heal
    if heal.store is not None:
        heal.uploads.close()


def test_an_app_with_its_defaults(app: Flask, heal: SelfHeal, tmp_path: Path) -> None:
    """Uploads are beside the app, and are served and healed at the path of its static files; others are left alone."""
    heal.init_app(app)
    with app.app_context():
        assert current_app.extensions["selfheal"] is heal
    heal.uploads.database.create_tables()
    path = heal.uploads.save("tom.png", PICTURE).path
    assert path == tmp_path / "shop" / "static" / "uploads" / "tom.png"
    path.unlink()
    client = app.test_client()
    healed = client.get("/static/uploads/tom.png")
    assert (healed.status_code, healed.data, healed.headers["Cache-Control"]) == (200, PICTURE, "max-age=60")
    assert path.read_bytes() == PICTURE
    (tmp_path / "shop" / "static" / "app.css").write_bytes(b"of the app")
    with client.get("/static/app.css") as own:
        assert own.data == b"of the app"
    assert client.get("/static/uploads/no.png").headers["Cache-Control"] == "no-store"


def test_settings(app: Flask, heal: SelfHeal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The app's config wins over the environment, and both over the defaults."""
    monkeypatch.setenv("SELFHEAL_DIRECTORY", str(tmp_path / "environment"))
    monkeypatch.setenv("SELFHEAL_PREFIX", "/environment")
    monkeypatch.setenv("SELFHEAL_DATABASE_URL", "sqlite:///nowhere.db")
    app.config |= {"SELFHEAL_PREFIX": "/media", "SELFHEAL_TABLE_PREFIX": "shop_", "SELFHEAL_SCHEMA": None}
    heal.init_app(app)
    heal.uploads.database.create_tables()
    assert heal.uploads.save("tom.png", PICTURE).path == tmp_path / "environment" / "tom.png"
    assert app.test_client().get("/media/tom.png").data == PICTURE
    with closing(sqlite3.connect(tmp_path / "shop.db")) as database:
        assert database.execute("SELECT name FROM shop_image_storage").fetchall() == [("tom.png",)]


def test_a_store_of_the_app(app: Flask, directory: Path, sqlite_url: str) -> None:
    """A store that the app made is used as it is."""
    with UploadStore(directory, sqlite_url).sync as uploads:
        uploads.database.create_tables()
        heal = SelfHeal(app, UploadStore(directory, sqlite_url), serve=True, adopt=False)
        uploads.save("tom.png", PICTURE)
        assert app.test_client().get("/static/uploads/tom.png").data == PICTURE
        heal.uploads.close()


def test_mistakes(app: Flask, heal: SelfHeal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too early a use, a bad setting and a missing Flask are errors that say what to do."""
    with pytest.raises(RuntimeError, match="init_app"):
        _ = heal.uploads
    app.config["SELFHEAL_PREFIX"] = "media"
    with pytest.raises(SettingsError, match="prefix"):
        heal.init_app(app)
    monkeypatch.setitem(sys.modules, "flask", None)
    monkeypatch.delitem(sys.modules, "selfheal.flask")
    with pytest.raises(MissingExtra, match=r"selfheal-uploads\[flask\]"):
        import_module("selfheal.flask")
