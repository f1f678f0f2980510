"""`manage.py selfheal verify …`: the command `selfheal`, for the store of `STORAGES["default"]`."""

import sys

from django.core.management.base import BaseCommand

from ....scripts import main


class Command(BaseCommand):  # type: ignore[misc]  # Django has no types
    """Passes all arguments on."""

    help = "Runs the command `selfheal` for the uploads of STORAGES['default']: migrate, verify, restore, undo, …"
    requires_system_checks = ()

    def run_from_argv(self, argv: list[str]) -> None:
        """Run `selfheal`; never returns."""
        is_command = len(argv) > 2 and not argv[2].startswith("-")
        sys.argv = [*argv[1:], *(["--app", "selfheal.django:uploads"] if is_command else [])]
        main()
