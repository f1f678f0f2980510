"""`python -m benchmarks [GROUP | EXPERIMENT]… [--quick]`: measure, print the results, and write the report."""

from __future__ import annotations

import argparse
import compileall
import importlib
import mmap
import os
import sys
import time
import traceback
from collections.abc import Iterator

from . import report
from .measure import EXPERIMENTS, PROJECT, Contest, Experiment, Run, machine, save

GROUPS = ("hits", "misses", "bulk", "growth", "peers")


def main() -> int:
    """Run the command line; return the exit code."""
    for group in GROUPS:
        importlib.import_module(f"benchmarks.{group}")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    known = [*GROUPS, *(f"{one.group}.{one.name}" for one in EXPERIMENTS)]
    parser.add_argument("what", nargs="*", metavar="GROUP | EXPERIMENT", help=f"all, or some of: {', '.join(known)}")
    parser.add_argument("--quick", action="store_true", help="few and small samples, to see whether it runs")
    parser.add_argument("--turns", type=int, default=100, metavar="N", help="at most N turns of each contestant")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing; write docs/benchmarks.md from the kept samples"
    )
    asked = parser.parse_args()
    if unknown := set(asked.what) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if not asked.report:
        chosen = [
            one for one in EXPERIMENTS if not asked.what or {one.group, f"{one.group}.{one.name}"} & set(asked.what)
        ]
        print(machine())
        compileall.compile_dir(PROJECT / "selfheal", quiet=1)  # as an installed package is
        touch_memory()
        for one in chosen:
            perform(one, Run(quick=asked.quick, turns=asked.turns))
    if not asked.quick:
        report.write()
    return 0


def touch_memory() -> None:
    """Use all free memory once.

    The host of a virtual machine provides memory at its first use, which takes longer than some of the measured tasks.
    """
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if hasattr(mmap, "MAP_POPULATE"):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        mmap.mmap(-1, free * 9 // 10, flags=flags).close()


def perform(one: Experiment, run: Run) -> None:
    """Measure one experiment, print it, and keep its samples."""
    print(f"\n## {one.title}  ({one.group}.{one.name})", flush=True)
    started, load = time.monotonic(), os.getloadavg()[0]
    contests: list[Contest] = []
    for contest in _until_it_breaks(one, run):
        contests.append(contest)
        for line in report.plain(contest):
            print(line, flush=True)
    if contests:
        save(one, contests, quick=run.quick, load=load)
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


def _until_it_breaks(one: Experiment, run: Run) -> Iterator[Contest]:
    """Yield the contests of one experiment. If it fails, print the error and stop, so that the others run."""
    try:
        yield from one.perform(run)
    except Exception:
        print(f"{one.group}.{one.name} failed:", file=sys.stderr)
        traceback.print_exc()


if __name__ == "__main__":
    sys.exit(main())
