"""One HTTP/2 connection that carries one gRPC call at a time, on a blocking socket and without a thread of its own.

The calling thread writes the request in one piece and reads the answer from the socket itself. In a general client
most of the cost of a small call is handing it from thread to thread; here there is no other thread. The rules:

- A connection has one call under way at most. After a timeout or an error it is closed and never used again.
- The peer must compress headers without a table (SETTINGS_HEADER_TABLE_SIZE 0, RFC 9113 section 6.5.2), so equal
  header blocks mean equal headers, and each is decoded once in the life of the process.
- Every wait ends at the call's deadline.
- Frames come from a peer: no frame can do worse than raise ConnectionBroken.

RFC 9113 is HTTP/2; how gRPC uses it is in PROTOCOL-HTTP2.md of the gRPC project.
"""

from __future__ import annotations

import _socket
import contextlib
import re
import select
import socket
import ssl
import struct
import time
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from hpack import Decoder, HPACKError
from hpack.hpack import encode_integer

if TYPE_CHECKING:
    from collections.abc import Mapping

# RFC 9113 section 6.
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 5, 6, 7, 8
_CONTINUATION = 9
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_FRAME = struct.Struct(">BHBBL")  # length (24 bits, in two parts), type, flags, stream
_SETTING = struct.Struct(">HL")
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _INITIAL_WINDOW_SIZE = 1, 2, 4
_REFUSED_STREAM, _CANCEL, _CODE_BYTES = 7, 8, 4
_DEFAULT_WINDOW, _LARGEST_WINDOW = 65_535, 2**31 - 1
_LARGEST_FRAME = 16_384
_LARGEST_HEADERS = 65_536
_LAST_STREAM = 2**31 - 1
_STREAM_FRAMES = frozenset((_DATA, _HEADERS, _RST_STREAM, _CONTINUATION))

_CONTENT_TYPE = "application/grpc"
_MESSAGE = struct.Struct(">?L")  # whether it is compressed, its length
MAX_MESSAGE = (16 << 20) + (1 << 20)
"""Bytes that an answer may have: a Batch of the largest values that one request asks for."""
_WINDOW = 2 * MAX_MESSAGE
_RECEIVE = 65_536

CANCELLED, UNKNOWN, UNAVAILABLE = 1, 2, 14
_INTERNAL = 13
# gRPC's http-grpc-status-mapping.md: the meaning of a proxy's answers without gRPC.
_BY_HTTP_STATUS = {"400": 13, "401": 16, "403": 7, "404": 12, "429": 14, "502": 14, "503": 14, "504": 14}


