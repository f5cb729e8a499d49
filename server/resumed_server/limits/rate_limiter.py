"""Rate limiting with the generic cell rate algorithm (GCRA, ITU-T I.371).

GCRA is a token bucket that stores one number: the theoretical arrival time (TAT), at which the bucket would be full
again. The processes of a server share the numbers. Without a lock, two processes that acquire at the same moment may
count one operation instead of two: a limit may allow slightly more, never less.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from resumed_server.limits.shared_slots import SharedSlots

if TYPE_CHECKING:
    from collections.abc import Callable

BURST_SECONDS = 1.0
"""The size of the bucket, in seconds of the rate. A call that begins within it is executed whole, however large."""


class RateTable:
    """The theoretical arrival times of all rate limiters, in memory that forked processes share.

    A slot whose theoretical arrival time lies in the past carries no state, and may be reused by another name.

    Args:
        clock: Monotonic seconds, the same for all processes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.slots = SharedSlots("d")
        (self.arrival_times,) = self.slots.columns

    def claim(self, name: int) -> int:
        """Return the slot of a name; assign one if it has none."""
        now = self.clock()
        return self.slots.claim(name, lambda slot: self.arrival_times[slot] <= now)


class RateLimiter:
    """Allows `per_second` operations per second to all limiters of the same `name`."""

    def __init__(self, table: RateTable, name: str, per_second: float) -> None:
        self._table, self._interval = table, 1 / per_second
        self._name = table.slots.hash_name(name)
        self._slot = 0

    def try_acquire(self, amount: int) -> float:
        """Acquire `amount` operations and return 0.0, or none and return the seconds until one is available."""
        table, slot = self._table, self._slot
        if table.slots.names[slot] != self._name:
            slot = self._slot = table.claim(self._name)
        now = table.clock()
        arrival_time: float = table.arrival_times[slot]
        if arrival_time < now:
            arrival_time = now
        elif arrival_time - now > BURST_SECONDS:
            return arrival_time - now - BURST_SECONDS
        table.arrival_times[slot] = arrival_time + amount * self._interval
        return 0.0

    def reserve(self, max_wait: float) -> float:
        """Acquire one operation, if necessary in advance; return the seconds until it is due, at most `max_wait`."""
        wait = self.try_acquire(1)
        if not wait:
            return 0.0
        times, slot = self._table.arrival_times, self._slot
        times[slot] = min(times[slot] + self._interval, self._table.clock() + BURST_SECONDS + max_wait)
        return min(wait, max_wait)
