"""Bound the number of streams or connections that clients keep open.

The oldest one is cancelled for a new one. So idle clients cannot exclude others, and threads and memory stay bounded.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class StreamLimit:
    """Allows at most `maximum` streams."""

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._lock = threading.Lock()
        self._streams: dict[object, Callable[[], object]] = {}  # by age

    @contextlib.contextmanager
    def admit(self, cancel: Callable[[], object]) -> Iterator[None]:
        """Count a stream until the context ends; `cancel` ends it from another thread, and must not block."""
        stream, cancel_oldest = object(), None
        with self._lock:
            if len(self._streams) >= self._maximum:
                cancel_oldest = self._streams.pop(next(iter(self._streams)))
            self._streams[stream] = cancel
        try:
            if cancel_oldest:
                cancel_oldest()
            yield
        finally:
            with self._lock:
                self._streams.pop(stream, None)
