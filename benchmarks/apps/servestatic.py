"""ServeStatic, as an ASGI app that knows its files from the start."""

from __future__ import annotations

import os
from typing import Any

from servestatic import ServeStaticASGI

from .plain import plain


def make() -> Any:
    """The app."""
    return ServeStaticASGI(plain, root=os.environ["BENCH_DIRECTORY"], prefix="static/uploads/")
