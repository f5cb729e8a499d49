"""Periodic deletion of expired sessions, in small steps beside the traffic.

An expired session is a miss, swept or not, so nothing depends on the speed of the sweeper. Its steps are small, and its
pauses are longer than its steps.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from resumed_server.periodic import PeriodicTask

if TYPE_CHECKING:
    from resumed_server.storage.engine import Engine

BATCH_SIZE = 32
"""Entries per step: about a millisecond of work, for which a look-up may have to wait."""
PAUSE_FACTOR = 4.0
"""Pause after a step, as a multiple of its duration, while there are more entries to sweep."""
IDLE_SECONDS = 1.0
"""Pause, in seconds, when no entry has expired."""


class Sweeper(PeriodicTask):
    """Sweeps `engine` in a separate thread between start() and stop().

    Attributes:
        swept: Entries that were examined so far.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__("sweeper", self._sweep, "sweeping failed", retry=IDLE_SECONDS)
        self._engine = engine
        self.swept = 0

    def _sweep(self) -> float:
        started = time.monotonic()
        swept = self._engine.sweep(BATCH_SIZE)
        self.swept += swept
        return IDLE_SECONDS if swept < BATCH_SIZE else PAUSE_FACTOR * (time.monotonic() - started)
