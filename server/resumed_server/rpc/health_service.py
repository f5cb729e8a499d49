"""The service grpc.health.v1: a call reads the present state, and nothing ever waits for a call.

So a peer that does not read its stream holds up that stream alone, and the loops of the server know nothing of it.
"""
# ruff: noqa: N802 - the methods are named as in the contract

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer

from resumed_server.places import Places

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from grpc_health.v1.health_pb2 import HealthCheckRequest

MAX_STREAMS = 64
"""Watch streams of a process; beyond that the oldest is ended."""
POLL_SECONDS = 0.2
"""How often a stream looks whether the state has changed."""


class HealthService(HealthServicer):
    """Answers for `services`: by name, how to find out whether it serves, without waiting for anything."""

    def __init__(self, services: Mapping[str, Callable[[], bool]]) -> None:
        self._services = services
        self._places = Places(MAX_STREAMS)
        self._draining, self._closed = False, threading.Event()

    def drain(self) -> None:
        """Answer from now on that nothing serves."""
        self._draining = True

    def close(self) -> None:
        """End all streams."""
        self._closed.set()

    def Check(self, request: HealthCheckRequest, context: grpc.ServicerContext) -> HealthCheckResponse:
        """Return how a service is."""
        status = self._status(request.service)
        if status == HealthCheckResponse.SERVICE_UNKNOWN:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            return HealthCheckResponse()
        return HealthCheckResponse(status=status)

    def Watch(self, request: HealthCheckRequest, context: grpc.ServicerContext) -> Iterator[HealthCheckResponse]:
        """Stream how a service is, now and whenever that changes."""
        sent = None
        with self._places.taken(context.cancel):
            while context.is_active() and not self._closed.is_set():
                status = self._status(request.service)
                if status != sent:
                    sent = status
                    yield HealthCheckResponse(status=status)
                self._closed.wait(POLL_SECONDS)

    # Some more than there are places, for those that are just being ended.
    Watch.threads = ThreadPoolExecutor(MAX_STREAMS + 8, "health")  # type: ignore[attr-defined]

    def _status(self, service: str) -> HealthCheckResponse.ServingStatus.ValueType:
        serves = self._services.get(service)
        if serves is None:
            return HealthCheckResponse.SERVICE_UNKNOWN
        if self._draining or not serves():
            return HealthCheckResponse.NOT_SERVING
        return HealthCheckResponse.SERVING
