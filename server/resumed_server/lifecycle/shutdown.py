"""Graceful shutdown: clients move away first, then the calls in flight finish."""

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

GRACE_SECONDS = 5.0
"""Time limit for the calls in flight, after the shutdown delay."""

log = structlog.get_logger()


def drain(
    server: grpc.Server | NativeServer,
    health: HealthService,
    hub: WatchHub,
    delay: float,
    wait_or_abort: Callable[[float], bool],
) -> None:
    """Report NOT_SERVING for `delay` seconds, then end the streams and let the calls in flight finish.

    `wait_or_abort` waits a number of seconds, and returns whether to stop at once instead.
    """
    log.info("draining", seconds=float(delay))
    health.drain()
    abort = wait_or_abort(delay)
    hub.close()
    health.close()
    if abort:
        server.stop(None)
        return
    stopped = server.stop(GRACE_SECONDS)
    while not stopped.is_set():
        if wait_or_abort(0.02):
            server.stop(None)


def sleep(seconds: float) -> bool:
    """Wait, and never abort."""
    time.sleep(seconds)
    return False
