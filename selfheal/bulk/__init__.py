"""The bulk runs, as async generators of results; nothing is printed here.

Each can be killed and run again: what is done stays done.
"""

from .export import export
from .importer import import_all
from .migrate import migrate
from .restore import restore
from .verify import verify

__all__ = ["export", "import_all", "migrate", "restore", "verify"]
