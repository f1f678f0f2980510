"""What a run says: progress on a terminal's standard error, a summary or one JSON object on standard output."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import click

from ..bulk.outcomes import Outcome, Result
from ..errors import MissingExtra
from ..sql.models import Record, Version


@dataclass
class Report:
    """The sums of a bulk run, and every name that it leaves wrong."""

    command: str
    dry_run: bool = False
    examined: int = 0
    size: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Result] = field(default_factory=list)
    error: str = ""
    started: float = field(default_factory=time.monotonic)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong (any more)."""
        return not self.problems and not self.error

    def add(self, result: Result) -> None:
        """Count what was found."""
        self.examined += result.count
        self.counts[result.outcome.value] += result.count
        if result.outcome in (Outcome.RESTORED, Outcome.MIGRATED, Outcome.OK):
            self.size += result.size
        if result.is_problem:
            self.problems.append(result)

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        rest = {"dry_run": True} if self.dry_run else {}
        return {
            "command": self.command,
            "ok": self.ok,
            "examined": self.examined,
            "counts": dict(sorted(self.counts.items())),
            "bytes": self.size,
            "seconds": round(time.monotonic() - self.started, 3),
            "problems": [
                {"name": one.name, "outcome": one.outcome.value, "detail": one.detail} for one in self.problems
            ],
            **rest,
            **({"error": self.error} if self.error else {}),
        }

    def as_text(self) -> str:
        """The summary for people: one line."""
        seconds = time.monotonic() - self.started
        counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(self.counts.items())) or "nothing to do"
        mode = " (dry run: nothing was changed)" if self.dry_run else ""
        return f"{self.command}: {self.examined} examined: {counts}; {megabytes(self.size)} in {seconds:.1f} s{mode}"


def megabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size} bytes"


def show(report: Report, *, as_json: bool, quiet: bool) -> None:
    """Print a report: JSON to standard output; or the summary there and the problems to standard error."""
    if as_json:
        click.echo(json.dumps(report.as_json()))
        return
    for one in report.problems:
        click.echo(f"{one.outcome.value}: {printable(one.name)}: {one.detail}", err=True)
    if not quiet and not report.error:
        click.echo(report.as_text())


def show_failure(why: str, *, as_json: bool, quiet: bool) -> None:
    """Say what a command did until it failed; why it did is said elsewhere, except in JSON."""
    context = click.get_current_context()
    if isinstance(context.obj, Report):
        context.obj.error = why
        show(context.obj, as_json=as_json, quiet=quiet)
    elif as_json:
        click.echo(json.dumps({"command": context.command.name, "ok": False, "error": why}))


def answer(said: dict[str, Any], text: str, as_json: bool, quiet: bool) -> None:
    """Print what a command about single names did: as JSON, or as text if there is any."""
    if as_json:
        click.echo(json.dumps(said))
    elif text and not quiet:
        click.echo(text)


def plain(what: Record | Version) -> dict[str, Any]:
    """A record or version as JSON takes it."""
    values = {key: value for key, value in asdict(what).items() if value is not None}
    return {key: value if isinstance(value, int | str) else str(value) for key, value in values.items()}


def moment(modified_ns: int) -> str:
    """A time of last modification for people."""
    with contextlib.suppress(ValueError, OverflowError):
        return f"{datetime.fromtimestamp(modified_ns // 10**9, UTC):%Y-%m-%d %H:%M:%S}"
    return "?" * 19


def printable(name: str) -> str:
    """A name as it can be printed: file names need not be text, and may hold what a terminal would obey."""
    return name if name.isprintable() else ascii(name)


def has_progress(*, quiet: bool) -> bool:
    """Whether there is a terminal to draw progress on."""
    return not quiet and sys.stderr.isatty()


@contextmanager
def progress(title: str, total: int | None, *, quiet: bool) -> Iterator[Any]:
    """A function to call with every result; it draws a bar with rate and time left if standard error is a terminal."""
    if not has_progress(quiet=quiet):
        yield lambda _result: None
        return
    try:
        from rich import progress as bars  # noqa: PLC0415 - an extra, imported where it is used
        from rich.console import Console  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("cli", "rich") from error
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, rate="")
        started, done, size = time.monotonic(), 0, 0

        def draw(result: Result) -> None:
            nonlocal done, size
            done, size = done + result.count, size + result.size
            seconds = max(time.monotonic() - started, 0.001)
            bar.update(
                task, advance=result.count, rate=f"{done / seconds:,.0f} files/s, {size / seconds / 1e6:,.0f} MB/s"
            )

        yield draw


async def tell(results: AsyncIterator[Result], report: Report, draw: Any) -> None:
    """Count every result and draw it."""
    async for result in results:
        report.add(result)
        draw(result)
