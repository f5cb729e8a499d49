"""A bounded number of places for what peers may hold open: the one who came first makes room for the next.

So peers that hold places and do nothing keep nobody out, and neither threads nor memory grow with them.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Places:
    """At most `most` places."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._taken: dict[object, Callable[[], object]] = {}

    @contextlib.contextmanager
    def taken(self, end: Callable[[], object]) -> Iterator[None]:
        """Take a place for as long as the context lasts; `end` ends it from another thread, and must not block."""
        place, oldest = object(), None
        with self._lock:
            if len(self._taken) >= self._most:
                oldest = self._taken.pop(next(iter(self._taken)))
            self._taken[place] = end
        try:
            if oldest:
                oldest()
            yield
        finally:
            with self._lock:
                self._taken.pop(place, None)
