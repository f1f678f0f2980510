"""The results as text for a terminal, as docs/benchmarks.md, and as SVG plots."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import svg
from .measure import PROJECT, RESULTS, Contest, number, quantity

PAGE = PROJECT / "docs" / "benchmarks.md"
PLOTS = PROJECT / "docs" / "benchmarks"
BUSY = 1.5
"""Load average at the start of an experiment from which the report warns about its figures."""
HEAD = "| | contestant | {unit} | ratio | target | met? |\n|---|---|---|---|---|---|"


def cells(contest: Contest, unit: str = "") -> Iterator[tuple[str, str, str, str, str]]:
    """Yield one row per contestant: name, median with range, ratio subject ÷ contestant, target, target met."""
    for name in (contest.subject, *contest.others):
        measured = f"{quantity(contest.values(name))} {unit}".rstrip()
        rest = [
            f"{_median(contest, name, other)} {other}" for other in contest.samples[name][0] if other != contest.unit
        ]
        measured += f"; {', '.join(rest)}" if rest else ""
        is_met = contest.is_met(name)
        mark = {None: "", True: "yes", False: "**no**"}[is_met]
        ratio = "" if name == contest.subject else f"{quantity(contest.ratios(name))}"
        yield name, measured, ratio, contest.wants.get(name, ""), mark


def plain(contest: Contest) -> Iterator[str]:
    """Yield lines for a terminal."""
    for name, measured, ratio, wanted, mark in cells(contest, contest.unit):
        beside = f"  ratio {ratio}" if ratio else ""
        asked = f"  target {wanted}: {mark.strip('*')}" if wanted else ""
        yield f"  {contest.label:<34} {name:<30} {measured}{beside}{asked}"
    yield from (f"  ! {note}" for note in contest.notes)


def write() -> None:
    """Write docs/benchmarks.md and its plots from the kept samples, without those of quick runs."""
    PLOTS.mkdir(parents=True, exist_ok=True)
    for old in PLOTS.glob("*.svg"):
        old.unlink()
    kept = [one for path in sorted(RESULTS.glob("*.json")) if not (one := json.loads(path.read_text()))["quick"]]
    order = ("hits", "misses", "bulk", "growth", "peers")
    kept.sort(key=lambda one: (order.index(one["group"]), one["date"]))
    findings = Path(__file__).with_name("findings.md").read_text()
    PAGE.write_text("\n".join(_page(kept)) + f"\n\n{findings}")


def _page(kept: list[dict[str, Any]]) -> Iterator[str]:
    yield "# Benchmarks"
    yield ""
    yield (
        "Written by `make bench`; do not edit. The contestants take turns in one run. A figure is a median, with the"
        " smallest and the largest sample in brackets. The ratio is the first contestant of the group ÷ this one,"
        " computed turn by turn. Ratios and orders hold on other machines, absolute figures do not."
    )
    for where in sorted({one["machine"] for one in kept}):
        yield from ("", f"Measured on: {where}.")
    for one in kept:
        contests = [Contest(**contest) for contest in one["contests"]]
        yield from ("", f"## {one['title']}", "")
        if one["plot"] != "none" and contests:
            file = PLOTS / f"{one['group']}-{one['name'].replace('_', '-')}.svg"
            draw = svg.bars if one["plot"] == "bars" else svg.curves
            file.write_text(draw(contests))
            yield from (f"![{one['title']}](benchmarks/{file.name})", "")
        yield from _table(contests)
        busy = f"; the machine had other load ({one['load']:.1f})" if one["load"] > BUSY else ""
        yield from ("", f"`python -m benchmarks {one['group']}.{one['name']}`, {one['date']}{busy}")


def _table(contests: list[Contest]) -> Iterator[str]:
    units = {contest.unit for contest in contests}
    common = units.pop() if len(units) == 1 else ""
    yield HEAD.format(unit=common)
    for contest in contests:
        unit = "" if common else contest.unit
        for index, (name, measured, ratio, wanted, mark) in enumerate(cells(contest, unit)):
            label = contest.label if index == 0 else ""
            yield f"| {label} | {name} | {measured} | {ratio} | {wanted} | {mark} |"
    notes = dict.fromkeys(note for contest in contests for note in contest.notes)
    yield from (line for note in notes for line in ("", note))


def _median(contest: Contest, name: str, unit: str) -> str:
    return number(statistics.median(contest.values(name, unit)))
