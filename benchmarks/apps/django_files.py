"""django-binary-database-files in a Django app. `python -m benchmarks.apps.django_files DIRECTORY` stores files in it.

`BENCH_PLACE` is the directory of its database and media.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import django
from django.conf import settings

PLACE = Path(os.environ["BENCH_PLACE"])
settings.configure(
    SECRET_KEY="x",
    ALLOWED_HOSTS=["*"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": PLACE / "django.db"}},
    INSTALLED_APPS=["binary_database_files"],
    MEDIA_ROOT=str(PLACE / "media"),
    ROOT_URLCONF=__name__,
    USE_TZ=True,
)
django.setup()

from binary_database_files.models import File  # noqa: E402 - Django has to be set up first
from binary_database_files.views import serve_mixed  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.core.wsgi import get_wsgi_application  # noqa: E402
from django.urls import re_path  # noqa: E402

urlpatterns = [re_path(r"^static/uploads/(?P<name>.+)$", serve_mixed)]
application = get_wsgi_application()

if __name__ == "__main__":
    call_command("migrate", verbosity=0)
    source = Path(sys.argv[1])
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        data = path.read_bytes()
        File(name=str(path.relative_to(source)), size=len(data), content=data).save()
