"""TCP proxies on loopback that forward bytes, or fail in the way that a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Literal, Self

Mode = Literal["pass", "stall", "cut", "refuse"]


class Proxy:
    """A proxy for a port of this machine: `async with Proxy(server.port) as proxy`, then connect to `proxy.port`.

    | `await proxy.set_mode(…)` | what happens |
    |---|---|
    | `"pass"` | bytes are forwarded; those that a stall held back are forwarded now |
    | `"stall"` | a black hole: connections are accepted, but no byte is forwarded in either direction |
    | `"cut"` | open connections are reset, and new ones as soon as they are accepted |
    | `"refuse"` | open connections are reset, and new ones are refused |
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.mode: Mode = "pass"
        self.accepted = 0
        """The number of connections that were accepted so far."""
        self._reserved = _bound(0)  # never listens, but no other process gets the port while the proxy refuses
        self.port = int(self._reserved.getsockname()[1])
        self._server: asyncio.Server | None = None
        self._passing = asyncio.Event()
        self._links: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.set_mode("pass")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.set_mode("refuse")
        self._reserved.close()

    @property
    def open_links(self) -> int:
        """The number of open connections."""
        return len(self._links)

    async def set_mode(self, mode: Mode) -> None:
        """Fail in this way from now on, or with `"pass"` no longer."""
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
            pumps = [
                asyncio.ensure_future(self._pump(reader, server_writer)),
                asyncio.ensure_future(self._pump(server_reader, writer)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
            await _close(writer)
            await _close(server_writer)
        except OSError:
            pass  # the server is down, so its client gets a reset
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


class CommitAnswerProxy:
    """A proxy for PostgreSQL. While `is_active`, it forwards a COMMIT and then breaks the connection."""

    def __init__(self, target: int) -> None:
        self.is_active = False
        self.lost_answers = 0
        self._target = target

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
        answers = asyncio.create_task(self._forward_answers(server_reader, writer))
        with contextlib.suppress(OSError):
            while piece := await reader.read(65536):
                if self.is_active and b"COMMIT" in piece:
                    answers.cancel()
                    await asyncio.gather(answers, return_exceptions=True)
                    server_writer.write(piece)
                    await server_reader.read(65536)  # the server has committed
                    self.lost_answers += 1
                    break
                server_writer.write(piece)
                await server_writer.drain()
        answers.cancel()
        await asyncio.gather(answers, return_exceptions=True)
        for end in (writer, server_writer):
            end.transport.abort()

    async def _forward_answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
        writer.close()  # the server has closed its end


def _bound(port: int) -> socket.socket:
    """Return a socket bound to a port of loopback; Linux allows several of them if only one listens."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", port))
    return held


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, as a machine does that does not know the connection."""
    end = writer.get_extra_info("socket")
    if end is not None:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
