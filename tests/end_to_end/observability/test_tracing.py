"""A trace begins in a frontend, continues in the server, and both export it."""

from __future__ import annotations

import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import resumed
from resumed._policy.served_names import Expected
from support.server import PATIENCE, running_server
from support.tls import VERSIONS, Client, Frontend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.proto.trace.v1.trace_pb2 import Span
    from opentelemetry.sdk.trace import ReadableSpan

    from support.server import RunningServer
    from support.tls import Stack

GET = "resumed.v1.SessionStoreService/Get"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """What OpenTelemetry's collector is to a server: it takes spans over OTLP."""

    def __init__(self) -> None:
        self.spans: queue.SimpleQueue[tuple[str, Span]] = queue.SimpleQueue()
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Export(self, request: Any, context: object) -> Any:  # noqa: N802
        for group in request.resource_spans:
            (service,) = (each.value.string_value for each in group.resource.attributes if each.key == "service.name")
            for scope in group.scope_spans:
                for span in scope.spans:
                    self.spans.put((service, span))
        return trace_service_pb2.ExportTraceServiceResponse()

    def span_of(self, trace_id: int) -> tuple[str, Span]:
        """Wait for the first span of a trace; return its service and itself."""
        while True:
            service, span = self.spans.get(timeout=PATIENCE)
            if int.from_bytes(span.trace_id, "big") == trace_id:
                return service, span

    def close(self) -> None:
        self._server.stop(None)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module", params=["grpcio", "native"])
def traced_store(request: pytest.FixtureRequest, collector: Collector) -> Iterator[RunningServer]:
    """A store that exports its spans at once."""
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with running_server("--transport", request.param, "--otel", env=env) as server:
        yield server


class Recorded:
    """The spans of a frontend, with a provider as its application would set one up."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def spans(self, name: str) -> list[ReadableSpan]:
        """Return the finished ones of a name, the oldest first."""
        return [span for span in self._exporter.get_finished_spans() if span.name == name]


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


@pytest.mark.parametrize("stack", ["ssl", "pyopenssl"])
def test_one_trace_leads_from_a_handshake_into_the_store(
    traced_store: RunningServer, collector: Collector, recorded: Recorded, keyring: resumed.Keyring, stack: Stack
) -> None:
    frontend = Frontend(stack, traced_store.target, keyring, tracer_provider=recorded.provider)
    client = Client(VERSIONS[0])
    session = client.visit(frontend).session
    assert frontend.shim.flush(PATIENCE)
    assert client.visit(frontend, session).reused
    (look_up,) = recorded.spans("resumed.look_up")
    (call,) = recorded.spans(GET)
    assert dict(look_up.attributes or {}) == {
        "resumed.namespace": "shop",
        "resumed.outcome": "hit",
        "resumed.reason": "store",
    }
    assert call.parent == look_up.context
    assert call.kind == SpanKind.CLIENT
    assert dict(call.attributes or {}) == {
        "rpc.system.name": "grpc",
        "rpc.method": GET,
        "rpc.response.status_code": "OK",
        "server.address": "127.0.0.1",
        "server.port": int(traced_store.target.rpartition(":")[2]),
    }
    assert call.context
    service, span = collector.span_of(call.context.trace_id)
    assert service == "resumed"
    assert int.from_bytes(span.parent_span_id, "big") == call.context.span_id
    assert span.name == GET
    assert span.kind == span.SPAN_KIND_SERVER
    assert {each.key: each.value.string_value for each in span.attributes} == {
        "rpc.system.name": "grpc",
        "rpc.method": GET,
        "rpc.response.status_code": "OK",
        "resumed.namespace": "shop",
        "resumed.outcome": "hit",
    }
    assert span.start_time_unix_nano < span.end_time_unix_nano
    frontend.shim.uninstall()


def test_a_look_up_without_a_call_has_its_reason(
    store: RunningServer, recorded: Recorded, keyring: resumed.Keyring
) -> None:
    client = Client(VERSIONS[0])
    foreign = Frontend("ssl", store.target, resumed.Keyring.from_keys([bytes(32)]))
    session = client.visit(foreign).session
    frontend = Frontend("ssl", store.target, keyring, tracer_provider=recorded.provider)
    assert not client.visit(frontend, session).reused
    frontend.shim.uninstall()
    foreign.shim.uninstall()
    (look_up,) = recorded.spans("resumed.look_up")
    assert dict(look_up.attributes or {})["resumed.reason"] == "foreign-id"
    assert not recorded.spans(GET)


def test_a_call_that_fails_says_how(store: RunningServer, recorded: Recorded) -> None:
    lost = resumed.StoreClient("127.0.0.1:1", namespace="shop", tracer_provider=recorded.provider)
    refused = resumed.StoreClient(store.target, namespace="shop", deadline=PATIENCE, tracer_provider=recorded.provider)
    with pytest.raises(resumed.StoreUnavailable):
        lost.get(b"key")
    with pytest.raises(resumed.InvalidRequest):
        refused.get(b"")
    refused.close()
    for span, code in zip(recorded.spans(GET), ("UNAVAILABLE", "INVALID_ARGUMENT"), strict=True):
        assert span.status.status_code == StatusCode.ERROR
        attributes = dict(span.attributes or {})
        assert (attributes["rpc.response.status_code"], attributes["error.type"]) == (code, code)
        assert not span.events
        assert not span.status.description


def test_a_prefetched_look_up_keeps_the_context_of_its_handshake(
    store: RunningServer, recorded: Recorded, keyring: resumed.Keyring
) -> None:
    frontend = Frontend("ssl", store.target, keyring, tracer_provider=recorded.provider)
    shim = frontend.shim._policy
    with recorded.provider.get_tracer("test").start_as_current_span("handshake") as handshake:
        offer = SimpleNamespace(session_id=shim.issue_id(), expected=Expected(bytes(32)))
        shim.find(offer, shim.handshake(lambda: lambda: None), may_suspend=True).result(PATIENCE)
    frontend.shim.uninstall()
    calls = recorded.spans(GET)
    assert calls
    assert all(call.parent == handshake.get_span_context() for call in calls)


def test_a_server_whose_collector_is_gone_serves_and_stops(store: RunningServer) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with running_server("--otel", env=env, workers=2) as server:
        client = resumed.StoreClient(server.target, namespace="shop", deadline=PATIENCE)
        assert client.get(b"key") is None
        client.close()
        assert server.stop() == 0
        assert not server.log_lines("killing workers")


def test_without_a_provider_nothing_of_opentelemetry_is_imported() -> None:
    """Applications that do not use tracing do not pay for the import."""
    imports = "import sys, resumed, resumed_server.main, resumed_server.rpc.native_server"
    program = f"{imports}; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
