"""A client that sends arbitrary HTTP/2 frames, which no client library can."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

from hpack import Encoder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self

# RFC 9113 section 6.
HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 1, 3, 4, 6, 7
_DATA, _END_STREAM, _END_HEADERS, _INITIAL_WINDOW_SIZE = 0, 1, 4, 4
_HEADER_BYTES = 9
_GET = "/resumed.v1.SessionStoreService/Get"


def open_socket(target: str) -> socket.socket:
    """Connect to "host:port"."""
    host, _, port = target.rpartition(":")
    return socket.create_connection((host, int(port)), 30.0)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return an HTTP/2 frame (RFC 9113 section 4.1)."""
    return struct.pack(">BHBBL", len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


class Raw:
    """A connection over a socket, which it closes."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._encoder, self._received = Encoder(), b""
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, b""))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def open_call(self, stream: int, path: str = _GET) -> None:
        """Send a call's headers, and not its message."""
        headers = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost")]
        block = self._encoder.encode([*headers, ("content-type", "application/grpc"), ("te", "trailers")])
        self.socket.sendall(frame(HEADERS, _END_HEADERS, stream, block))

    def close_windows(self) -> None:
        """Receive no byte of any stream from now on (RFC 9113 section 6.9.2)."""
        self.socket.sendall(frame(SETTINGS, 0, 0, struct.pack(">HL", _INITIAL_WINDOW_SIZE, 0)))

    def send_message(self, stream: int, message: bytes) -> None:
        """Send a call's one message."""
        self.socket.sendall(frame(_DATA, _END_STREAM, stream, b"\0" + struct.pack(">L", len(message)) + message))

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield the type, flags, stream and payload of frames until the server closes the connection."""
        while True:
            while len(self._received) >= _HEADER_BYTES:
                end = _HEADER_BYTES + int.from_bytes(self._received[:3], "big")
                if len(self._received) < end:
                    break
                kind, flags, stream = self._received[3], self._received[4], int.from_bytes(self._received[5:9], "big")
                payload, self._received = self._received[_HEADER_BYTES:end], self._received[end:]
                yield kind, flags, stream, payload
            try:
                received = self.socket.recv(65_536)
            except ConnectionError:
                return
            if not received:
                return
            self._received += received
