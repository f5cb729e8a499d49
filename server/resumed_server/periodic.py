"""Work that a thread of its own repeats, and goes on with after whatever fails.

A loop that a peer or the storage can block has a thread of its own, so that it blocks no other one; a heartbeat shows
when it came round last.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import structlog

from resumed_server.errors import OutsideFailure, described

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RETRY_SECONDS = 1.0
"""Seconds from a failure to the next attempt."""

_log = structlog.get_logger()


def stop_all(loops: Sequence[Periodic], patience: float) -> None:
    """Stop loops together, within `patience` seconds."""
    deadline = time.monotonic() + patience
    for loop in loops:
        loop.stop(0.0)
    for loop in loops:
        loop.stop(max(0.0, deadline - time.monotonic()))


class Heartbeat:
    """When a loop came round last; `clock` counts seconds that only go forward."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()

    def beat(self) -> None:
        """Note that the loop came round."""
        self._last = self._clock()

    @property
    def age(self) -> float:
        """Seconds since then."""
        return self._clock() - self._last


class Periodic:
    """Repeats `step`, which returns the seconds to the next one, in a thread between start() and stop().

    Args:
        name: The name of the thread.
        step: What is repeated.
        failure: The log line for a step that fails; of failures in a row only the first is logged.
        retry: Seconds from a failure to the next attempt.

    Attributes:
        heartbeat: Beats after each step, whether or not it failed.
    """

    def __init__(self, name: str, step: Callable[[], float], failure: str, *, retry: float = RETRY_SECONDS) -> None:
        self._step, self._failure, self._retry = step, failure, retry
        self._failing = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.heartbeat = Heartbeat()

    def start(self) -> None:
        """Begin with the first step."""
        self._thread.start()

    def stop(self, patience: float | None = None) -> bool:
        """Wait up to `patience` seconds (None: as long as it takes) for the step under way; return whether it ended."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(patience)
        return not self._thread.is_alive()

    def _run(self) -> None:
        pause = 0.0
        while not self._stopping.wait(pause):
            try:
                pause = self._step()
                self._failing = False
            except Exception as error:  # noqa: BLE001 - a thread that ends here would be missed until the process ends
                self._report(error)
                pause = self._retry
            self.heartbeat.beat()

    def _report(self, error: Exception) -> None:
        if self._failing or self._stopping.is_set():
            return
        self._failing = True
        if isinstance(error, OutsideFailure):
            _log.warning(self._failure, cause=str(error))
        else:
            _log.error(self._failure, **described(error))
