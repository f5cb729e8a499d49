"""Spans of calls for OpenTelemetry: `resumed serve --otel`, which takes `pip install 'resumed[server,otel]'`.

Names and attributes follow OpenTelemetry's semantic conventions for gRPC servers; besides them a span has the namespace
and the outcome of the call, and no key or value. OpenTelemetry's environment variables configure export and sampling.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

from google.rpc.code_pb2 import Code
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from resumed.v1 import admin_pb2, session_store_pb2
from resumed_server.config.patterns import is_namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpc import ServicerContext
    from opentelemetry.trace import Tracer

    from resumed_server.rpc.observer import Observer

FLUSH_SECONDS = 1.0
"""Time limit in seconds for the export of remaining spans during shutdown."""

_METHODS = {
    method.name: f"{service.full_name}/{method.name}"
    for file in (session_store_pb2, admin_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
_FAULTS = frozenset((Code.UNKNOWN, Code.DEADLINE_EXCEEDED, Code.UNIMPLEMENTED, Code.INTERNAL, Code.UNAVAILABLE))
"""Status codes that are errors of the server, not of the caller."""
_propagator = TraceContextTextMapPropagator()


class Tracing:
    """An observer that creates a span at the end of each call, and forwards it to another observer.

    Args:
        tracer: Creates the spans.
        observer: The other observer.
    """

    def __init__(self, tracer: Tracer, observer: Observer) -> None:
        self._tracer, self._observer = tracer, observer

    def on_success(self, method: str, seconds: float, request: Any, response: Any, context: ServicerContext) -> None:
        """See Observer."""
        self._observer.on_success(method, seconds, request, response, context)
        self._span(method, Code.OK, seconds, request, context, response=response)

    def on_failure(self, method: str, code: int, seconds: float, request: Any, context: ServicerContext) -> None:
        """See Observer."""
        self._observer.on_failure(method, code, seconds, request, context)
        self._span(method, code, seconds, request, context)

    def on_limited(self, operation: str, namespace: str) -> None:
        """See Observer."""
        self._observer.on_limited(operation, namespace)

    def _span(
        self, method: str, code: int, seconds: float, request: Any, context: ServicerContext, *, response: Any = None
    ) -> None:
        end, full_name = time.time_ns(), _METHODS[method]
        sent = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        attributes = {"rpc.system.name": "grpc", "rpc.method": full_name}
        start = end - int(seconds * 1e9)
        span = self._tracer.start_span(
            full_name, _propagator.extract(sent), SpanKind.SERVER, attributes, start_time=start
        )
        if span.is_recording():
            name = Code.Name(code)
            span.set_attribute("rpc.response.status_code", name)
            span.set_attributes(_namespace(request) | _outcome(method, response))
            if code in _FAULTS:
                span.set_attribute("error.type", name)
                span.set_status(Status(StatusCode.ERROR))
        span.end(end)


@contextlib.contextmanager
def export_spans(observer: Observer) -> Iterator[Tracing]:
    """Create spans and export them over OTLP as long as the context lasts. It starts threads: not before a fork."""
    resource = Resource.create({"service.name": "resumed"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield Tracing(provider.get_tracer("resumed"), observer)
    finally:
        # With an unreachable collector, shutdown() blocks for about 30 s; do not wait longer than FLUSH_SECONDS.
        ending = threading.Thread(target=provider.shutdown, name="tracing-end", daemon=True)
        ending.start()
        ending.join(FLUSH_SECONDS)


def _namespace(request: Any) -> dict[str, Any]:
    """Return the namespace of a call, if it has exactly one valid namespace."""
    if isinstance(request, session_store_pb2.BatchRequest):
        operations = (getattr(each, each.WhichOneof("operation") or "get") for each in request.operations)
        names = {operation.namespace for operation in operations}
    else:
        names = {getattr(request, "namespace", "")}
    name = names.pop() if len(names) == 1 else ""
    return {"resumed.namespace": name} if is_namespace(name) else {}


def _outcome(method: str, response: Any) -> dict[str, Any]:
    """Return the outcome of a successful call, with the names of the metrics."""
    if response is None:
        return {}
    if method in {"Get", "Take"}:
        return {"resumed.outcome": "hit" if response.HasField("session") else "miss"}
    if method == "Put":
        return {"resumed.outcome": "stored"}
    if method == "Remove":
        return {"resumed.outcome": "removed" if response.removed else "unknown"}
    return {"resumed.operations": len(response.results)} if method == "Batch" else {}
