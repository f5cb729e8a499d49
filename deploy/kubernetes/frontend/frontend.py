"""An example: an HTTPS server whose clients resume their TLS sessions on every replica of it."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import socket
import ssl
import threading
import time
from pathlib import Path

import prometheus_client

import resumed
import resumed.prometheus

TLS = os.environ.get("TLS_DIRECTORY", "/etc/shop/tls")
"""The certificate for browsers."""
IDENTITY = os.environ.get("IDENTITY_DIRECTORY", "/etc/shop/identity")
"""The certificate with the SPIFFE id for the store."""
KEYRING = os.environ.get("KEYRING", "/etc/shop/keyring/fleet.keys")
PORT = int(os.environ.get("PORT", "8443"))
METRICS_PORT = int(os.environ.get("METRICS_PORT", "9464"))
DRAIN = float(os.environ.get("DRAIN_SECONDS", "10"))
RENEWAL = float(os.environ.get("RENEWAL_SECONDS", "10"))
"""Seconds between two looks for a renewed certificate."""


class Hello(http.server.BaseHTTPRequestHandler):
    """Responds with the replica's name, and with whether the client resumed."""

    timeout = 10  # seconds, of the handshake too

    def do_GET(self) -> None:
        """Answer a request."""
        how = "resumed" if self.connection.session_reused else "full handshake"
        body = f"{socket.gethostname()}: {how}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log no single requests, because probes are requests too."""


class Frontend(http.server.ThreadingHTTPServer):
    """Serves each connection with the newest certificate."""

    daemon_threads = False  # The process ends after the last response.

    def __init__(self) -> None:
        super().__init__(("", PORT), Hello, bind_and_activate=False)
        self._loaded = 0
        self._credentials = resumed.Credentials(
            ca=f"{IDENTITY}/ca.crt", cert=f"{IDENTITY}/tls.crt", key=f"{IDENTITY}/tls.key"
        )
        self.load()

    def load(self) -> None:
        """Make a context of the certificate, if its file has changed.

        Raises:
            OSError: A file cannot be read, or certificate and key do not match (ssl.SSLError), as in the middle of a
                change.
        """
        changed = Path(TLS, "tls.crt").stat().st_mtime_ns
        if changed == self._loaded:
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(f"{TLS}/tls.crt", f"{TLS}/tls.key")
        installation = resumed.install(
            context,
            target=os.environ["RESUMED_TARGET"],
            namespace="shop",
            keyring=KEYRING,
            credentials=self._credentials,
        )
        resumed.prometheus.export(installation)
        self._context, self._loaded = context, changed

    def get_request(self) -> tuple[ssl.SSLSocket, object]:
        """Accept a connection; its own thread makes the handshake, so that a slow client delays no other."""
        connection, address = super().get_request()
        return self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address

    def renew(self) -> None:
        """Look for a renewed certificate again and again."""
        while True:
            time.sleep(RENEWAL)
            with contextlib.suppress(OSError):
                self.load()

    def drain(self) -> None:
        """Serve a while longer, until no client is sent here any more, and end."""
        time.sleep(DRAIN)
        self.shutdown()


def main() -> None:
    """Serve until SIGTERM."""
    server = Frontend()
    prometheus_client.start_http_server(METRICS_PORT)
    threading.Thread(target=server.renew, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.drain).start())
    server.server_bind()
    server.server_activate()
    server.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()
