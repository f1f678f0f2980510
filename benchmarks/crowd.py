"""Many clients request the same file at once: `python -m benchmarks.crowd PORT PATH CLIENTS FILE`.

It prints as JSON how many clients got the bytes of FILE, how many did not, and the latencies in seconds.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from pathlib import Path

import uvloop


class Client(asyncio.Protocol):
    """One client. It compares each piece with the expected bytes and keeps none."""

    def __init__(self, request: bytes, expected: bytes) -> None:
        self.done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._request = request
        self._expected = expected
        self._head: bytes | None = b""
        self._at = 0
        self._right = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        """Compare a piece."""
        if self._head is not None:
            self._head += data
            head, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            self._right = head.startswith(b"HTTP/1.1 200")
            self._head = None
        self._right = self._right and self._expected.startswith(data, self._at)
        self._at += len(data)

    def connection_lost(self, _error: Exception | None) -> None:
        """Report whether all bytes were right."""
        self.done.set_result(self._right and self._at == len(self._expected))


async def crowd(port: int, path: str, clients: int, expected: bytes) -> dict[str, object]:
    """Start all clients at once; return their results."""
    loop = asyncio.get_running_loop()
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    started = time.monotonic()
    took: list[float] = []

    async def ask() -> bool:
        _, client = await loop.create_connection(lambda: Client(request, expected), "127.0.0.1", port)
        right = await client.done
        took.append(time.monotonic() - started)
        return right

    right = sum(
        result is True for result in await asyncio.gather(*(ask() for _ in range(clients)), return_exceptions=True)
    )
    return {"right": right, "wrong": clients - right, "seconds": sorted(took)}


if __name__ == "__main__":
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    port, path, clients, file = sys.argv[1:]
    print(json.dumps(uvloop.run(crowd(int(port), path, int(clients), Path(file).read_bytes()))))
