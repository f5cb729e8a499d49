"""Stops asking a store that keeps failing, so that an outage costs handshakes nothing."""

from __future__ import annotations


class Breaker:
    """Opens after some failures in a row; a success closes it, which somebody else than a handshake has to try.

    Once closed by such a trial, a single failure opens it again. Races between threads may miscount by one, which does
    no harm.

    Args:
        failures: How many failures in a row open it.
    """

    def __init__(self, failures: int = 3) -> None:
        self._limit = failures
        self._failures = 0
        self.closed = True
        """Whether handshakes may ask the store."""
        self.answered = True
        """Whether the last call was answered, if there was any."""

    def failed(self) -> None:
        """Note that a call failed."""
        self._failures += 1
        self.answered = False
        if self._failures >= self._limit:
            self.closed = False

    def succeeded(self) -> None:
        """Note that a call was answered in time."""
        self._failures = 0 if self.closed else self._limit - 1
        self.closed = self.answered = True
