"""Keeps calls out of an engine that is closed or broken, and knows when those under way are over."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from resumed_server.storage.engine import EngineBroken, EngineUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

CLOSED = "the store is closed"
PATIENCE = 5.0
"""Seconds that the calls under way have to end when an engine is closed."""


class CallGate:
    """A context manager that lets calls in until it is shut. Takes no lock while nobody wants to be alone()."""

    def __init__(self) -> None:
        self._running: deque[None] = deque()  # appends and pops in one step
        self._closed: str | None = None
        self._lock = threading.Lock()
        self._exclusive = False

    def __enter__(self) -> None:
        self._running.append(None)
        while self._closed or self._exclusive:
            self._running.pop()
            if self._closed:
                raise EngineBroken(self._closed)
            with self._lock:  # until whoever is alone is done
                self._running.append(None)

    def __exit__(self, *_: object) -> None:
        self._running.pop()

    def close(self, reason: str) -> str | None:
        """Refuse calls from now on, for `reason`; return why they were refused before. What is closed stays closed."""
        before = self._closed
        if before != CLOSED:
            self._closed = reason
        return before

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Let nobody in for as long as the context lasts, which begins when the calls under way are over.

        Raises:
            EngineUnavailable: They do not end.
            EngineBroken: The gate is shut.
        """
        with self._lock:
            self._exclusive = True
            try:
                if not self.wait_until_empty():
                    raise EngineUnavailable("a call does not end")
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
        """Wait for the calls that were let in, up to PATIENCE seconds; return whether they are over."""
        deadline = time.monotonic() + PATIENCE
        while self._running and time.monotonic() < deadline:
            time.sleep(0.001)
        return not self._running
