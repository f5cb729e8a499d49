"""A network that is slow, or lets nothing through."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Relay:
    """Forwards connections to `target`, "host:port", and the responses `delay` seconds later."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._upstream = host, int(port)
        listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{listener.getsockname()[1]}"
        self.delay = 0.0
        self._deaf: set[socket.socket] = set()
        self._sockets, self._clients = [listener], list[socket.socket]()
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self._start(self._accept, listener)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                down, _ = listener.accept()
                up = socket.create_connection(self._upstream)
                self._sockets += down, up
                self._clients.append(down)
                for source, sink, late in ((down, up, False), (up, down, True)):
                    sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    timely: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                    self._start(self._receive, source, timely, late)
                    self._start(self._deliver, timely, sink)

    def _receive(self, source: socket.socket, timely: queue.SimpleQueue[tuple[float, bytes]], late: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if source not in self._deaf:
                    timely.put((time.monotonic() + self.delay * late, data))
        timely.put((0.0, b""))

    def _deliver(self, timely: queue.SimpleQueue[tuple[float, bytes]], sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, data = timely.get()
                self._closed.wait(max(0.0, due - time.monotonic()))
                if not data:
                    sink.shutdown(socket.SHUT_RDWR)
                    return
                sink.sendall(data)

    def deafen(self) -> None:
        """Withhold from the target whatever its present clients send from now on."""
        self._deaf.update(self._clients)

    def close(self) -> None:
        """Close all connections."""
        self._closed.set()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()
