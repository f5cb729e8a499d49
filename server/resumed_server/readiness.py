"""What health tells of a server: that it lives, and whether its engine answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
from grpc_health.v1.health import OVERALL_HEALTH
from grpc_health.v1.health_pb2 import HealthCheckResponse

from resumed_server.engines.base import EngineBroken
from resumed_server.errors import cause_of
from resumed_server.service import SERVICE_NAME

if TYPE_CHECKING:
    from grpc_health.v1.health import HealthServicer

    from resumed_server.engines.base import Engine

LIVENESS = "live"
"""The name by which health says that the process serves, whatever the engine does: a restart would not mend that."""

log = structlog.get_logger()


class Readiness:
    """Makes health say whether the engine answers; one log line per change."""

    def __init__(self, health: HealthServicer) -> None:
        self._health = health
        self._ready: bool | None = None  # nobody knows
        self._set(HealthCheckResponse.NOT_SERVING)
        health.set(LIVENESS, HealthCheckResponse.SERVING)

    def follow(self, engine: Engine) -> bool:
        """Ask the engine once; return False if it never will be ready again."""
        try:
            engine.probe()
        except Exception as error:  # noqa: BLE001 - whatever it is, this server cannot serve now
            if self._ready is not False:
                log.warning("not ready", **cause_of(error))
            self._ready = False
            self._set(HealthCheckResponse.NOT_SERVING)
            return not isinstance(error, EngineBroken)
        else:
            if not self._ready:
                log.info("ready")
            self._ready = True
            self._set(HealthCheckResponse.SERVING)
            return True

    @property
    def ready(self) -> bool:
        """Whether the engine answered when it was asked last."""
        return bool(self._ready)

    def _set(self, status: int) -> None:
        for name in (OVERALL_HEALTH, SERVICE_NAME):
            self._health.set(name, status)
