"""Executors for the batches of a bulk run: this process, or a pool of forked processes.

Threads share one interpreter lock: two of them took twice the processor time of one, and saved a tenth.

Not `concurrent.futures.ProcessPoolExecutor`: its workers share one pipe for results, which the parent keeps open for
writing. A worker that is killed while it writes a result leaves the parent in `read` for good (CPython issue 87971).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol, Self, TypeVar

from ..aio.threads import Threads
from ..content.byte_counter import BYTES_READ
from ..disk import syscalls
from ..errors import SelfHealError

R = TypeVar("R")
CANCEL = signal.SIGTERM  # cancels the call that a worker runs
AsyncFunction = Callable[..., Coroutine[Any, Any, R]]


class Executor(Protocol):
    """Runs async functions, and passes a resource as their first argument. They must be functions of a module."""

    @property
    def worker_count(self) -> int:
        """Return the number of processes that run functions."""

    @property
    def max_pending(self) -> int:
        """Return how many calls to start before the first one ends, so that no worker is idle while one is slow."""

    async def run(self, function: AsyncFunction[R], /, *args: Any, **kwargs: Any) -> R:
        """Return, or raise, what `function(resource, *args, **kwargs)` does."""


class InlineExecutor:
    """Runs functions in this process, with `resource`, for example a store."""

    worker_count = 1
    max_pending = 3

    def __init__(self, resource: Any) -> None:
        self._resource = resource

    async def run(self, function: AsyncFunction[R], /, *args: Any, **kwargs: Any) -> R:
        """Await `function(resource, *args, **kwargs)`."""
        try:
            return await function(self._resource, *args, **kwargs)
        finally:
            BYTES_READ.clear()


class ProcessPool:
    """Runs functions in `worker_count` processes, each with a resource of its own from `make_resource`. Make it in the
    main thread before other threads, event loops or connections: it forks. The workers end when this process does.
    """

    def __init__(self, make_resource: Callable[[], Any], worker_count: int) -> None:
        self.worker_count = worker_count
        self.max_pending = 4 * worker_count
        self._threads = Threads(worker_count)
        BYTES_READ.share(worker_count)
        self._workers: list[_Worker] = []
        self._idle: asyncio.Queue[_Worker] | None = None
        # A KeyboardInterrupt inside `fork` is lost, and with it a lock: that of `logging`. Workers keep SIGINT blocked:
        # Ctrl-C interrupts the whole process group, and the parent cancels the calls that have begun.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(worker_count):
                self._workers.append(_Worker(make_resource, self._workers))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def run(self, function: AsyncFunction[R], /, *args: Any, **kwargs: Any) -> R:
        """Run `function` in the next idle worker, and cancel it there if the caller is cancelled.

        Raises `SelfHealError` if that process is killed meanwhile.
        """
        if self._idle is None:
            self._idle = asyncio.Queue()
            for worker in self._workers:
                self._idle.put_nowait(worker)
        worker = await self._idle.get()
        call = asyncio.ensure_future(self._threads.run(worker.call, function, args, kwargs))
        try:
            value, error = await asyncio.shield(call)
        except asyncio.CancelledError:
            worker.cancel()
            await asyncio.gather(call, return_exceptions=True)
            raise
        finally:
            self._idle.put_nowait(worker)
        if error is not None:
            raise error
        result: R = value
        return result

    def close(self) -> None:
        """Wait until every worker has ended its call and closed its resource."""
        for worker in self._workers:
            worker.close()
        self._threads.close()


class _Worker:
    """A worker process, seen from the parent."""

    def __init__(self, make_resource: Callable[[], Any], earlier: Iterable[_Worker]) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, child_end = context.Pipe()
        parent_ends = [*(worker._pipe for worker in earlier), self._pipe]
        args = (child_end, parent_ends, make_resource)
        self._process = context.Process(target=_worker_main, args=args, daemon=True)
        self._process.start()
        child_end.close()

    def call(self, *call: Any) -> Any:
        try:
            self._pipe.send(call)
            return self._pipe.recv()
        except (EOFError, OSError) as error:  # OSError: it was killed in the middle of a message
            raise SelfHealError("a process of this run was killed; run it again, it goes on from there") from error

    def cancel(self) -> None:
        if self._process.pid is not None:
            os.kill(self._process.pid, CANCEL)

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def available_cpus() -> int:
    """Return how many processes can run at the same time; 1 where forking is not safe (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _worker_main(pipe: Connection, parent_ends: Sequence[Connection], make_resource: Callable[[], Any]) -> None:
    syscalls.end_with_parent()
    BYTES_READ.choose(len(parent_ends) - 1)
    for end in parent_ends:
        end.close()  # an inherited copy would keep `recv` from seeing that the parent closed the pipe
    with asyncio.Runner() as runner:  # one event loop for all calls: connections live on in it
        resource = runner.run(_make(make_resource))
        with suppress(EOFError, OSError):
            while True:
                pipe.send_bytes(pickle.dumps(runner.run(_call(resource, *pipe.recv()))))
        runner.run(resource.close())


async def _make(make_resource: Callable[[], Any]) -> Any:
    return make_resource()


async def _call(
    resource: Any, function: AsyncFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Exception | None]:
    task = asyncio.ensure_future(function(resource, *args, **kwargs))
    asyncio.get_running_loop().add_signal_handler(CANCEL, task.cancel)
    try:
        return await task, None
    except asyncio.CancelledError:
        return None, SelfHealError("a process of this run was stopped; run it again, it goes on from there")
    except (SelfHealError, OSError) as error:
        return None, error
    finally:
        BYTES_READ.clear()
