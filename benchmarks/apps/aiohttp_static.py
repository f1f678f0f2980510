"""The static files of aiohttp, on its own server: `python -m benchmarks.apps.aiohttp_static PORT`."""

from __future__ import annotations

import os
import sys

import uvloop
from aiohttp import web

if __name__ == "__main__":
    uvloop.install()
    app = web.Application()
    app.router.add_static("/static/uploads", os.environ["BENCH_DIRECTORY"])
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
