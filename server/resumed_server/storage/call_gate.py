"""Block calls to a closed or damaged engine, and wait for running calls."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from resumed_server.storage.engine import EngineBroken, EngineUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

CLOSED = "the storage engine is closed"
PATIENCE = 5.0
"""Maximum time, in seconds, to wait for running calls when an engine is closed."""


class CallGate:
    """A context manager that admits calls until it is closed. It takes no lock unless a thread is in exclusive()."""

    def __init__(self) -> None:
        self._running: deque[None] = deque()  # append and pop are atomic
        self._closed: str | None = None
        self._lock = threading.Lock()
        self._exclusive = False

    def __enter__(self) -> None:
        self._running.append(None)
        while self._closed or self._exclusive:
            self._running.pop()
            if self._closed:
                raise EngineBroken(self._closed)
            with self._lock:  # until the thread in exclusive() has finished
                self._running.append(None)

    def __exit__(self, *_: object) -> None:
        self._running.pop()

    def close(self, reason: str) -> str | None:
        """Reject later calls with `reason`, and return the previous reason, if any. CLOSED is never replaced."""
        before = self._closed
        if before != CLOSED:
            self._closed = reason
        return before

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait for running calls, and block new calls for the duration of the context.

        Raises:
            EngineUnavailable: The running calls do not end within PATIENCE.
            EngineBroken: The gate is closed.
        """
        with self._lock:
            self._exclusive = True
            try:
                if not self.wait_until_empty():
                    raise EngineUnavailable("a running call does not end")
                self._running.append(None)
                try:
                    if self._closed:
                        raise EngineBroken(self._closed)
                    yield
                finally:
                    self._running.pop()
            finally:
                self._exclusive = False

    def wait_until_empty(self) -> bool:
        """Wait for running calls, up to PATIENCE seconds; return whether all have ended."""
        deadline = time.monotonic() + PATIENCE
        while self._running and time.monotonic() < deadline:
            time.sleep(0.001)
        return not self._running
