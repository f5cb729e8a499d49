"""Rejections that are sent later, so that a client gains nothing by calling again at once."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from typing import TYPE_CHECKING, NoReturn

import structlog

from resumed_server.errors import exception_fields

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

MAX_DELAYED = 3_072
"""Maximum number of delayed rejections, below the maximum number of calls. Beyond it, the next one due is sent at once.

A rejection stays delayed even if its client has given up the call: as long as the call is open, gRPC's core rejects
further streams of the connection, at a fraction of the cost of a call that reaches Python.
"""

log = structlog.get_logger()


class DelayedRejection(BaseException):
    """A call is rejected after a delay.

    It is not an Exception: grpcio would end the call at once with the text of an Exception.

    Attributes:
        seconds: The delay.
        reject: Ends the call, given its context.
    """

    def __init__(self, seconds: float, reject: Callable[[grpc.ServicerContext], NoReturn]) -> None:
        super().__init__()
        self.seconds = seconds
        self.reject = reject


class DelayQueue:
    """Runs actions after a delay, in a thread that starts with the first action."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._actions: list[tuple[float, int, Callable[[], object]]] = []
        self._closed = False
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None

    def schedule(self, seconds: float, action: Callable[[], object]) -> None:
        """Run `action` in `seconds`. With MAX_DELAYED actions in the queue, run the next one due now."""
        with self._changed:
            heapq.heappush(self._actions, (time.monotonic() + seconds, next(self._numbers), action))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="delay-queue", daemon=True)
                self._thread.start()
            self._changed.notify()
            early = heapq.heappop(self._actions)[2] if len(self._actions) > MAX_DELAYED else None
        if early:
            _run_safely(early)

    def close(self) -> None:
        """End the thread, and drop the actions in the queue."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._actions or self._actions[0][0] > time.monotonic()):
                    self._changed.wait(self._actions[0][0] - time.monotonic() if self._actions else None)
                if self._closed:
                    return
                _, _, action = heapq.heappop(self._actions)
            _run_safely(action)


def _run_safely(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - without its thread the queue would stop
        log.critical("call failed", **exception_fields(error))
