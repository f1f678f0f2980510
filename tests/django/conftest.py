"""Django, set up once with the settings of the example; each test has a storage of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import django
import pytest
from django.core.files.storage import storages
from django.core.management import call_command
from django.db import connections
from django.test import override_settings

from selfheal import UploadStore
from selfheal.django import SelfHealStorage, uploads

BACKEND = "selfheal.django.SelfHealStorage"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The example, with its own tables in SQLite; returns where its files are."""
    home = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("GALLERY_HOME", str(home))
        environ.setenv("DJANGO_SETTINGS_MODULE", "examples.django_app.settings")
        django.setup()
        call_command("migrate", verbosity=0)
        yield home
        connections.close_all()


@contextmanager
def storages_of(**options: Any) -> Iterator[None]:
    """Override the settings with a storage of these options."""
    backends = {"default": {"BACKEND": BACKEND, "OPTIONS": options}}
    with override_settings(STORAGES=backends):
        storages.backends = backends  # Django 4.2 drops the options of a setting that is overridden
        yield


@pytest.fixture
def storage(site: Path, directory: Path, database_url: str) -> Iterator[SelfHealStorage]:
    """The default storage, over every kind of database, with its tables."""
    with storages_of(directory=directory, database=database_url):
        uploads().sync.database.create_tables()
        yield SelfHealStorage(directory, database_url)


@pytest.fixture
def sqlite_storage(site: Path, directory: Path, sqlite_url: str) -> Iterator[SelfHealStorage]:
    """The default storage, over SQLite, with its tables."""
    with storages_of(directory=directory, database=sqlite_url):
        uploads().sync.database.create_tables()
        yield SelfHealStorage(directory, sqlite_url)


@pytest.fixture
def store(storage: SelfHealStorage) -> UploadStore:
    """The store of `storage`."""
    return storage.uploads
