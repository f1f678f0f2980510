"""Bulk runs over a PostgreSQL server that has room for few connections."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from tests.support.command_line import Site
from tests.support.held_connections import held_connections
from tests.support.records import fill_catalogue

NAMES = [f"folder{number % 7}/{number}.png" for number in range(200)]


@pytest.mark.parametrize(("held", "size"), [(1, "10"), (3, "2"), (4, "1")])
@pytest.mark.parametrize("jobs", ["1", "64"])
async def test_runs_with_few_connections(jobs: str, held: int, size: str, limited_url: str, site: Site) -> None:
    """A restore and a verify of 200 names end with 0 if 5 connections are allowed, and others have some of them."""
    await fill_catalogue(limited_url, site.directory, NAMES)
    run = partial(site.run_without_flags, env={"SELFHEAL_DATABASE_URL": limited_url, "SELFHEAL_POOL_SIZE": size})
    async with held_connections(limited_url, held):
        for command, outcome in (("restore", "restored"), ("verify", "ok")):
            done = await asyncio.to_thread(run, command, "--jobs", jobs, "--json")
            assert (done.code, done.err) == (0, "")
            assert done.json["counts"] == {outcome: len(NAMES)}
    assert len(list(site.directory.rglob("*.png"))) == len(NAMES)
