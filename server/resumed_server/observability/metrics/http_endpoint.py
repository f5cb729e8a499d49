"""Serve the metrics over HTTP. All workers listen on the same port, and each serves the metrics of all of them."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
import threading
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, MetricsHandler

from resumed_server.errors import exception_fields, should_log
from resumed_server.stream_limit import StreamLimit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prometheus_client.registry import Collector

    from resumed_server.config.types import Address

PATH = "/metrics"
"""The only path that is served."""
PATIENCE = 5.0
"""Time limit of a client for sending a request, in seconds."""
MOST_CONNECTIONS = 16
"""Maximum number of connections; a further one closes the oldest, since a scrape takes milliseconds."""

_ABSENT = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}

_log = structlog.get_logger()


class Endpoint:
    """An HTTP server that serves the metrics at PATH, until close().

    Args:
        addresses: Where to listen; reserved addresses, see lifecycle.listeners.
        collector: The metrics.
    """

    def __init__(self, addresses: Sequence[Address], collector: Collector) -> None:
        registry = CollectorRegistry()
        registry.register(collector)
        handler = _Handler.factory(registry)
        self._servers = []
        for where in [where for address in addresses for where in _resolve(address)]:
            try:
                self._servers.append(_Server(where, handler))
            except OSError as error:  # e.g. the IPv6 address of localhost, on a machine without IPv6
                if error.errno not in _ABSENT:
                    raise
        for server in self._servers:
            threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop."""
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Handler(MetricsHandler):
    timeout = PATIENCE

    def do_GET(self) -> None:  # noqa: N802 - the name of http.server
        if not self._has_path():
            return
        try:
            super().do_GET()
        except OSError:  # the client has disconnected
            raise
        except Exception as error:  # noqa: BLE001 - any header can cause one (Accept: a version 1.x)
            _log_rate_limited(error)
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)

    def do_HEAD(self) -> None:  # noqa: N802 - the name of http.server
        if self._has_path():
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", CONTENT_TYPE_LATEST)
            self.end_headers()

    def _has_path(self) -> bool:
        """Return whether the request is for PATH; answer it with 404 if not."""
        found = self.path.partition("?")[0] == PATH
        if not found:
            self.send_error(HTTPStatus.NOT_FOUND, explain=f"The metrics are at {PATH}.")
        return found


class _Server(ThreadingHTTPServer):
    def __init__(self, where: tuple[socket.AddressFamily, tuple[str, int]], handler: type[_Handler]) -> None:
        self.address_family, address = where
        self._places = StreamLimit(MOST_CONNECTIONS)
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # Without SO_REUSEADDR, earlier scrapes in TIME_WAIT would keep a restarted server from this port for a minute.
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            self.socket.setsockopt(socket.SOL_SOCKET, option, 1)
        self.socket.bind(self.server_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        def end() -> None:
            with contextlib.suppress(OSError):  # the connection has ended already
                request.shutdown(socket.SHUT_RDWR)

        with self._places.admit(end):
            super().process_request_thread(request, client_address)

    def handle_error(self, _request: Any, _client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error and not isinstance(error, OSError):  # a client that disconnects is no error
            _log_rate_limited(error)


def _log_rate_limited(error: BaseException) -> None:
    details = exception_fields(error)
    if should_log("metrics", *details.values()):
        _log.error("failed to render metrics", **details)


def _resolve(address: Address) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    return [(family, (str(where[0]), address.port)) for family, _, _, _, where in found]
