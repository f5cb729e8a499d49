"""Refusals that leave later."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from typing import TYPE_CHECKING, NoReturn

import structlog

from resumed_server.errors import described

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

MAX_DELAYED = 3_072
"""Refusals that are held back at the same time; beyond that the next one leaves. Fewer than a server has calls.

They are held even if their clients have given up: until then gRPC's core refuses further streams of the connection, at
a small part of what a call costs that gets here.
"""

log = structlog.get_logger()


class DelayedRejection(BaseException):
    """A call is refused, but only later, so that whoever makes calls regardless is not answered as fast as they ask.

    It is no Exception: grpcio would answer those.

    Attributes:
        seconds: When.
        refuse: Aborts the call, given its context.
    """

    def __init__(self, seconds: float, refuse: Callable[[grpc.ServicerContext], NoReturn]) -> None:
        super().__init__()
        self.seconds = seconds
        self.refuse = refuse


class DelayQueue:
    """Does things after a while, in a thread of its own that starts with the first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._todo: list[tuple[float, int, Callable[[], object]]] = []
        self._closed = False
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None

    def schedule(self, seconds: float, action: Callable[[], object]) -> None:
        """Do `action` in `seconds`. If there is too much to do, what is to be done next is done now."""
        with self._changed:
            heapq.heappush(self._todo, (self._clock() + seconds, next(self._numbers), action))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="later", daemon=True)
                self._thread.start()
            self._changed.notify()
            early = heapq.heappop(self._todo)[2] if len(self._todo) > MAX_DELAYED else None
        if early:
            run_safely(early)

    def close(self) -> None:
        """End the thread; what is still to be done is not."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._todo or self._todo[0][0] > self._clock()):
                    self._changed.wait(self._todo[0][0] - self._clock() if self._todo else None)
                if self._closed:
                    return
                _, _, action = heapq.heappop(self._todo)
            run_safely(action)


def run_safely(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - a thread that ends here would be missed for ever
        log.critical("call failed", **described(error))
