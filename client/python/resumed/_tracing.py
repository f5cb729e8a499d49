"""Spans for OpenTelemetry: of each look-up of a handshake, and of each call to the store, which learns its parent.

`pip install 'resumed[otel]'`, and give install() or StoreClient a `tracer_provider`. Names and attributes of calls are
those of OpenTelemetry's semantic conventions for gRPC. No id, key or value is in a span.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from resumed._exceptions import StoreError
from resumed._transport.channel import Channel
from resumed._transport.http2 import header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opentelemetry.trace import TracerProvider

    from resumed._transport.channel import Method
    from resumed._transport.tls import Credentials

_NAME = "resumed"
_propagator = TraceContextTextMapPropagator()


class LookupSpans:
    """Spans of the look-ups of one TLS context; each is the parent of the calls that it makes."""

    def __init__(self, provider: TracerProvider, namespace: str) -> None:
        self._tracer = provider.get_tracer(_NAME)
        self._attributes = {"resumed.namespace": namespace}

    @contextmanager
    def look_up(self) -> Iterator[Callable[[bool, str], None]]:
        """Make a span; call the function that it yields with whether a session resumes, and with the reason."""
        with self._tracer.start_as_current_span("resumed.look_up", attributes=self._attributes) as span:

            def ended(hit: bool, reason: str) -> None:
                span.set_attributes({"resumed.outcome": "hit" if hit else "miss", "resumed.reason": reason})

            yield ended


class TracedChannel(Channel):
    """A channel that makes a span of each unary call, however often it is tried."""

    def __init__(self, target: str, credentials: Credentials | None, provider: TracerProvider) -> None:
        super().__init__(target, credentials)
        self._tracer = provider.get_tracer(_NAME)
        self._attributes: dict[str, str | int] = {"rpc.system.name": "grpc", **self._target.attributes}

    def call(self, method: Method, message: bytes, timeout: float, metadata: bytes = b"") -> bytes:
        """See Channel."""
        name = method.path[1:]
        attributes = {**self._attributes, "rpc.method": name}
        with self._tracer.start_as_current_span(
            name, kind=SpanKind.CLIENT, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            carrier: dict[str, str] = {}
            _propagator.inject(carrier)
            try:
                answer = super().call(
                    method, message, timeout, b"".join((metadata, *(header(*each) for each in carrier.items())))
                )
            except StoreError as error:
                span.set_attributes({"rpc.response.status_code": error.code, "error.type": error.code})
                span.set_status(Status(StatusCode.ERROR))
                raise
            span.set_attribute("rpc.response.status_code", "OK")
            return answer
