"""A TCP proxy on loopback whose connections a test can cut."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset
_CHUNK = 65_536


class Network:
    """Proxy for connections to `upstream`, a "host:port". Has one thread; a context manager.

    Attributes:
        target: The listen address as "host:port"; `port` is its port.
    """

    def __init__(self, upstream: str) -> None:
        host, port = upstream.rsplit(":", 1)
        self._upstream = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.target = f"127.0.0.1:{self.port}"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[socket.socket, socket.socket] = {}
        self._lock = threading.Lock()
        self._silent = self._refusing = self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._thread.join()
        self.drop()
        self._listener.close()
        self._selector.close()

    def redirect(self, upstream: str) -> None:
        """Pass new connections on to another "host:port"; existing ones stay."""
        host, port = upstream.rsplit(":", 1)
        self._upstream = host, int(port)

    def drop(self) -> None:
        """Reset all connections, present and new."""
        with self._lock:
            self._refusing = True
            for sock in list(self._peers):
                self._forget(sock)

    def swallow(self) -> None:
        """Deliver no more data; connections stay open, and new ones are accepted without an answer."""
        self._silent = True

    def heal(self) -> None:
        """Deliver data again, delayed data first, as TCP does."""
        self._silent = self._refusing = False

    def _run(self) -> None:
        while not self._closed:
            ready = [] if self._silent else self._selector.select(0.05)
            if not ready:
                threading.Event().wait(0.005)
            with self._lock:
                for key, _ in ready:
                    if key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._peers:
                        self._pass_on(key.fileobj)

    def _accept(self) -> None:
        down, _ = self._listener.accept()
        try:
            if self._refusing:
                raise ConnectionRefusedError
            up = socket.create_connection(self._upstream, 1)
        except OSError:
            down.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            down.close()
            return
        for sock, peer in ((down, up), (up, down)):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(1)  # a peer that does not read for this long is disconnected
            self._peers[sock] = peer
            self._selector.register(sock, selectors.EVENT_READ)

    def _pass_on(self, sock: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = sock.recv(_CHUNK)
            self._peers[sock].sendall(data)
        if not data:
            self._forget(sock)

    def _forget(self, sock: socket.socket) -> None:
        for end in (sock, self._peers.get(sock)):
            if end in self._peers:
                del self._peers[end]
                self._selector.unregister(end)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.close()
