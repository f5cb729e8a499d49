"""Visits hosts in turn with OpenSSL (Python's `ssl`): `standard.py PORT CA CERTIFICATE VERSION COUNT HOST...`.

Prints a line for every 100 visits, and one "failed: ..." for each visit without an answer of status 200.
"""

from __future__ import annotations

import socket
import ssl
import sys


def connected(port: int) -> socket.socket:
    """Return a connection that sends small packets at once, as browsers' do."""
    plain = socket.create_connection(("127.0.0.1", port), 10)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return plain


def main() -> None:
    """Visit."""
    port, authority, certificate, version, count, *hosts = sys.argv[1:]
    context = ssl.create_default_context(cafile=authority)
    context.load_cert_chain(certificate)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[f"TLSv{version.replace('.', '_')}"]
    sessions: dict[str, ssl.SSLSession | None] = {}
    for visited in range(1, int(count) + 1):
        host = hosts[visited % len(hosts)]
        try:
            with (
                connected(int(port)) as plain,
                context.wrap_socket(plain, server_hostname=host, session=sessions.get(host)) as tls,
            ):
                tls.sendall(
                    f"GET / HTTP/1.1\r\nHost: {host}\r\nUser-Agent: openssl\r\nConnection: close\r\n\r\n".encode()
                )
                answer = tls.recv(4096)
                sessions[host] = tls.session
            if b" 200 " not in answer.partition(b"\r\n")[0]:
                print(f"failed: {host}: answer {answer[:80]!r}", flush=True)  # noqa: T201
        except OSError as error:
            print(f"failed: {host}: {error!r}", flush=True)  # noqa: T201
        if visited % 100 == 0:
            print(visited, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
