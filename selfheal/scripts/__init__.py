"""The command line. `main` is the command `selfheal`; each bulk run is also a module of its own."""

import gc
import sys

from ..errors import MissingExtra


def main(command: str | None = None) -> None:
    """Run `selfheal`, or one of its commands."""
    gc.disable()  # until all is imported: a collection of what stays takes a sixth of that time
    try:
        from . import cli  # noqa: PLC0415 - click is an extra, and its absence is one clear line
    except ImportError as error:
        print(f"selfheal: {MissingExtra('cli', error.name or 'click')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    cli.run(command)
