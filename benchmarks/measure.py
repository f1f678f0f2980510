"""Experiments: the contestants take turns in one run, and the report quotes medians."""

from __future__ import annotations

import json
import operator
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
BENCH = PROJECT / ".bench"
RESULTS = BENCH / "results"
OURS = "selfheal"

Measures = dict[str, float]
"""The values of one turn of a contestant, by unit: `{"seconds": 1.2, "MB": 40.0}`."""

_COMPARE = {"≥": operator.ge, "≤": operator.le, "<": operator.lt, ">": operator.gt}


class Unavailable(Exception):
    """A contestant cannot run here; the message says what is missing and which command installs it."""


@dataclass
class Contest:
    """One question: the values of `subject` and of the others, turn by turn, in `unit`.

    `wants` is the target of the ratio subject ÷ contestant, by contestant (`≥ 12`). For the subject it is the target of
    its value.
    """

    label: str
    unit: str
    samples: dict[str, list[Measures]]
    wants: dict[str, str] = field(default_factory=dict)
    subject: str = OURS
    notes: list[str] = field(default_factory=list)

    @property
    def others(self) -> list[str]:
        """Return every contestant but the subject."""
        return [name for name in self.samples if name != self.subject]

    def values(self, name: str, unit: str | None = None) -> list[float]:
        """Return the samples of a contestant in one unit."""
        return [sample[unit or self.unit] for sample in self.samples[name] if (unit or self.unit) in sample]

    def ratios(self, other: str) -> list[float]:
        """Return subject ÷ other, turn by turn."""
        return [mine / yours for mine, yours in zip(self.values(self.subject), self.values(other), strict=True)]

    def seen_as(self, label: str, unit: str, wants: dict[str, str]) -> Contest:
        """Return the same turns as a contest in another of their units."""
        samples = {name: [{unit: sample[unit]} for sample in given] for name, given in self.samples.items()}
        return Contest(label, unit, samples, wants, self.subject)

    def is_met(self, name: str) -> bool | None:
        """Return whether the median of the ratio with `name` meets its target; None if it has no target."""
        if name not in self.wants or not self.samples.get(name):
            return None
        sign, _, bound = self.wants[name].partition(" ")
        measured = self.values(name) if name == self.subject else self.ratios(name)
        return bool(_COMPARE[sign](statistics.median(measured), float(bound)))


@dataclass(frozen=True)
class Run:
    """How much to measure."""

    quick: bool = False
    turns: int = 100

    def pick(self, full: int, quick: int) -> int:
        """Return `quick` in a quick run, `full` otherwise."""
        return quick if self.quick else full

    def contest(
        self,
        label: str,
        unit: str,
        contestants: Mapping[str, Callable[[], Measures | float]],
        *,
        turns: int = 7,
        wants: dict[str, str] | None = None,
        subject: str = OURS,
    ) -> Contest:
        """Let the contestants take turns, A B C and then C B A, so that no position is an advantage."""
        samples: dict[str, list[Measures]] = {name: [] for name in contestants}
        for turn in range(min(turns, 3 if self.quick else self.turns)):
            order = list(contestants.items())
            for name, measure in order if turn % 2 == 0 else reversed(order):
                got = measure()
                samples[name].append(got if isinstance(got, dict) else {unit: got})
        return Contest(label, unit, samples, wants or {}, subject)


@dataclass(frozen=True)
class Experiment:
    """An experiment; `perform` yields its contests."""

    group: str
    name: str
    title: str
    plot: str
    perform: Callable[[Run], Iterator[Contest]]


EXPERIMENTS: list[Experiment] = []


def experiment(
    title: str, plot: str = "bars"
) -> Callable[[Callable[[Run], Iterator[Contest]]], Callable[[Run], Iterator[Contest]]]:
    """Register a generator of contests; `plot` is `bars`, `curves` (labels are numbers) or `none`."""

    def register(perform: Callable[[Run], Iterator[Contest]]) -> Callable[[Run], Iterator[Contest]]:
        group = perform.__module__.rpartition(".")[2]
        EXPERIMENTS.append(Experiment(group, perform.__name__, title, plot, perform))
        return perform

    return register


def save(one: Experiment, contests: Sequence[Contest], *, quick: bool, load: float) -> None:
    """Write the samples of an experiment to a file for the report; a quick run has its own file."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept = {
        "group": one.group,
        "name": one.name,
        "title": one.title,
        "plot": one.plot,
        "quick": quick,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "load": load,
        "contests": [asdict(contest) for contest in contests],
    }
    path = RESULTS / f"{one.group}.{one.name}{'.quick' if quick else ''}.json"
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False))


def quantity(values: Sequence[float]) -> str:
    """Return a median with its range: `1,234 (1,200 … 1,300)`."""
    middle = number(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({number(min(values))} … {number(max(values))})"


def number(value: float) -> str:
    """Return a number with three significant digits."""
    if abs(value) >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def machine() -> str:
    """Return a description of the machine, its disk and the versions in use."""
    cpu = next(
        _said(line) for line in (*_lines("/proc/cpuinfo"), f"model name: {platform.machine()}") if "model name" in line
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    BENCH.mkdir(exist_ok=True)
    place = subprocess.run(
        ["stat", "-f", "-c", "%T", BENCH], capture_output=True, text=True, check=False
    ).stdout.strip()
    return (
        f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, {place or '?'}, {platform.system()} "
        f"{platform.release()}, Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}"
    )


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _said(line: str) -> str:
    return line.partition(":")[2].strip()
