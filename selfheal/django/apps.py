"""The app `selfheal.django`: `manage.py migrate` makes the tables of the storages in `STORAGES`."""

from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core.files.storage import storages
from django.db.models.signals import post_migrate

from .storage import SelfHealStorage


class SelfHealConfig(AppConfig):  # type: ignore[misc]  # Django has no types
    """Its name in `INSTALLED_APPS` is `selfheal.django`."""

    name = "selfheal.django"
    label = "selfheal"
    verbose_name = "selfheal"

    def ready(self) -> None:
        """Make the tables after each `manage.py migrate`, also that of a test run."""
        post_migrate.connect(_create_tables, sender=self)


def _create_tables(**_: Any) -> None:
    for alias in settings.STORAGES:
        storage = storages[alias]
        if isinstance(storage, SelfHealStorage):
            storage.uploads.sync.database.create_tables()