class Status(Exception):
    """The call was answered, with an error.

    Attributes:
        number: Its gRPC status code.
        message: The server's words.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
        self.message = message


class ConnectionBroken(Exception):
    """The connection ended, or the peer does not keep to the protocol. Whether the call was carried out is unknown."""


class RequestNotProcessed(ConnectionBroken):
    """The connection ended, and the peer did not look at the call."""


class _Frame(NamedTuple):
    kind: int
    flags: int
    payload: bytes


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _FRAME.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


_PREFACE = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + _frame(
        _SETTINGS,
        0,
        0,
        _SETTING.pack(_HEADER_TABLE_SIZE, 0)
        + _SETTING.pack(_ENABLE_PUSH, 0)
        + _SETTING.pack(_INITIAL_WINDOW_SIZE, _WINDOW),
    )
    + _frame(_WINDOW_UPDATE, 0, 0, (_WINDOW - _DEFAULT_WINDOW).to_bytes(4, "big"))
)


def _literal_header(name: bytes, value: bytes) -> bytes:
    """Return a header that is spelt out and enters no table (RFC 7541 section 6.2.2); `name` is encoded already."""
    return name + bytes(encode_integer(len(value), 7)) + value


def header(name: str, value: str) -> bytes:
    """Return an encoded header that is added to those of request_headers()."""
    return _literal_header(bytes((0, len(name))) + name.encode(), value.encode())


@lru_cache(64)
def request_headers(authority: str, path: str, secure: bool) -> bytes:
    """Return the encoded headers of calls of the method at `path`, without their time-out."""
    return (
        (b"\x83\x87" if secure else b"\x83\x86")  # :method POST, :scheme, from the static table (RFC 7541 appendix A)
        + _literal_header(b"\x04", path.encode())
        + _literal_header(b"\x01", authority.encode())
        + _literal_header(b"\x0f\x10", _CONTENT_TYPE.encode())  # content-type
        + _literal_header(b"\x00\x02te", b"trailers")
    )


_TIMEOUT = b"\x00\x0cgrpc-timeout"


@lru_cache(64)
def _headers(block: bytes) -> Mapping[str, str]:
    """Return the headers in a block. Most are the same from call to call."""
    decoder = Decoder(_LARGEST_HEADERS)
    decoder.max_allowed_table_size = decoder.header_table_size = 0
    try:
        return {str(header[0]): str(header[1]) for header in decoder.decode(block)}
    except (HPACKError, UnicodeDecodeError):
        raise ConnectionBroken("the peer's headers cannot be decoded") from None


class Connection:
    """A connection over a connected blocking socket, which it owns. For one thread at a time.

    Args:
        connected: The socket, with TLS or without.

    Attributes:
        tls_context: The context that secures it, None if nothing does.
        confirmed: All that has been received was sent after this time, as time.monotonic(), or in the order in which it
            was sent up to then: the time of the request, or of the last ping() that the peer has answered. An attacker
            who delays packets delays these answers as well.
        goaway_received: Whether the peer asked for another connection to be used from now on.

    Raises:
        ConnectionBroken: It has ended.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self.tls_context: ssl.SSLContext | None = getattr(connected, "context", None)
        self._poll = select.poll() if hasattr(select, "poll") else None  # eventlet takes it away
        if self._poll:
            self._poll.register(connected, select.POLLIN)
        self._received, self._position = b"", 0  # received bytes, and the number of those already parsed
        self._greeted = False
        self._stream = -1
        self._initial_window = self._window = _DEFAULT_WINDOW  # the peer's window of a new stream, and of ours
        self._connection_window = _DEFAULT_WINDOW
        self._unreported = 0  # bytes received that no WINDOW_UPDATE has returned yet
        self._message = bytearray()
        self._http_status, self._is_grpc = "", True
        self._ended = True
        self.goaway_received = False
        self.confirmed = float("-inf")
        self._pinged: float | None = None  # when, while the answer is not there
        self._send(_PREFACE)  # at once: servers do not wait for it as long as a connection may be kept

    def request(self, headers: bytes, message: bytes, end: float, *, lasts: bool = False) -> None:
        """Send a call; then read its answers with message().

        Args:
            headers: Those of its method, from request_headers().
            message: The encoded message.
            end: When its time is up, as time.monotonic().
            lasts: Whether only sending it has to be done by then, and its answers may come at any time.

        Raises:
            Status: The call failed before all was sent.
            TimeoutError: The time is up. The connection is of no use any more.
            RequestNotProcessed: Neither is it after this; but the call has not been carried out.
        """
        stream = self._stream = self._stream + 2
        self._window = self._initial_window
        self._message.clear()
        self._http_status, self._is_grpc, self._ended = "", True, False
        self.confirmed = time.monotonic()
        remaining = self._wait_until(end)
        if not lasts:
            timeout = b"%du" % (remaining * 1e6) if remaining < 90 else b"%dm" % (remaining * 1e3)  # noqa: PLR2004
            headers += _TIMEOUT + bytes((len(timeout),)) + timeout
        body = _MESSAGE.pack(False, len(message)) + message
        frames = _frame(_HEADERS, _END_HEADERS, stream, headers)
        size = len(body)
        if size <= _LARGEST_FRAME and size <= self._window and size <= self._connection_window:
            self._window -= size
            self._connection_window -= size
            frames += _frame(_DATA, _END_STREAM, stream, body)
            body = b""
        try:
            self._send(frames)
            self._send_in_pieces(body, end)
        except ConnectionBroken as error:
            raise RequestNotProcessed(str(error)) from None

    def message(self, end: float) -> bytes | None:
        """Return the next message of the answer, None when there is none left.

        Args:
            end: When the time is up, as time.monotonic().

        Raises:
            Status: The call failed.
            TimeoutError: The time is up. The connection is of no use any more.
            ConnectionBroken: Neither is it after this.
        """
        received = self._message
        while True:
            if len(received) >= _MESSAGE.size:
                compressed, length = _MESSAGE.unpack_from(received)
                if compressed or length > MAX_MESSAGE:
                    raise ConnectionBroken("the answer is compressed or too long")
                if len(received) >= _MESSAGE.size + length:
                    message = bytes(received[_MESSAGE.size : _MESSAGE.size + length])
                    del received[: _MESSAGE.size + length]
                    return message
            if self._ended:
                if received:
                    raise ConnectionBroken("the answer ends in the middle of a message")
                return None
            self._handle_stream_frame(self._next_frame(end), end)

    def answer(self, end: float) -> bytes:
        """Return the one message of a unary call's answer; raises as message() does."""
        message = self.message(end)
        if message is None or self.message(end) is not None:
            raise ConnectionBroken("the answer has not one message")
        return message

    def reusable(self) -> bool:
        """Whether another call can be sent, while none is in flight. Handles frames that arrived since the last one."""
        if not self._ended or self.goaway_received or self._stream > _LAST_STREAM - 2:
            return False
        if self._poll and not self._poll.poll(0):
            return True
        try:
            self._socket.settimeout(0)
            self._receive()
        except (BlockingIOError, ssl.SSLWantReadError):  # TLS had something to say, HTTP/2 has not
            return True
        except (OSError, ConnectionBroken):
            return False
        try:
            while self._received_frame():
                pass  # of a call that has ended
        except (OSError, ConnectionBroken):  # an answer of ours found no room, and part of it may be on its way
            return False
        return not self.goaway_received

    def ping(self) -> None:
        """Ask the peer for a sign of life (RFC 9113 section 6.7), unless it still owes one: see `confirmed`."""
        if self._pinged is None:
            self._pinged = time.monotonic()
            self._send(_frame(_PING, 0, 0, bytes(8)))

    def cancel(self) -> None:
        """End the call in flight, from any thread."""
        with contextlib.suppress(OSError):  # it has ended already
            if isinstance(self._socket, ssl.SSLSocket):
                # Not its own: behind that one, a read that is under way would go on without TLS.
                _socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            else:
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    __del__ = close  # for a store that is dropped without being closed

    def _send_in_pieces(self, body: bytes, end: float) -> None:
        """Send a body as the peer's windows allow (RFC 9113 section 5.2)."""
        sent = 0
        while sent < len(body):
            room = min(self._window, self._connection_window, _LARGEST_FRAME)
            self._wait_until(end)
            if room <= 0:
                self._receive()
                while frame := self._received_frame():
                    # Answered before all was sent: the rest of the call ends the connection.
                    self.goaway_received = True
                    self._handle_stream_frame(frame, end)
                continue
            piece = body[sent : sent + room]
            sent += len(piece)
            self._window -= len(piece)
            self._connection_window -= len(piece)
            self._send(_frame(_DATA, 0 if sent < len(body) else _END_STREAM, self._stream, piece))

    def _handle_stream_frame(self, frame: _Frame, end: float) -> None:
        """Take in a frame of the call under way."""
        kind, flags, payload = frame
        if kind == _DATA:
            self._handle_data(frame)
        elif kind == _HEADERS:
            headers = _headers(self._header_block(frame, end))
            status = headers.get(":status", "")
            if not (self._http_status or status.startswith("1")):  # those are informational (RFC 9110 section 15.2)
                self._http_status = status
                self._is_grpc = status == "200" and headers.get("content-type", _CONTENT_TYPE).startswith(_CONTENT_TYPE)
            if flags & _END_STREAM:
                self._ended = True
                self._check(headers)
        elif kind == _RST_STREAM:
            self._ended = True
            if len(payload) != _CODE_BYTES:
                raise ConnectionBroken("the peer resets the call wrongly")
            code = int.from_bytes(payload, "big")
            if code == _REFUSED_STREAM:
                raise RequestNotProcessed("the peer refused the call")
            raise Status(CANCELLED if code == _CANCEL else _INTERNAL, f"the peer reset the call (HTTP/2 error {code})")
        else:
            raise ConnectionBroken("the peer's headers do not begin")

    def _handle_data(self, frame: _Frame) -> None:
        if not self._is_grpc:  # it is the page of a proxy
            if frame.flags & _END_STREAM:
                self._ended = True
                self._check({})
            return
        if frame.flags & _END_STREAM:
            raise ConnectionBroken("the answer ends without a status")
        self._message += _unpadded(frame)
        if len(self._message) > _MESSAGE.size + MAX_MESSAGE + _LARGEST_FRAME:
            raise ConnectionBroken("the answer is too long")

    def _check(self, trailers: Mapping[str, str]) -> None:
        """Raise the Status that ends a call, unless it is OK."""
        text = trailers.get("grpc-status")
        if text == "0":
            return
        if text is None:
            number = _BY_HTTP_STATUS.get(self._http_status, UNKNOWN)
            raise Status(number, f"the peer speaks no gRPC: HTTP status {self._http_status or 'missing'}")
        number = int(text) if re.fullmatch(r"[0-9]{1,3}", text) else UNKNOWN
        raise Status(number, unquote(trailers.get("grpc-message", "")))

    def _header_block(self, frame: _Frame, end: float) -> bytes:
        block, flags = _unpadded(frame), frame.flags
        if flags & _PRIORITY:
            block = block[5:]
        while not flags & _END_HEADERS:
            kind, flags, more = self._next_frame(end)
            block += more
            if kind != _CONTINUATION or len(block) > _LARGEST_HEADERS:
                raise ConnectionBroken("the peer's headers do not end")
        return block

    def _next_frame(self, end: float) -> _Frame:
        """Return the next frame of the call under way; deal with those that are about the connection."""
        while (frame := self._received_frame()) is None:
            self._wait_until(end)
            self._receive()
        return frame

    def _received_frame(self) -> _Frame | None:
        """Return the next frame of the call under way if it has come; deal with those about the connection."""
        received = self._received
        while len(received) - self._position >= _FRAME.size:
            high, low, kind, flags, stream = _FRAME.unpack_from(received, self._position)
            length = high << 16 | low
            if length > _LARGEST_FRAME:
                raise ConnectionBroken("the peer sends frames that are too long, or no HTTP/2")
            start = self._position + _FRAME.size
            if len(received) < start + length:
                break
            self._position = start + length
            payload = received[start : self._position]
            if kind == _DATA:
                self._send_window_update(length, stream)
            if stream == self._stream and kind in _STREAM_FRAMES:
                return _Frame(kind, flags, payload)
            self._handle_connection_frame(kind, flags, stream, payload)
        return None

    def _handle_connection_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Deal with a frame that is about the connection, or about a call that has ended."""
        if kind == _SETTINGS and not flags & _ACK:
            self._apply_settings(payload)
            self._send(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._send(_frame(_PING, _ACK, 0, payload))
        elif kind == _PING and self._pinged is not None:
            self.confirmed, self._pinged = self._pinged, None
        elif kind == _WINDOW_UPDATE:
            increment = int.from_bytes(payload, "big") & _LARGEST_WINDOW
            if stream == 0:
                self._connection_window += increment
            elif stream == self._stream:
                self._window += increment
        elif kind == _GOAWAY:
            self.goaway_received = True
            if int.from_bytes(payload[:4], "big") & _LAST_STREAM < self._stream and not self._ended:
                raise RequestNotProcessed("the peer is going away")
        elif kind == _PUSH_PROMISE:
            raise ConnectionBroken("the peer pushes a stream that was not requested")

    def _apply_settings(self, settings: bytes) -> None:
        """Heed the peer's settings; of those, only the window of a call matters here."""
        for name, value in _SETTING.iter_unpack(settings[: len(settings) // _SETTING.size * _SETTING.size]):
            if name == _INITIAL_WINDOW_SIZE:
                self._window += value - self._initial_window
                self._initial_window = value

    def _send_window_update(self, size: int, stream: int) -> None:
        """Let the peer send as much again as it has sent, in large portions."""
        self._unreported += size
        if self._unreported > _WINDOW // 2:
            increment = self._unreported.to_bytes(4, "big")
            self._unreported = 0
            self._send(_frame(_WINDOW_UPDATE, 0, 0, increment) + _frame(_WINDOW_UPDATE, 0, stream, increment))

    def _wait_until(self, end: float) -> float:
        """Let the socket wait until `end`, and return how many seconds that is."""
        remaining = end - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._socket.settimeout(remaining)
        return remaining

    def _send(self, frames: bytes) -> None:
        try:
            self._socket.sendall(frames)
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError):
            raise
        except OSError as error:
            raise ConnectionBroken(error.strerror or "the connection failed") from None

    def _receive(self) -> None:
        try:
            received = self._socket.recv(_RECEIVE)
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError):
            raise
        except OSError as error:
            raise self._broken(error.strerror or "the connection failed") from None
        if not received:
            raise self._broken("the peer closed the connection")
        self._greeted = True
        self._received = self._received[self._position :] + received
        self._position = 0

    def _broken(self, reason: str) -> ConnectionBroken:
        # A server greets before it looks at anything (RFC 9113 section 3.4). One that ends accepts connections, but
        # does not come to that any more.
        return ConnectionBroken(reason) if self._greeted else RequestNotProcessed(reason)


def _unpadded(frame: _Frame) -> bytes:
    """Return the content of a frame, without its padding (RFC 9113 section 6.1)."""
    payload = frame.payload
    if not frame.flags & _PADDED:
        return payload
    padding = payload[0] if payload else 0
    if padding >= len(payload):
        raise ConnectionBroken("the peer pads its frames wrongly")
    return payload[1 : len(payload) - padding]
