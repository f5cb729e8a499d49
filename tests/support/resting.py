"""Helpers for tests of suspended handshakes: a gate that delays lookups, and misbehaving clients."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from support.tls import PATIENCE, Connection
from support.waiting import until

if TYPE_CHECKING:
    from support.tls import Client, Frontend


def sessions_of(client: Client, negotiator: Frontend, count: int = 1) -> list[ssl.SSLSession | None]:
    """Return sessions that the store has."""
    sessions = [client.visit(negotiator).session for _ in range(count)]
    assert negotiator.shim.flush(PATIENCE)
    return sessions


class Gate:
    """Holds a frontend's look-ups up until it is opened."""

    def __init__(self, frontend: Frontend) -> None:
        self.asked: list[bytes] = []
        self.threads: set[int] = set()
        self._open = threading.Event()
        store = frontend.shim._policy._store
        for name in ("get", "take"):
            setattr(store, name, self._held(getattr(store, name)))

    def open(self) -> None:
        """Let all look-ups go on."""
        self._open.set()

    def _held(self, ask: Any) -> Any:
        def held(key: bytes, **options: Any) -> Any:
            self.asked.append(key)
            self.threads.add(threading.get_ident())
            assert self._open.wait(PATIENCE)
            return ask(key, **options)

        return held


def offered(client: Client, session: ssl.SSLSession | None) -> tuple[socket.socket, socket.socket, bytes]:
    """Return both ends of a connection, and a ClientHello that offers `session`."""
    ours, theirs = socket.socketpair()
    outgoing = ssl.MemoryBIO()
    tls = client.context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost", session=session)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return ours, theirs, outgoing.read()


def leave_while_resting(client: Client, frontend: Frontend, gate: Gate, session: ssl.SSLSession | None) -> None:
    """Offer a session and cut the connection before the store has answered."""
    ours, theirs, hello = offered(client, session)
    server = threading.Thread(target=frontend.serve, args=(theirs,))
    server.start()
    ours.sendall(hello)
    until(lambda: gate.asked)
    ours.close()
    server.join(PATIENCE)
    assert not server.is_alive()


def resumes_byte_by_byte(client: Client, frontend: Any, session: ssl.SSLSession | None) -> bool:
    """Shake hands, and talk, in bytes that arrive one by one; return whether the session resumed."""
    ours, theirs = socket.socketpair()
    server = threading.Thread(target=frontend.serve, args=(theirs,))
    server.start()
    with ours:
        ours.settimeout(PATIENCE)
        connection = _Dribbling(client.context, ours, session)
        connection.echo(b"hello")
    server.join(PATIENCE)
    return connection.tls.session_reused is True


class _Dribbling(Connection):
    """Sends each byte by itself, and waits a little so that it arrives by itself."""

    def _flush(self) -> None:
        for byte in self.outgoing.read():
            self.sock.sendall(bytes([byte]))
            time.sleep(0)
