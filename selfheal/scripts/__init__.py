"""What is typed at a shell. `main` is the command `selfheal`; each bulk run is also a module of its own."""

from __future__ import annotations

import gc
import sys

from ..errors import MissingExtra


def main(command: str | None = None) -> None:
    """Run `selfheal`, or just the one of its commands that a module is named after."""
    gc.disable()  # until all is imported: to look through what stays takes a sixth of that time
    try:
        from . import cli  # noqa: PLC0415 - click is an extra, and its absence is one clear line
    except ImportError as error:
        print(f"selfheal: {MissingExtra('cli', error.name or 'click')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    cli.run(command)
