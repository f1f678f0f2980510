"""The command `selfheal`. Exit: 0 all is well, 1 some file is wrong, 2 bad usage, 3 no database, 130 stopped."""

import contextlib
import gc
import sys
from io import TextIOWrapper
from typing import Any, cast

import click

from ..distribution import DISTRIBUTION
from ..errors import DatabaseUnavailable, InvalidName, MissingExtra, SelfHealError, SettingsError
from . import bulk_commands, care_commands, name_commands, transfer_commands
from .options import example, settings_of, where

HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


def run(command: str | None = None) -> None:
    """Run the command line, or one of its commands under the name of its module; never returns."""
    gc.freeze()  # what was imported stays: to collect it again and again took a tenth of a large run
    gc.enable()
    sys.setswitchinterval(0.0001)  # threads that read, hash and write take turns: a third of the time of a large run
    chosen: click.Command = selfheal if command is None else selfheal.commands[command]
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a terminal that is opened for reading as well cannot be changed
            # a name that this terminal cannot show ends no run
            cast(TextIOWrapper, stream).reconfigure(errors="backslashreplace")
    try:
        code = chosen.main(standalone_mode=False, **HELP)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        program = f"{context.command_path} " if context else ""
        code = _complain(f"{error.format_message().rstrip('.?')}; see `{program}--help`", 2)
    except (SettingsError, MissingExtra, InvalidName) as error:
        code = _complain(error, 2)
    except DatabaseUnavailable as error:
        code = _complain(error, 3)
    except (SelfHealError, OSError) as error:
        code = _complain(error, 1)
    except (click.Abort, KeyboardInterrupt):
        code = 130
    sys.exit(code or 0)


def _complain(error: object, code: int) -> int:
    click.echo(f"selfheal: {' '.join(str(error).splitlines())}", err=True)
    return code


class _Commands(click.Group):
    """Lists its commands in the order in which people use them, each with its first sentence, never cut."""

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(limit=1000)) for name, one in self.commands.items()])


@click.group(cls=_Commands, invoke_without_command=True)
@click.version_option(package_name=DISTRIBUTION, prog_name="selfheal")
@click.pass_context
def selfheal(context: click.Context) -> None:
    """Keep uploads on disk and in the database, and restore either one from the other.

    To begin, in the directory of an app: migrate stores the files that are there, verify checks them, and restore
    brings back what is missing. `selfheal COMMAND --help` shows the flags of a command and an example.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@click.command(epilog=example("selfheal serve main:app --port 8080"))
@click.argument("app", metavar="[MODULE:APP]", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, metavar="N", help="The port to listen on."
)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Server processes.")
@click.option(
    "--prefix", metavar="PATH", help="The URL path of the uploads. Default: /static/uploads. [env: SELFHEAL_PREFIX]"
)
@where
def serve(app: str | None, host: str, port: int, workers: int, **flags: str | None) -> int:
    """Serve an ASGI app and its uploads.

    Without an app it serves only the uploads.
    """
    from .serve import serve as run_server  # noqa: PLC0415 - uvicorn is an extra

    run_server(settings_of(**flags), app, host=host, port=port, workers=workers)
    return 0


for _command in (
    *bulk_commands.COMMANDS,
    *name_commands.COMMANDS,
    *care_commands.COMMANDS,
    *transfer_commands.COMMANDS,
    serve,
):
    selfheal.add_command(_command)
