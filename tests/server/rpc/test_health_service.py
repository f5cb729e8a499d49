"""The health service returns the present state, and its streams are bounded."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from resumed_server.rpc import health_service as tested
from resumed_server.rpc.health_service import HealthService

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
REQUEST = HealthCheckRequest(service="shop")


class Context:
    """The part of a grpc.ServicerContext that the health service uses."""

    def __init__(self) -> None:
        self.active, self.code = True, grpc.StatusCode.OK

    def is_active(self) -> bool:
        return self.active

    def cancel(self) -> None:
        self.active = False

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested, "POLL_SECONDS", 0.0)


def test_a_check_returns_the_present_state() -> None:
    state = {"shop": True}
    health, context = HealthService({"shop": lambda: state["shop"]}), Context()
    assert health.Check(REQUEST, context).status == SERVING  # type: ignore[arg-type] # as much as is called
    state["shop"] = False
    assert health.Check(REQUEST, context).status == NOT_SERVING  # type: ignore[arg-type]
    health.Check(HealthCheckRequest(service="pay"), context)  # type: ignore[arg-type]
    assert context.code is grpc.StatusCode.NOT_FOUND


def test_a_stream_sends_changes_only() -> None:
    states = [True, True, False, False, True, False]
    health = HealthService({"shop": lambda: states.pop(0)})
    stream = health.Watch(REQUEST, Context())  # type: ignore[arg-type]
    assert [next(stream).status for _ in range(4)] == [SERVING, NOT_SERVING, SERVING, NOT_SERVING]
    assert not states


def test_a_draining_service_reports_not_serving_and_close_ends_the_streams() -> None:
    health = HealthService({"shop": lambda: True})
    stream = health.Watch(REQUEST, Context())  # type: ignore[arg-type]
    assert next(stream).status == SERVING
    health.drain()
    assert next(stream).status == NOT_SERVING
    assert health.Check(REQUEST, Context()).status == NOT_SERVING  # type: ignore[arg-type]
    health.close()
    assert list(stream) == []


def test_the_oldest_stream_is_cancelled_for_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """So clients that do not read their streams exclude no other client."""
    health = HealthService({"shop": lambda: True})
    contexts, streams = [Context() for _ in range(tested.MAX_STREAMS + 2)], list[Any]()
    for context in contexts:
        streams.append(health.Watch(REQUEST, context))  # type: ignore[arg-type]
        assert next(streams[-1]).status == SERVING
    assert [context.active for context in contexts] == [False, False] + [True] * tested.MAX_STREAMS
