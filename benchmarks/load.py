"""A load generator for unary gRPC calls, each with a body of its own.

h2load repeats one body, so it can neither Put nor Take; grpcio's client costs as much processor time as the server
under test. This one writes prepared HTTP/2 frames and parses only the frame headers of responses, which costs about a
tenth of the server's time per call.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PATIENCE = 30.0
"""Time limit of a response in seconds; only a broken server reaches it."""

# RFC 9113 section 6.
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_HEADER = struct.Struct(">BHBBL")
_FIRST_WINDOW, _LARGEST_WINDOW, _LARGEST_FRAME = 65_535, 2**31 - 1, 16_384
_GRPC_HEADER = struct.Struct(">BL")


class Outcome(NamedTuple):
    """The result of a run of calls."""

    seconds: float
    """From the first request to the last response."""
    latencies: list[float]
    """Seconds of each call."""
    responses: list[bytes]
    """The response messages, in the order of their arrival."""


def make_unary_calls(target: str, method: str, bodies: Sequence[bytes], *, connections: int, at_once: int) -> Outcome:
    """Call `method` ("/package.Service/Name") with each of `bodies`, `at_once` at a time on each connection.

    `target` is "host:port" or "unix:/path".
    """
    remaining = iter(bodies)
    latencies: list[float] = []
    responses: list[bytes] = []
    with contextlib.ExitStack() as exit_stack, selectors.DefaultSelector() as ready:
        peers = [exit_stack.enter_context(contextlib.closing(_Connection(target, method))) for _ in range(connections)]
        for peer in peers:
            ready.register(peer.socket, selectors.EVENT_READ, peer)
        started = time.perf_counter()
        for peer in peers * at_once:
            if (body := next(remaining, None)) is not None:
                peer.call(body)
        while len(responses) < len(bodies):
            events = ready.select(PATIENCE)
            assert events, "the server does not answer"
            for key, _ in events:
                for seconds, response in key.data.read_responses():
                    latencies.append(seconds)
                    responses.append(response)
                    if (body := next(remaining, None)) is not None:
                        key.data.call(body)
        return Outcome(time.perf_counter() - started, latencies, responses)


class _Connection:
    """One HTTP/2 connection with prior knowledge, for calls of one method."""

    def __init__(self, target: str, method: str) -> None:
        if target.startswith("unix:"):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(PATIENCE)
            self.socket.connect(target.removeprefix("unix:"))
        else:
            host, _, port = target.rpartition(":")
            self.socket = socket.create_connection((host, int(port)), PATIENCE)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._headers = _header_block("localhost", method)
        self._next_stream = 1
        self._window = _FIRST_WINDOW
        self._waiting: deque[tuple[int, bytes]] = deque()  # bodies that exceed the server's window
        self._started: dict[int, float] = {}
        self._messages: dict[int, bytes] = {}
        self._received = b""
        settings = struct.pack(">HL", 4, _LARGEST_WINDOW)
        self.socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, settings)
            + _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">L", _LARGEST_WINDOW - _FIRST_WINDOW))
        )

    def close(self) -> None:
        self.socket.close()

    def call(self, body: bytes) -> None:
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self._started[stream] = time.perf_counter()
        headers = _frame(_HEADERS, _END_HEADERS, stream, self._headers)
        self._waiting.append((stream, _GRPC_HEADER.pack(0, len(body)) + body))
        self._send_waiting(headers)

    def read_responses(self) -> Iterator[tuple[float, bytes]]:
        """Read from the socket, and yield the seconds and the message of each call that ended."""
        received = self._received + self.socket.recv(1 << 18)
        assert len(received) > len(self._received), "the server closed the connection"
        position = 0
        while len(received) - position >= _HEADER.size:
            high, low, kind, flags, stream = _HEADER.unpack_from(received, position)
            end = position + _HEADER.size + (high << 16 | low)
            if end > len(received):
                break
            payload = received[position + _HEADER.size : end]
            position = end
            if kind == _DATA:
                self._messages[stream] = self._messages.get(stream, b"") + payload
            elif kind == _HEADERS:
                if flags & _END_STREAM:
                    seconds = time.perf_counter() - self._started.pop(stream)
                    yield seconds, self._messages.pop(stream, b"")[_GRPC_HEADER.size :]
            else:
                self._handle_connection_frame(kind, flags, stream, payload)
        self._received = received[position:]

    def _handle_connection_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        assert kind not in {_RST_STREAM, _GOAWAY}, "the server refuses calls"
        if kind == _WINDOW_UPDATE and not stream:
            self._window += int.from_bytes(payload, "big")
            self._send_waiting()
        elif kind in {_SETTINGS, _PING} and not flags & _ACK:
            self.socket.sendall(_frame(kind, _ACK, 0, payload if kind == _PING else b""))

    def _send_waiting(self, frames: bytes = b"") -> None:
        while self._waiting and len(self._waiting[0][1]) <= self._window:
            stream, body = self._waiting.popleft()
            assert len(body) <= _FIRST_WINDOW, "the body exceeds the window of a stream"
            self._window -= len(body)
            for start in range(0, len(body), _LARGEST_FRAME):
                last = start + _LARGEST_FRAME >= len(body)
                frames += _frame(_DATA, _END_STREAM if last else 0, stream, body[start : start + _LARGEST_FRAME])
        if frames:
            self.socket.sendall(frames)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _HEADER.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


def _header_block(target: str, method: str) -> bytes:
    """Return a request's headers, from HPACK's static table or as literals (RFC 7541, section 6.2.2)."""

    def literal_header(name: bytes, value: str) -> bytes:
        return name + bytes([len(value)]) + value.encode()

    post, http = b"\x83", b"\x86"
    authority, path, content_type, te = b"\x01", b"\x04", b"\x0f\x10", b"\x00\x02te"
    return (
        post
        + http
        + literal_header(authority, target)
        + literal_header(path, method)
        + literal_header(content_type, "application/grpc")
        + literal_header(te, "trailers")
    )
