"""The parts that the small ASGI apps of the server processes share."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send


async def answer_lifespan(receive: Receive, send: Send) -> None:
    """Do nothing at startup and at shutdown, and say so."""
    while (message := await receive())["type"] != "lifespan.shutdown":
        assert message["type"] == "lifespan.startup"
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


async def send_wrapped(scope: Scope, send: Send, status: int, body: bytes) -> None:
    """Send an answer with the header that marks it as the wrapped app's own."""
    headers = [(b"content-length", str(len(body)).encode()), (b"x-wrapped", b"yes")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
