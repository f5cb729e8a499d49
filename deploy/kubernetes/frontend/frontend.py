"""An example: an HTTPS server whose clients resume their TLS sessions on every replica of it."""

from __future__ import annotations

import http.server
import os
import signal
import socket
import ssl
import threading
import time

import resumed

TLS = os.environ.get("TLS_DIRECTORY", "/etc/shop/tls")
PORT = int(os.environ.get("PORT", "8443"))
DRAIN = float(os.environ.get("DRAIN_SECONDS", "10"))


class Hello(http.server.BaseHTTPRequestHandler):
    """Says which replica answers, and whether the client resumed."""

    def do_GET(self) -> None:
        """Answer a request."""
        how = "resumed" if self.connection.session_reused else "full handshake"
        body = f"{socket.gethostname()}: {how}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing of single requests: probes are requests, too."""


def main() -> None:
    """Serve until SIGTERM, and a while longer, until no client is sent here any more."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{TLS}/tls.crt", f"{TLS}/tls.key")
    resumed.install(
        context,
        target=os.environ["RESUMED_TARGET"],
        namespace="shop",
        keyring=os.environ.get("KEYRING", "/etc/shop/keyring/fleet.keys"),
        credentials=resumed.Credentials(ca=f"{TLS}/ca.crt", cert=f"{TLS}/tls.crt", key=f"{TLS}/tls.key"),
    )
    server = http.server.ThreadingHTTPServer(("", PORT), Hello)
    # The thread of the connection makes the handshake, so that a slow client delays no other.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)

    def drain() -> None:
        time.sleep(DRAIN)
        server.shutdown()

    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=drain).start())
    server.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()
