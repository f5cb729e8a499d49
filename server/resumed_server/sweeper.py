"""The expiry sweeper: gives back the space of expired sessions, in small steps beside the traffic.

Nothing depends on its being quick: an expired session is a miss, swept or not. So it never takes much at a time, and
rests between steps for longer than they take.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import structlog

from resumed_server.engines.base import EngineError

if TYPE_CHECKING:
    from resumed_server.engines.base import Engine

STEP = 32
"""Entries to sweep at a time: about a millisecond of work, which is what a look-up may have to wait for."""
REST = 4.0
"""How many times as long as a step took the sweeper rests after it, while there is more to sweep."""
IDLE_SECONDS = 1.0
"""How long it sleeps when nothing has expired."""

_log = structlog.get_logger()


class Sweeper:
    """Sweeps `engine` in a thread of its own between start() and stop().

    Attributes:
        swept: Entries swept so far.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.swept = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        """Begin to sweep."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the step under way."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        failing = False
        pause = 0.0
        while not self._stopping.wait(pause):
            started = time.monotonic()
            try:
                swept = self._engine.sweep(STEP)
                self.swept += swept
                failing = False
            except EngineError as error:
                if not failing:  # once per outage
                    _log.warning("sweeping failed", cause=str(error))
                failing, swept = True, 0
            pause = IDLE_SECONDS if swept < STEP else REST * (time.monotonic() - started)
