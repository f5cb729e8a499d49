"""The service grpc.health.v1.

A call reads the present state, and no other part of the server waits for a call. So a client that does not read its
stream delays only that stream.
"""
# ruff: noqa: N802 - the methods are named as in the contract

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer

from resumed_server.stream_limit import StreamLimit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from grpc_health.v1.health_pb2 import HealthCheckRequest

MAX_STREAMS = 64
"""Maximum number of Watch streams of a process; beyond it the oldest is cancelled."""
POLL_SECONDS = 0.2
"""Seconds between two checks of a stream for a changed state."""


class HealthService(HealthServicer):
    """Reports the health of `services`: for each name, a function that returns at once whether it serves."""

    def __init__(self, services: Mapping[str, Callable[[], bool]]) -> None:
        self._services = services
        self._streams = StreamLimit(MAX_STREAMS)
        self._draining, self._closed = False, threading.Event()

    def drain(self) -> None:
        """Report NOT_SERVING for each service from now on."""
        self._draining = True

    def close(self) -> None:
        """End all streams."""
        self._closed.set()

    def Check(self, request: HealthCheckRequest, context: grpc.ServicerContext) -> HealthCheckResponse:
        """Return the health of a service."""
        status = self._status(request.service)
        if status == HealthCheckResponse.SERVICE_UNKNOWN:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            return HealthCheckResponse()
        return HealthCheckResponse(status=status)

    def Watch(self, request: HealthCheckRequest, context: grpc.ServicerContext) -> Iterator[HealthCheckResponse]:
        """Stream the health of a service: now, and after each change."""
        sent = None
        with self._streams.admit(context.cancel):
            while context.is_active() and not self._closed.is_set():
                status = self._status(request.service)
                if status != sent:
                    sent = status
                    yield HealthCheckResponse(status=status)
                self._closed.wait(POLL_SECONDS)

    # A few threads more than streams, for those that are being cancelled.
    Watch.executor = ThreadPoolExecutor(MAX_STREAMS + 8, "health")  # type: ignore[attr-defined]

    def _status(self, service: str) -> HealthCheckResponse.ServingStatus.ValueType:
        serves = self._services.get(service)
        if serves is None:
            return HealthCheckResponse.SERVICE_UNKNOWN
        if self._draining or not serves():
            return HealthCheckResponse.NOT_SERVING
        return HealthCheckResponse.SERVING
