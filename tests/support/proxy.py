"""A TCP proxy on loopback that passes bytes on, or fails in the way that a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Literal, Self

Mode = Literal["pass", "stall", "cut", "refuse"]


class Proxy:
    """Stands before a port of this machine: `async with Proxy(server.port) as proxy`, then connect to `proxy.port`.

    | `await proxy.turn(…)` | what happens |
    |---|---|
    | `"pass"` | bytes go through; those that a stall held back come now |
    | `"stall"` | a black hole: connections are taken, but no byte goes either way |
    | `"cut"` | open connections are reset, and new ones as soon as they are made |
    | `"refuse"` | open connections are reset, and nobody listens |
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.mode: Mode = "pass"
        self.accepted = 0
        """Connections that were ever taken: whether anybody tried to ask at all."""
        self._reserved = _bound(0)  # never listens: nobody else gets the port while we refuse
        self.port = int(self._reserved.getsockname()[1])
        self._server: asyncio.Server | None = None
        self._passing = asyncio.Event()
        self._links: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.turn("pass")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.turn("refuse")
        self._reserved.close()

    @property
    def open_links(self) -> int:
        """How many connections are open now."""
        return len(self._links)

    async def turn(self, mode: Mode) -> None:
        """Fail in this way from now on, or (`"pass"`) no longer."""
        self.mode = mode
        if mode == "pass":
            self._passing.set()
        else:
            self._passing.clear()
        if mode == "refuse":
            await self._stop_listening()
        elif self._server is None:
            self._server = await asyncio.start_server(self._accept, sock=_bound(self.port))
        if mode in ("cut", "refuse"):
            await self._reset_links()

    async def _stop_listening(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def _reset_links(self) -> None:
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self.mode in ("cut", "refuse"):
            _reset(writer)
            return
        link = asyncio.get_running_loop().create_task(self._link(reader, writer))
        self._links.add(link)
        link.add_done_callback(self._links.discard)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_writer: asyncio.StreamWriter | None = None
        try:
            await self._passing.wait()
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target)
            ways = [
                asyncio.ensure_future(self._pump(reader, server_writer)),
                asyncio.ensure_future(self._pump(server_reader, writer)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
            await _close(writer)
            await _close(server_writer)
        except OSError:
            pass  # the server behind us is down: its client sees a reset
        finally:
            for end in (writer, server_writer):
                if end is not None and not end.is_closing():
                    _reset(end)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            piece = await reader.read(65536)
            await self._passing.wait()
            if not piece:
                return
            writer.write(piece)
            await writer.drain()


def _bound(port: int) -> socket.socket:
    """A socket that holds a port of loopback; on Linux several may, as long as only one of them listens."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", port))
    return held


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, as a machine that has forgotten the connection does."""
    end = writer.get_extra_info("socket")
    if end is not None:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
