"""selfheal around the plain app."""

from __future__ import annotations

import os

from selfheal import SelfHealMiddleware, UploadStore

from . import hooks, plain


def make() -> SelfHealMiddleware:
    """Return the app, with the hooks that `BENCH_HOOKS` names."""
    hooks.install(os.environ.get("BENCH_HOOKS", ""))
    plain.state = hooks.COUNTS
    store = UploadStore(os.environ["BENCH_DIRECTORY"], os.environ["BENCH_DATABASE"])
    return SelfHealMiddleware(plain.plain, store, adopt=os.environ.get("BENCH_ADOPT") != "0")
