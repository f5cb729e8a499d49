"""The expiry sweeper: gives back the space of expired sessions, in small steps beside the traffic.

Nothing depends on its being quick: an expired session is a miss, swept or not. So it never takes much at a time, and
rests between steps for longer than they take.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from resumed_server.periodic import PeriodicTask

if TYPE_CHECKING:
    from resumed_server.storage.engine import Engine

STEP = 32
"""Entries to sweep at a time: about a millisecond of work, which is what a look-up may have to wait for."""
REST = 4.0
"""How many times as long as a step took the sweeper rests after it, while there is more to sweep."""
IDLE_SECONDS = 1.0
"""How long it sleeps when nothing has expired."""


class Sweeper(PeriodicTask):
    """Sweeps `engine` in a thread of its own between start() and stop().

    Attributes:
        swept: Entries swept so far.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__("sweeper", self._sweep, "sweeping failed", retry=IDLE_SECONDS)
        self._engine = engine
        self.swept = 0

    def _sweep(self) -> float:
        started = time.monotonic()
        swept = self._engine.sweep(STEP)
        self.swept += swept
        return IDLE_SECONDS if swept < STEP else REST * (time.monotonic() - started)
