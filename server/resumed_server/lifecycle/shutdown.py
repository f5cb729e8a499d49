"""How a server stops: callers are sent away first, then the calls in flight finish."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from resumed_server.rpc.health_service import HealthService
    from resumed_server.rpc.native_server import NativeServer
    from resumed_server.watch.hub import WatchHub

GRACE = 5.0
"""Seconds that calls in flight get to finish after the shutdown delay."""

log = structlog.get_logger()


def drain(
    server: grpc.Server | NativeServer,
    health: HealthService,
    watchers: WatchHub,
    delay: float,
    hurried: Callable[[float], bool],
) -> None:
    """Send callers away, then let the calls in flight finish; `hurried` waits and says whether to end it at once."""
    log.info("draining", seconds=float(delay))
    health.drain()
    hurry = hurried(delay)
    watchers.close()
    health.close()
    if hurry:
        server.stop(None)
        return
    stopped = server.stop(GRACE)
    while not stopped.is_set():
        if hurried(0.02):
            server.stop(None)


def slept(seconds: float) -> bool:
    """Wait, and never hurry."""
    time.sleep(seconds)
    return False
