"""Circuit breaker: no calls to a store that keeps failing, so that an outage costs handshakes nothing.

A store that rejects a call because of a limit does not fail: it is called less often. While that lasts, operations are
*scarce*: sessions that are stored already get them, since a Get of one that is not stored gains nothing (see
session_policy.py). So a namespace with 60 % of the operations that it needs resumes about 60 %, not none.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.05, 0.8
"""Seconds without calls to a store that has just rejected one because of a limit: exponential backoff, factor 2."""
_SCARCE_SECONDS = 5.0
"""How long after a refusal because of a limit operations count as scarce: each of many frontends sees few refusals."""
_FIRST_PROBE_DELAY, _LONGEST_PROBE_DELAY = 0.05, 0.5
"""Seconds between probes of a store that keeps failing: exponential backoff, factor 2."""
_RESET_AFTER = 10.0
"""Seconds after which the delay of probes begins at its first value again."""


class Breaker:
    """Opens after some failures in a row; a success closes it, of a probe (prober.py), not of a handshake.

    Calls that were under way together count as one failure: a machine that stands still for a moment makes all of them
    late. Once closed by a trial, a single failure opens it again. Races between threads may miscount by one, which does
    no harm.

    Args:
        failures: How many failures in a row open it.
        clock: Seconds that only go forward.
    """

    def __init__(self, failures: int = 3, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self.now = clock
        """Returns the time, for failed()."""
        self._backoff = 0.0
        self._backoff_since = float("-inf")
        self._limited_at = float("-inf")
        self._failures = 0
        self._failed_at = float("-inf")
        self._probe_delay, self._opened = 0.0, float("-inf")
        self.closed = True
        """Whether handshakes may call the store."""
        self.last_call_succeeded = True
        """Whether the last call was carried out, if there was any."""

    @property
    def rate_limited(self) -> bool:
        """Whether the store refused a call a moment ago because of a limit."""
        return self.now() < self._backoff_since + self._backoff

    @property
    def scarce(self) -> bool:
        """Whether the store refused a call because of a limit in the last seconds."""
        return self.now() - self._limited_at < _SCARCE_SECONDS

    def failed(self, began: float, *, late: bool = False) -> None:
        """Note that a call failed that began at a time of now().

        Args:
            began: When it began.
            late: Whether it was not answered in time. While operations are scarce that is no failure: a server delays
                rejections if it rejects much.
        """
        self.last_call_succeeded = False
        if late and self.scarce:
            self._back_off(began)
            return
        if began < self._failed_at:
            return
        self._failures += 1
        self._failed_at = self.now()
        if self.closed and self._failures >= self._limit:
            self.closed = False
            if self._failed_at - self._opened > _RESET_AFTER:
                self._probe_delay = 0.0
            self._opened = self._failed_at

    def next_probe_delay(self) -> float:
        """Return how many seconds from now the store is to be tried again."""
        self._probe_delay = min(max(2 * self._probe_delay, _FIRST_PROBE_DELAY), _LONGEST_PROBE_DELAY)
        return self._probe_delay

    def record_rate_limited(self, began: float | None = None) -> None:
        """Note that a call was refused because of a limit, so that none is made for a while.

        Args:
            began: When it began. Of calls that were under way together, one lengthens the pause.
        """
        self._reached()
        self.last_call_succeeded = False
        self._limited_at = self.now()
        self._back_off(began)

    def succeeded(self) -> None:
        """Note that a call was carried out in time."""
        self._reached()
        self.last_call_succeeded = True
        self._backoff, self._backoff_since = 0.0, float("-inf")

    def _reached(self) -> None:
        """Note that a call was answered in time, so that the store is not down."""
        self._failures = 0 if self.closed else self._limit - 1
        self.closed = True

    def _back_off(self, began: float | None) -> None:
        """Back off from now on, twice as long as the last time."""
        if began is None or began >= self._backoff_since:
            self._backoff = min(max(2 * self._backoff, _FIRST_BACKOFF), _LONGEST_BACKOFF)
            self._backoff_since = self.now()
