"""ServeStatic, as an ASGI app that lists its files at the start."""

from __future__ import annotations

import os
from typing import Any

from servestatic import ServeStaticASGI

from .plain import plain


def make() -> Any:
    """Return the app."""
    return ServeStaticASGI(plain, root=os.environ["BENCH_DIRECTORY"], prefix="static/uploads/")
