"""Tasks that a thread of their own repeats, and continues after a failure.

A task that a peer or the storage can block has a thread of its own, so that it blocks no other task. Its heartbeat
reports the time of its last step.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import structlog

from resumed_server.errors import OutsideFailure, exception_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RETRY_SECONDS = 1.0
"""Seconds from a failure to the next attempt."""

_log = structlog.get_logger()


def stop_all(tasks: Sequence[PeriodicTask], timeout: float) -> None:
    """Stop tasks together, within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    for task in tasks:
        task.stop(0.0)
    for task in tasks:
        task.stop(max(0.0, deadline - time.monotonic()))


class Heartbeat:
    """The time since the last step of a loop; `clock` returns monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()

    def beat(self) -> None:
        """Record a step."""
        self._last = self._clock()

    @property
    def age(self) -> float:
        """Seconds since the last step."""
        return self._clock() - self._last


class PeriodicTask:
    """Repeats `step`, which returns the seconds until the next one, in a thread between start() and stop().

    Args:
        name: The name of the thread.
        step: The work to repeat.
        failure: The log event for a step that fails; of consecutive failures only the first is logged.
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
        """Start the thread; it begins with a step."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds (None: without limit) for the step in progress; return whether it ended."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        pause = 0.0
        while not self._stopping.wait(pause):
            try:
                pause = self._step()
                self._failing = False
            except Exception as error:  # noqa: BLE001 - the task must continue until the process ends
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
            _log.error(self._failure, **exception_fields(error))
