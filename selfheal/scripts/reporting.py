"""Reports: progress on a terminal's standard error; a summary, or one JSON object, on standard output."""

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import click

from ..bulk.outcomes import Outcome, Result
from ..errors import MissingExtra
from ..sql.models import Contents, Total
from .summary import counted, human_size, in_words, next_steps

PLACES = ("app", "directory", "database", "table_prefix", "schema")
"""Flags that say where disk and database are."""


@dataclass
class Report:
    """The totals of a bulk run, and every name that it leaves wrong."""

    command: str
    dry_run: bool = False
    examined: int = 0
    skipped: int = 0
    size: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Result] = field(default_factory=list)
    warnings: list[Result] = field(default_factory=list)
    plans: list[Result] = field(default_factory=list)  # what a dry run would do
    question: str = ""  # for people: is the directory right?
    mapped: list[Result] = field(default_factory=list)
    error: str = ""
    started: float = field(default_factory=time.monotonic)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong (any more)."""
        return not self.problems and not self.error

    @property
    def goes_on(self) -> bool:
        """Whether a second run finds done what the first one did."""
        return self.command != "verify" and not self.dry_run

    def add(self, result: Result) -> None:
        """Add a result."""
        if result.outcome is Outcome.SKIPPED:
            self.skipped += result.count
            self.warnings += [result] if result.detail else []
            return
        self.examined += result.count
        self.counts[result.outcome.value] += result.count
        if result.outcome in (Outcome.RESTORED, Outcome.MIGRATED, Outcome.OK):
            self.size += result.size
        if result.is_problem:
            self.problems.append(result)
        elif self.dry_run and result.detail:
            self.plans.append(result)
        if result.origin:
            self.mapped.append(result)

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            "command": self.command,
            "ok": self.ok,
            "examined": self.examined,
            "counts": dict(sorted(self.counts.items())),
            "skipped": self.skipped,
            "bytes": self.size,
            "seconds": round(time.monotonic() - self.started, 3),
            "problems": [
                {"name": one.name, "outcome": one.outcome.value, "detail": one.detail} for one in self.problems
            ],
            **({"mapped": [_mapped(one) for one in self.mapped]} if self.mapped else {}),
            **({"dry_run": True} if self.dry_run else {}),
            **({"error": self.error} if self.error else {}),
        }

    def as_text(self, flags: str) -> str:
        """Return the summary for people: what a dry run would do, one line of totals, and what to do next."""
        counts = self.counts | ({Outcome.SKIPPED.value: self.skipped} if self.skipped else {})
        seconds = time.monotonic() - self.started
        mode = " (dry run, nothing was changed)" if self.dry_run else ""
        words = in_words(self.command, counts, dry_run=self.dry_run)
        plans = [f"{printable(one.name)}: {one.detail}" for one in self.plans]
        total = f"{self.command}{mode}: {words} · {human_size(self.size)} in {seconds:.1f} s"
        steps = next_steps(self.command, counts, flags, dry_run=self.dry_run)
        return "\n".join([*plans, total, *(f"next: {step}" for step in steps)])


def _mapped(result: Result) -> dict[str, str]:
    return {"name": result.name, "outcome": result.outcome.value, "detail": f"it was {result.origin!r}"}


def show(report: Report, *, as_json: bool, quiet: bool) -> None:
    """Print a report: JSON to standard output; or the summary there and the problems to standard error."""
    if report.warnings and not quiet:
        first, others = report.warnings[0], len(report.warnings) - 1
        more = f" ({others} more like this)" if others else ""
        click.echo(f"warning: {printable(first.name)}: {first.detail}{more}", err=True)
    if as_json:
        click.echo(json.dumps(report.as_json()))
        return
    for one in () if quiet else report.mapped:
        click.echo(f"mapped: {printable(one.name)}: it was {one.origin!a}", err=True)
    for one in report.problems:
        if not (report.question and one.outcome is Outcome.MISSING_ON_DISK):  # one line for all of them
            click.echo(f"{one.outcome.value}: {printable(one.name)}: {one.detail}", err=True)
    if report.question and not (quiet and report.ok):
        click.echo(f"question: {report.question}", err=True)
    if not quiet and not report.error:
        click.echo(report.as_text(same_flags()))


def same_flags() -> str:
    """Return " (with the same --database)" if this command was told on its command line where disk and database are."""
    context = click.get_current_context()
    flags = [f"--{flag.replace('_', '-')}" for flag in PLACES if context.params.get(flag) is not None]
    return f" (with the same {' and '.join(flags)})" if flags else ""


def show_failure(why: str, *, as_json: bool, quiet: bool) -> None:
    """Print what a command did before it failed; the reason is printed elsewhere, except in JSON."""
    context = click.get_current_context()
    if isinstance(context.obj, Report):
        context.obj.error = why
        show(context.obj, as_json=as_json, quiet=quiet)
    elif as_json:
        click.echo(json.dumps({"command": context.command.name, "ok": False, "error": why}))


def show_stop(*, as_json: bool, quiet: bool) -> None:
    """Print what a command did before the user stopped it, and whether it goes on from there."""
    show_failure("stopped by the user", as_json=as_json, quiet=quiet)
    report = click.get_current_context().obj
    done = f" after {counted(report.examined, 'file')}" if isinstance(report, Report) else ""
    again = "; run it again to go on" if done and report.goes_on else ""
    if not quiet:
        new_line = "\n" if sys.stderr.isatty() else ""  # after the terminal's ^C
        click.echo(f"{new_line}selfheal: stopped{done}{again}", err=True)


@dataclass(frozen=True)
class Output:
    """How a command prints what it did."""

    as_json: bool
    quiet: bool

    def answer(self, text: str, *, ok: bool = True, **fields: Any) -> None:
        """Print the text for people, or the fields as JSON."""
        if self.as_json:
            click.echo(json.dumps({"command": click.get_current_context().command.name, "ok": ok, **fields}))
        elif text and not self.quiet:
            click.echo(text)


def plain(what: Contents) -> dict[str, Any]:
    """Return a record or version as JSON values."""
    values = {key: value for key, value in asdict(what).items() if value is not None}
    return {key: value if isinstance(value, int | str) else str(value) for key, value in values.items()}


def moment(modified_ns: int) -> str:
    """Return an mtime for people."""
    with contextlib.suppress(ValueError, OverflowError, OSError):  # each C library refuses other years
        return f"{datetime.fromtimestamp(modified_ns // 10**9, UTC):%Y-%m-%d %H:%M:%S}"
    return "?" * 19


def printable(name: str) -> str:
    """Return a name that can be printed: file names may have bytes that are not text, or control a terminal."""
    return name if name.isprintable() else ascii(name)


def has_progress(*, quiet: bool) -> bool:
    """Whether progress is drawn: standard error is a terminal."""
    return not quiet and sys.stderr.isatty()


@contextmanager
def progress(command: str, total: Total | None, *, quiet: bool) -> Iterator[Callable[[Result], None]]:
    """Yield a function that shows a result on a progress bar, if there is a terminal."""
    if not has_progress(quiet=quiet):
        yield lambda _result: None
        return
    try:
        from .progress_bar import ProgressBar  # noqa: PLC0415 - it needs an extra
    except ImportError as error:
        raise MissingExtra("cli", "rich") from error
    with ProgressBar(command, total) as bar:
        yield bar.add
