"""`manage.py selfheal verify …`: the command `selfheal`, for the store of a storage in `STORAGES`."""

import argparse
import sys
from pathlib import Path

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand

from ....scripts import main
from ....store import UploadStore
from ... import uploads

_chosen = "default"


class Command(BaseCommand):  # type: ignore[misc]  # Django has no types
    """Passes all arguments on but `--storage ALIAS`."""

    help = (
        "Runs the command `selfheal` for the uploads of STORAGES['default'], or of the storage that --storage ALIAS "
        "names: migrate, verify, restore, undo, …"
    )
    requires_system_checks = ()

    def run_from_argv(self, argv: list[str]) -> None:
        """Run `selfheal`; never returns."""
        global _chosen  # noqa: PLW0603 - the process runs one command
        parser = argparse.ArgumentParser(prog=f"{Path(argv[0]).name} {argv[1]}", add_help=False, allow_abbrev=False)
        parser.add_argument("--storage", metavar="ALIAS", default=_chosen)
        ours, rest = parser.parse_known_args(argv[2:])
        _chosen = ours.storage
        sys.argv = [argv[1], *rest]
        if rest and not rest[0].startswith("-"):
            try:
                store()
            except ImproperlyConfigured as error:
                parser.error(str(error))
            sys.argv += ["--app", f"{__name__}:store"]
        main()


def store() -> UploadStore:
    """Return the store of the chosen storage."""
    return uploads(_chosen)
