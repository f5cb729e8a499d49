"""A target that scrapes metrics as no Prometheus does: the HTTP server is the standard library's."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, cast

from prometheus_client import CollectorRegistry, Counter, Gauge

from fuzz.target import Check, Target
from resumed_server.observability.metrics.http_endpoint import _Handler

if TYPE_CHECKING:
    from collections.abc import Iterable
    from socketserver import BaseServer


def scrapes() -> Check:
    """Any request gets a response or is rejected; an exception would write to the log."""
    registry = CollectorRegistry()
    Gauge("resumed_sessions", "help", ["namespace"], registry=registry).labels("shop").set(1)
    Counter("resumed_calls", "help", registry=registry).inc()
    handler = type("Handler", (_Handler,), {"registry": registry})
    nobody = cast("BaseServer", None)

    def check(data: bytes) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                handler(ours, ("127.0.0.1", 1), nobody)

    return check


def _scrape_seeds() -> Iterable[bytes]:
    accept = b"Accept: application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;q=0.3,*/*;q=0.1"
    yield b"GET /metrics HTTP/1.1\r\nHost: a:9100\r\n" + accept + b"\r\nAccept-Encoding: gzip\r\n\r\n"
    yield b"GET /metrics?name[]=resumed_calls_total HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET / HTTP/0.9\r\n\r\n"
    yield b"GET /\r\n"
    yield b"POST http://a:9100/%zz HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n0\r\n\r\n"


SCRAPES = (
    Target("scrapes", scrapes, _scrape_seeds, ("resumed_server/observability/metrics/http_endpoint.py",), 2_048),
)
