"""The threads that answer calls.

grpcio hands every call to an executor and wants nothing back but to hear when it is over. `ThreadPoolExecutor` makes a
whole future of it, with a lock and a condition: about a tenth of what a call costs in all (docs/performance/server.md).
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

import structlog

from resumed_server.logs import described

if TYPE_CHECKING:
    from collections.abc import Callable

log = structlog.get_logger()


class CallPool(Executor):
    """Runs calls on a fixed number of threads, which do not keep the process from ending."""

    def __init__(self, threads: int) -> None:
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        for number in range(threads):
            threading.Thread(target=self._work, name=f"call-{number}", daemon=True).start()

    def submit(self, function: Callable[..., object], /, *arguments: Any) -> _Call:  # type: ignore[override] # no Future
        """Queue a call."""
        call = _Call(function, arguments)
        self._calls.put(call)
        return call

    def _work(self) -> None:
        while True:
            self._calls.get().run()


class _Call:
    """As much of a Future as grpcio uses."""

    __slots__ = ("_arguments", "_callbacks", "_done", "_function")

    def __init__(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._function = function
        self._arguments = arguments
        self._callbacks: list[Callable[[_Call], object]] = []
        self._done = False

    def run(self) -> None:
        try:
            self._function(*self._arguments)
        except BaseException as error:  # noqa: BLE001 - a thread that ends here would be missed for ever
            log.critical("call failed", **described(error))
        self._done = True
        self._tell()

    def add_done_callback(self, callback: Callable[[_Call], object]) -> None:
        self._callbacks.append(callback)
        if self._done:
            self._tell()

    def _tell(self) -> None:
        """Run what waits for the end; `pop` is atomic, so each runs once whoever comes here first."""
        while self._callbacks:
            try:
                callback = self._callbacks.pop()
            except IndexError:  # the other thread was faster
                return
            callback(self)
