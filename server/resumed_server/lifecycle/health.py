"""Whether this process can serve, and whether it lives: what health and metrics report."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog

from resumed_server.rpc.status import log_fields
from resumed_server.storage.engine import EngineBroken, EngineUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from resumed_server.periodic import Heartbeat
    from resumed_server.storage.engine import Engine

LIVENESS = "live"
"""The service of health that says whether the process lives, whatever the engine does: a restart mends no storage."""
PROBE_SECONDS = 1.0
"""Seconds from one probe of the engine to the next."""
PATIENCE = 5.0
"""Seconds that a probe may take before the engine counts as not ready."""
STALLED_SECONDS = 30.0
"""Seconds after which a loop that has not come round counts as stalled."""

log = structlog.get_logger()


class Readiness:
    """Whether the engine answers; one log line per change. `clock` counts seconds that only go forward.

    Attributes:
        broken: Whether the engine never will be ready again.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._failure: Exception | None = EngineUnavailable("not probed yet")
        self._probed_since: float | None = None
        self._reported: bool | None = None
        self.broken = False

    def probe(self) -> float:
        """Ask the engine once, in a thread that it may block; return the seconds until it is to be asked again."""
        self._probed_since = self._clock()
        try:
            self._engine.probe()
        except Exception as error:  # noqa: BLE001 - whatever it is, this server cannot serve now
            self._failure = error
            self.broken = isinstance(error, EngineBroken)
        else:
            self._failure = None
        self._probed_since = None
        self._report(self._failure)
        return PROBE_SECONDS

    @property
    def ready(self) -> bool:
        """Whether the engine answered when it was asked last, and does not take too long just now."""
        return self._failure is None and not self._overdue

    def follow(self) -> None:
        """Report a probe that takes too long."""
        if self._overdue:
            self._report(EngineUnavailable(f"the storage has not answered for {PATIENCE:.0f} s"))

    @property
    def _overdue(self) -> bool:
        since = self._probed_since
        return since is not None and self._clock() - since > PATIENCE

    def _report(self, failure: Exception | None) -> None:
        ready = failure is None
        if ready is not self._reported:
            self._reported = ready
            if failure:
                log.warning("not ready", **log_fields(failure))
            else:
                log.info("ready")


def lives(heartbeats: Sequence[Heartbeat]) -> bool:
    """Return whether all loops have come round of late."""
    return all(heartbeat.age < STALLED_SECONDS for heartbeat in heartbeats)
