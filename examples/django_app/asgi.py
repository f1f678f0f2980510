"""The gallery for an ASGI server. selfheal answers requests below `MEDIA_URL`, Django all others."""

import os

from django.core.asgi import get_asgi_application

from selfheal import SelfHealMiddleware
from selfheal.django import uploads

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "examples.django_app.settings")
application = SelfHealMiddleware(get_asgi_application(), uploads())
