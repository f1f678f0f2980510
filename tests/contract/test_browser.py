"""A real browser opens a hostile SVG: nothing of it runs or leaves the sandbox, and its embedded images are shown."""

from __future__ import annotations

import asyncio
import base64
import shutil
import struct
import zlib
from pathlib import Path

import uvicorn
from starlette.types import Receive, Scope, Send

from selfheal import UploadStore
from tests.support.middleware import PREFIX, put, wrapping
from tests.support.requirements import needs
from tests.support.sockets import free_port

SECONDS = 120.0


def red_pixel() -> str:
    """Return a picture as a `data:` URL."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0\xff\0\0")),
        (b"IEND", b""),
    )
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


SVG = f"""<svg xmlns="http://www.w3.org/2000/svg" width="200" height="200" onload="fetch('/ran')">
<style>@font-face {{font-family: x; src: url(data:font/woff2;base64,d09GMgABAAAAAA==)}} text {{font-family: x}}</style>
<script>fetch('/ran'); new Image().src = '/ran'</script>
<image href="{red_pixel()}" width="100" height="100"/><image href="/ran.png" width="50" height="50"/>
<text x="10" y="150">text</text></svg>"""


async def test_a_hostile_svg_in_a_browser(sqlite_store: UploadStore, tmp_path: Path) -> None:
    """No script runs and no other file is fetched, while `data:` images and fonts are loaded (CVE-2020-15275)."""
    chromium = shutil.which("chromium")
    if chromium is None:
        needs("chromium", "apt-get install chromium")
    await put(sqlite_store, "a.svg", SVG.encode())
    app, requested = wrapping(sqlite_store, True), list[str]()

    async def recording(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            requested.append(scope["path"])
        await app(scope, receive, send)

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(recording, port=port, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    arguments = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr")
    process = await asyncio.create_subprocess_exec(
        str(chromium), *arguments, f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=2000", "--dump-dom",
        f"http://127.0.0.1:{port}{PREFIX}/a.svg",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, logged = await asyncio.wait_for(process.communicate(), SECONDS)
    server.should_exit = True
    await serving
    messages = [line for line in logged.decode().splitlines() if "CONSOLE" in line]
    assert set(requested) - {"/favicon.ico"} == {f"{PREFIX}/a.svg"}
    assert any("Blocked script execution" in line for line in messages), logged.decode()
    refused = [line for line in messages if "violates" in line]
    assert refused, messages
    assert all("/ran.png" in line for line in refused), refused
