"""Keeps calls out of an engine that is closed or broken, and knows when those under way are over."""

from __future__ import annotations

import time
from collections import deque

from resumed_server.engines.base import EngineBroken

CLOSED = "the store is closed"
PATIENCE = 5.0
"""Seconds that the calls under way have to end when an engine is closed."""


class Gate:
    """A context manager that lets calls in until it is shut. Takes no lock."""

    def __init__(self) -> None:
        self._inside: deque[None] = deque()  # appends and pops in one step
        self._shut: str | None = None

    def __enter__(self) -> None:
        self._inside.append(None)
        if self._shut:
            self._inside.pop()
            raise EngineBroken(self._shut)

    def __exit__(self, *_: object) -> None:
        self._inside.pop()

    def shut(self, reason: str) -> str | None:
        """Refuse calls from now on, for `reason`; return why they were refused before. What is closed stays closed."""
        before = self._shut
        if before != CLOSED:
            self._shut = reason
        return before

    def wait_until_empty(self) -> bool:
        """Wait for the calls that were let in, up to PATIENCE seconds; return whether they are over."""
        deadline = time.monotonic() + PATIENCE
        while self._inside and time.monotonic() < deadline:
            time.sleep(0.001)
        return not self._inside
