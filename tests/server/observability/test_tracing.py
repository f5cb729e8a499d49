"""The attributes, parents and status of the server's spans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from resumed.v1 import admin_pb2
from resumed.v1 import session_store_pb2 as pb
from resumed_server.errors import UserError
from resumed_server.observability.tracing import Tracing
from resumed_server.preflight import verify_settings
from resumed_server.rpc.observer import NullObserver

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

SECRET = b"a key or a value"
ADDRESS: dict[str, Any] = {"namespace": "shop", "key": SECRET}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Context:
    """As much of a call's context as tracing needs."""

    def __init__(self, *metadata: tuple[str, str | bytes]) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> Any:
        return self._metadata


class Traced:
    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(provider.get_tracer("test"), NullObserver())

    def span(self) -> ReadableSpan:
        """Return the one span so far, which holds no secret."""
        (span,) = self._exporter.get_finished_spans()
        self._exporter.clear()
        assert SECRET.decode() not in span.to_json()
        return span

    def answered(self, request: Any, response: Any, *metadata: tuple[str, str | bytes]) -> ReadableSpan:
        """Record a call that succeeded after 2 seconds."""
        context: Any = Context(*metadata)
        self.tracing.on_success(type(request).__name__.removesuffix("Request"), 2.0, request, response, context)
        return self.span()

    def failed(self, request: Any, code: int) -> ReadableSpan:
        """Record a call that failed."""
        context: Any = Context()
        self.tracing.on_failure(type(request).__name__.removesuffix("Request"), code, 2.0, request, context)
        return self.span()


def test_a_span_says_what_became_of_the_call() -> None:
    traced = Traced()
    session = pb.StoredSession(value=SECRET)
    for request, response, outcome in (
        (pb.GetRequest(**ADDRESS), pb.GetResponse(session=session), "hit"),
        (pb.GetRequest(**ADDRESS), pb.GetResponse(), "miss"),
        (pb.TakeRequest(**ADDRESS), pb.TakeResponse(session=session), "hit"),
        (pb.PutRequest(value=SECRET, **ADDRESS), pb.PutResponse(), "stored"),
        (pb.RemoveRequest(**ADDRESS), pb.RemoveResponse(removed=True), "removed"),
        (pb.RemoveRequest(**ADDRESS), pb.RemoveResponse(), "unknown"),
        (admin_pb2.PurgeRequest(namespace="shop"), admin_pb2.PurgeResponse(), None),
    ):
        span = traced.answered(request, response)
        assert span.attributes
        assert span.attributes.get("resumed.outcome") == outcome
        assert span.attributes["resumed.namespace"] == "shop"
        assert span.attributes["rpc.response.status_code"] == "OK"
        assert span.status.status_code == StatusCode.UNSET
        assert span.start_time
        assert span.end_time
        assert span.end_time - span.start_time == 2e9


def test_a_batch_says_how_many_operations_and_which_namespace_if_it_is_one() -> None:
    traced = Traced()
    get = pb.BatchOperation(get=pb.GetRequest(**ADDRESS))
    other = pb.BatchOperation(take=pb.TakeRequest(namespace="other", key=SECRET))
    results = pb.BatchResponse(results=[pb.BatchResult(), pb.BatchResult()])
    for operations, namespace in (([get, get], "shop"), ([get, other], None), ([get, pb.BatchOperation()], None)):
        span = traced.answered(pb.BatchRequest(operations=operations), results)
        assert span.attributes
        assert span.attributes["resumed.operations"] == 2
        assert span.attributes.get("resumed.namespace") == namespace


@pytest.mark.parametrize(
    ("code", "name", "status"),
    [
        (14, "UNAVAILABLE", StatusCode.ERROR),
        (13, "INTERNAL", StatusCode.ERROR),
        (3, "INVALID_ARGUMENT", StatusCode.UNSET),
        (6, "ALREADY_EXISTS", StatusCode.UNSET),
        (7, "PERMISSION_DENIED", StatusCode.UNSET),
    ],
)
def test_only_what_is_the_servers_fault_is_an_error(code: int, name: str, status: StatusCode) -> None:
    span = Traced().failed(pb.GetRequest(**ADDRESS), code)
    assert span.attributes
    assert span.attributes["rpc.response.status_code"] == name
    assert span.status.status_code == status


def test_the_caller_names_the_parent_and_nonsense_names_none() -> None:
    """The metadata is untrusted."""
    traced = Traced()
    request, response = pb.GetRequest(**ADDRESS), pb.GetResponse()
    child = traced.answered(request, response, ("user-agent", "test"), ("traceparent", PARENT))
    assert child.parent
    assert child.parent.span_id == 0xB7AD6B7169203331
    assert child.context
    assert child.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    for nonsense in ("", "00-0-0-0", PARENT * 100, "ff" + PARENT[2:], SECRET):
        assert traced.answered(request, response, ("traceparent", nonsense)).parent is None


def test_an_invalid_namespace_is_not_in_a_span() -> None:
    span = Traced().failed(pb.GetRequest(namespace="x" * 100_000, key=SECRET), 3)
    assert span.attributes
    assert "resumed.namespace" not in span.attributes


def test_without_the_extra_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resumed_server.preflight.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"^--otel: .*pip install 'resumed\[server,otel\]'$"):
        verify_settings(otel=True)
