"""Who does the work of a bulk run: this process alone, or several, each with an interpreter and a tool of its own.

Threads take turns at one interpreter's lock: two of them took twice the processor time of one, and saved a tenth.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol, Self, TypeVar

from ..aio.threads import Threads
from ..disk import syscalls
from ..errors import SelfHealError


class Tool(Protocol):
    """What a piece of work is done with."""

    async def close(self) -> None:
        """Let go of what it holds."""


R = TypeVar("R")
Work = Callable[..., Coroutine[Any, Any, R]]


class Workers(Protocol):
    """They are given pieces of work: functions of a module, which are called with the tool before their arguments."""

    @property
    def count(self) -> int:
        """How many there are."""

    @property
    def at_once(self) -> int:
        """How many pieces to give them before the first is done, so that nobody is idle behind one that takes long."""

    async def run(self, work: Work[R], /, *args: Any, **kwargs: Any) -> R:
        """Do one piece of work; returns, or raises, what it does."""


class Alone:
    """This process does everything, with this `tool`."""

    count = 1
    at_once = 3

    def __init__(self, tool: Tool) -> None:
        self._tool = tool

    async def run(self, work: Work[R], /, *args: Any, **kwargs: Any) -> R:
        """Do it here."""
        return await work(self._tool, *args, **kwargs)


class Processes:
    """So many processes, forked here and now: make them before there are threads, event loops or connections.

    Each works with the tool that `make` gives it. They end at `close`, and whenever this process does.
    """

    def __init__(self, make: Callable[[], Tool], count: int) -> None:
        self.count = count
        self.at_once = 4 * count
        self._threads = Threads(count)
        self._members: list[_Member] = []
        for _ in range(count):
            self._members.append(_Member(make, self._members))
        self._idle: asyncio.Queue[_Member] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def run(self, work: Work[R], /, *args: Any, **kwargs: Any) -> R:
        """Let the next one that is idle do it. Raises `SelfHealError` if that process dies of it."""
        if self._idle is None:
            self._idle = asyncio.Queue()
            for member in self._members:
                self._idle.put_nowait(member)
        member = await self._idle.get()
        try:
            done, error = await self._threads.run(member.ask, (work, args, kwargs))
        finally:
            self._idle.put_nowait(member)
        if error is not None:
            raise error
        result: R = done
        return result

    def close(self) -> None:
        """Let each of them end what it is at, and wait for that."""
        for member in self._members:
            member.close()
        self._threads.close()


class _Member:
    """One process, and the way to it."""

    def __init__(self, make: Callable[[], Tool], before: Iterable[_Member]) -> None:
        context = multiprocessing.get_context("fork")
        self._way, its_end = context.Pipe()
        not_its = [*(member._way for member in before), self._way]  # else it would never see that they are closed
        self._process = context.Process(target=_serve, args=(its_end, not_its, make), daemon=True)
        self._process.start()
        its_end.close()

    def ask(self, piece: tuple[Any, ...]) -> Any:
        try:
            self._way.send(piece)
            return self._way.recv()
        except (EOFError, ConnectionError) as error:
            raise SelfHealError("a process of this run was killed; run it again, it goes on from there") from error

    def close(self) -> None:
        self._way.close()
        self._process.join()


def processors() -> int:
    """How many processes can be at work at once; 1 where a process cannot be forked safely (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _serve(way: Connection, others: Iterable[Connection], make: Callable[[], Tool]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells all; who gave the work waits for its end
    syscalls.end_with_parent()
    for other in others:
        other.close()
    tool = make()
    with asyncio.Runner() as runner:
        with suppress(EOFError, ConnectionError):
            while True:
                way.send_bytes(pickle.dumps(runner.run(_outcome(tool, *way.recv()))))
        runner.run(tool.close())


async def _outcome(
    tool: Tool, work: Callable[..., Coroutine[Any, Any, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Exception | None]:
    try:
        return await work(tool, *args, **kwargs), None
    except (SelfHealError, OSError) as error:
        return None, error
