"""The removals of ticket lineages that are in force, as the store's stream of removals has them."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_REMOVALS = 262_144
"""How many removals a frontend holds: about 30 MiB."""

_KEY_BYTES = 16  # of the 32 of a store key
_SWEEP_SECONDS = 60.0


class Removals:
    """Removed lineages until they end, by their store keys, and the time before which all are void. Thread-safe.

    Beyond MAX_REMOVALS it forgets all of them, and every lineage that was negotiated before is void: none of them
    resumes, which costs full handshakes only.

    Args:
        clock: Unix seconds.
        monotonic: Seconds that only go forward. No step of the clock ends a removal.
        most: How many removals are held.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        most: int = MAX_REMOVALS,
    ) -> None:
        self._clock, self._monotonic, self._most = clock, monotonic, most
        self._lock = threading.RLock()  # the garbage collector may end a connection within add()
        self._ends: dict[bytes, float] = {}
        self._swept_at = monotonic()
        self.void_before = 0.0
        """Lineages that were negotiated before this time, in Unix seconds, are void."""

    def __len__(self) -> int:
        """Return how many removals are held."""
        return len(self._ends)

    def __contains__(self, key: bytes) -> bool:
        """Return whether the lineage with a store key was removed."""
        return key[:_KEY_BYTES] in self._ends

    def add(self, key: bytes, ttl: float) -> bool:
        """Hold a removal for `ttl` seconds; return False if there was no room, and all lineages so far are void."""
        now = self._monotonic()
        with self._lock:
            if now - self._swept_at > _SWEEP_SECONDS or len(self._ends) >= self._most:
                self._ends = {each: end for each, end in self._ends.items() if end > now}
                self._swept_at = now
            if len(self._ends) >= self._most:
                self._ends = {}
                self.void_before = self._clock()
                return False
            shortened = key[:_KEY_BYTES]
            self._ends[shortened] = max(self._ends.get(shortened, 0.0), now + ttl)
            return True

    def purge(self, before: float) -> None:
        """Make all lineages void that were negotiated before a time in Unix seconds."""
        with self._lock:
            self.void_before = max(self.void_before, before)

    def after_fork_in_child(self) -> None:
        """Take a lock of its own: a thread of the parent may hold it."""
        self._lock = threading.RLock()
