"""Django: `SelfHealStorage` for `STORAGES` and `FileField(storage=…)`; `uploads()` for the middleware and for views.

With `"selfheal.django"` in `INSTALLED_APPS`, `manage.py migrate` makes the tables, and `manage.py selfheal` is there.
"""

from ..errors import MissingExtra

try:
    import django  # noqa: F401
except ImportError as error:
    raise MissingExtra("django", "django") from error

from .storage import SelfHealStorage, uploads

__all__ = ["SelfHealStorage", "uploads"]
