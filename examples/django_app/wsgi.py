"""The gallery for a WSGI server. selfheal answers requests below `MEDIA_URL`, Django all others."""

import os

from django.core.wsgi import get_wsgi_application

from selfheal.django import uploads
from selfheal.wsgi import SelfHealMiddleware

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "examples.django_app.settings")
application = SelfHealMiddleware(get_wsgi_application(), uploads())
