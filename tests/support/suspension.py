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
    """Negotiate sessions, wait until the store has them, and return them."""
    sessions = [client.visit(negotiator).session for _ in range(count)]
    assert negotiator.shim.flush(PATIENCE)
    return sessions


class Gate:
    """Delays a frontend's look-ups until open() is called."""

    def __init__(self, frontend: Frontend) -> None:
        self.keys: list[bytes] = []
        self.threads: set[int] = set()
        self._open = threading.Event()
        store = frontend.shim._policy._store
        for name in ("get", "take"):
            setattr(store, name, self._delay(getattr(store, name)))

    def open(self) -> None:
        """Continue all look-ups."""
        self._open.set()

    def _delay(self, call: Any) -> Any:
        def delayed_call(key: bytes, **options: Any) -> Any:
            self.keys.append(key)
            self.threads.add(threading.get_ident())
            assert self._open.wait(PATIENCE)
            return call(key, **options)

        return delayed_call


def offer(client: Client, session: ssl.SSLSession | None) -> tuple[socket.socket, socket.socket, bytes]:
    """Return both ends of a connection, and a ClientHello that offers `session`."""
    client_end, server_end = socket.socketpair()
    outgoing = ssl.MemoryBIO()
    tls = client.context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost", session=session)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return client_end, server_end, outgoing.read()


def disconnect_while_suspended(client: Client, frontend: Frontend, gate: Gate, session: ssl.SSLSession | None) -> None:
    """Offer a session and cut the connection before the store responds."""
    client_end, server_end, hello = offer(client, session)
    server = threading.Thread(target=frontend.serve, args=(server_end,))
    server.start()
    client_end.sendall(hello)
    until(lambda: gate.keys)
    client_end.close()
    server.join(PATIENCE)
    assert not server.is_alive()


def resume_byte_by_byte(client: Client, frontend: Any, session: ssl.SSLSession | None) -> bool:
    """Make a handshake and echo, with bytes that arrive one by one; return whether the session resumed."""
    client_end, server_end = socket.socketpair()
    server = threading.Thread(target=frontend.serve, args=(server_end,))
    server.start()
    with client_end:
        client_end.settimeout(PATIENCE)
        connection = _ByteWiseConnection(client.context, client_end, session)
        connection.echo(b"hello")
    server.join(PATIENCE)
    return connection.tls.session_reused is True


class _ByteWiseConnection(Connection):
    """Sends each byte separately, and yields to other threads so that it arrives separately."""

    def _flush(self) -> None:
        for byte in self.outgoing.read():
            self.sock.sendall(bytes([byte]))
            time.sleep(0)
