"""The static files of Starlette."""

from __future__ import annotations

import os

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles


def make() -> Starlette:
    """Return the app."""
    return Starlette(routes=[Mount("/static/uploads", StaticFiles(directory=os.environ["BENCH_DIRECTORY"]))])
