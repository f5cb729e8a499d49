"""An HTTPS server of a fleet: each response reports whether the connection resumed.

The environment has RESUMED_TARGET, and may have FILES (a directory), PORT and METRICS_PORT.
"""

from __future__ import annotations

import http.server
import os
import signal
import socket
import ssl
import threading

import prometheus_client

import resumed
import resumed.prometheus

FILES = os.environ.get("FILES", "/etc/shop")
PORT, METRICS_PORT = int(os.environ.get("PORT", "8443")), int(os.environ.get("METRICS_PORT", "9464"))


class Hello(http.server.BaseHTTPRequestHandler):
    """Names the replica, and reports how the connection began."""

    timeout = 30

    def do_GET(self) -> None:
        """Answer a request."""
        how = "resumed" if self.connection.session_reused else "full handshake"
        body = f"{socket.gethostname()}: {how}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log no requests: health checks and clients are many."""


def main() -> None:
    """Serve until SIGTERM."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{FILES}/tls.crt", f"{FILES}/tls.key")
    installation = resumed.install(
        context,
        target=os.environ["RESUMED_TARGET"],
        namespace="shop",
        keyring=f"{FILES}/fleet.keys",
        credentials=resumed.Credentials(ca=f"{FILES}/ca.crt", cert=f"{FILES}/shop.crt", key=f"{FILES}/shop.key"),
        ignore_id_context=True,  # frontends of other stacks may join
    )
    resumed.prometheus.export(installation)
    prometheus_client.start_http_server(METRICS_PORT)
    server = http.server.ThreadingHTTPServer(("", PORT), Hello)
    # The thread of the connection makes the handshake, so that a slow client delays no other.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()
