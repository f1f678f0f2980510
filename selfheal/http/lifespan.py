"""Lifespan: something that opens and closes with an ASGI app."""

from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..events import logger

Hook = Callable[[], Awaitable[None]]


async def run_lifespan(app: ASGIApp, opens: Hook, closes: Hook, scope: Scope, receive: Receive, send: Send) -> None:
    """Run an app's lifespan, `opens` before it and `closes` after it; answer for an app without (Django)."""
    is_answered = False
    last: Message = {"type": ""}

    async def receive_and_note() -> Message:
        nonlocal last
        last = await receive()
        return last

    async def send_and_note(message: Message) -> None:
        nonlocal is_answered
        is_answered = True
        if message["type"].startswith("lifespan.shutdown."):
            await closes()
        await send(message)

    await _open_or_refuse(opens, receive, send)
    try:
        await app(scope, receive_and_note, send_and_note)
    except Exception:
        if is_answered:
            raise
        logger.debug("the wrapped app refuses lifespan", exc_info=True)
    finally:
        if is_answered:
            await closes()
    while not is_answered and last["type"] != "lifespan.shutdown":
        if last["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        last = await receive()
    if not is_answered:
        await closes()
        await send({"type": "lifespan.shutdown.complete"})


async def _open_or_refuse(opens: Hook, receive: Receive, send: Send) -> None:
    """Let the start of the server fail if `opens` does: without an answer it serves the app, but never starts it."""
    try:
        await opens()
    except Exception as error:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": str(error)})
        raise
