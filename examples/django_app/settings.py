"""Settings of the gallery: three lines are about selfheal."""

import os
from pathlib import Path

HOME = Path(os.environ.get("GALLERY_HOME", "")).absolute()
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": HOME / "gallery.sqlite3"}}
MEDIA_ROOT = HOME / "media"
MEDIA_URL = "/media/"
STORAGES = {"default": {"BACKEND": "selfheal.django.SelfHealStorage"}}
INSTALLED_APPS = ["selfheal.django", "examples.django_app"]

ALLOWED_HOSTS = ["127.0.0.1", "localhost", "testserver"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
ROOT_URLCONF = "examples.django_app.urls"
SECRET_KEY = "an example keeps no secrets"
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates"}]
TIME_ZONE = "UTC"
USE_TZ = True
