"""Readiness and liveness of this process, for grpc.health.v1 and metrics."""

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
"""The health service that reports liveness. It does not depend on the engine: a restart does not repair the storage."""
PROBE_SECONDS = 1.0
"""Seconds between two probes of the engine."""
PATIENCE = 5.0
"""Duration of a probe in seconds after which the engine counts as not ready."""
STALLED_SECONDS = 30.0
"""Seconds without a heartbeat after which a loop counts as stalled."""

log = structlog.get_logger()


class Readiness:
    """Whether the engine responds; each change is one log line. `clock` is monotonic, in seconds.

    Attributes:
        broken: Whether the engine is damaged, so that this process can never use it again.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._failure: Exception | None = EngineUnavailable("not probed yet")
        self._probed_since: float | None = None
        self._reported: bool | None = None
        self.broken = False

    def probe(self) -> float:
        """Probe the engine once, in a thread that the engine may block; return the seconds until the next probe."""
        self._probed_since = self._clock()
        try:
            self._engine.probe()
        except Exception as error:  # noqa: BLE001 - any error means that this server cannot serve now
            self._failure = error
            self.broken = isinstance(error, EngineBroken)
        else:
            self._failure = None
        self._probed_since = None
        self._report(self._failure)
        return PROBE_SECONDS

    @property
    def ready(self) -> bool:
        """Whether the last probe succeeded, and no running probe is overdue."""
        return self._failure is None and not self._overdue

    def check_overdue(self) -> None:
        """Log a probe that is overdue."""
        if self._overdue:
            self._report(EngineUnavailable(f"the storage has not responded for {PATIENCE:.0f} s"))

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


def is_alive(heartbeats: Sequence[Heartbeat]) -> bool:
    """Return whether no loop is stalled."""
    return all(heartbeat.age < STALLED_SECONDS for heartbeat in heartbeats)
