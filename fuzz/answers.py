"""Targets that play a hostile server: its HTTP/2 frames, its messages, and their contents."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Any, cast

from hpack import Encoder

from fuzz.target import Check, Pieces, Target
from resumed._client.store import Get, Put, Remove, StoreClient, Take
from resumed._exceptions import StoreError
from resumed._policy.mirror import Mirror
from resumed._policy.stats import Recorder
from resumed._policy.write_queue import PendingWrite, WriteQueue
from resumed._transport.http2 import Connection
from resumed.v1 import session_store_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from resumed._transport.pool import Server

DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 5, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_STREAMS = (0, 1, 3, 5, 2**31 - 1, 2**32 - 1)
_KEY = bytes(32)
_LARGE = bytes(65_536)  # more than the window of a fresh connection
_PATIENCE = 5.0
"""Seconds; all bytes of the server are available at once, so only a hang takes longer."""


def _use(store: StoreClient, number: int) -> None:
    """Use a server as a frontend does; any response causes at most a StoreError."""
    calls: tuple[Callable[[], Any], ...] = (
        lambda: store.get(_KEY),
        lambda: store.take(_KEY),
        lambda: store.put(_KEY, _LARGE, 60.0),
        lambda: store.remove(_KEY),
        lambda: store.batch([Put(_KEY, b"value", 1.5), Get(_KEY), Take(_KEY), Remove(_KEY)]),
        lambda: store.batch([Put(_KEY, _LARGE[:20_000], 1.5)] * 2),
        lambda: _follow(store),
        lambda: _send(store),
    )
    with contextlib.suppress(StoreError):
        repr(calls[number % len(calls)]())


class _Once(threading.Event):
    """Ends a thread's loop when it first rests."""

    def wait(self, timeout: float | None = None) -> bool:
        self.set()
        return True


def _follow(store: StoreClient) -> None:
    """Mirror the store in this thread until it breaks off."""
    mirror = Mirror(store, 100_000)
    mirror._closed = _Once()
    mirror._run()
    mirror.sessions.get(_KEY)


def _send(store: StoreClient) -> None:
    """Send a Put and a removal in this thread."""
    sender = WriteQueue(store, Recorder(), lambda: 1000.0, lambda _key, value, _not_after: value)
    sender._queue.extend([PendingWrite(_KEY, b"serialized", 2000, ""), PendingWrite(_KEY, None, 0, "application")])
    sender._closing = True  # or it would rest after a failure
    sender._send()


class _Peer:
    """A server whose response is available before the request."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._held: list[socket.socket] = []

    def store(self) -> StoreClient:
        """Return a client of it."""
        store = StoreClient("unix:/nowhere", namespace="shop", deadline=_PATIENCE)
        connections: Any = store._channel._connections
        connections._connect = self._connect

        def connect_soon(server: Server, _end: float) -> None:
            server.connecting += 1
            connections._make(server, _PATIENCE)  # in this thread

        connections._connect_soon = connect_soon
        return store

    def close(self) -> None:
        """Close its ends."""
        for held in self._held:
            held.close()

    def _connect(self, _where: object, _end: float) -> Connection:
        if self._held:
            raise ConnectionRefusedError
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)  # the peer does not read
        theirs.sendall(self._data)
        theirs.shutdown(socket.SHUT_WR)
        self._held.append(theirs)
        return Connection(ours)


def _converse(number: int, data: bytes) -> None:
    peer = _Peer(data)
    store = peer.store()
    try:
        _use(store, number)
        _use(store, number + 1)  # on the same connection, if it is of use still
    finally:
        store.close()
        peer.close()


def http2_bytes() -> Check:
    """Calls end with a response or a StoreError for any bytes from the server."""

    def check(data: bytes) -> None:
        _converse(int.from_bytes(data[:1], "big"), data[1:])

    return check


def http2_frames() -> Check:
    """The same where each frame by itself is well-formed."""

    def check(data: bytes) -> None:
        pieces = Pieces(data)
        number, sent = pieces.number(), b""
        while pieces:
            kind, flags, stream, size = pieces.number() % 12, pieces.number(), pieces.number(), pieces.number(2)
            payload = pieces.take(size)
            if kind == DATA and stream & 0x40:
                payload = b"\0" + len(payload).to_bytes(4, "big") + payload
            sent += _frame(kind, flags, _STREAMS[stream % len(_STREAMS)], payload)
        _converse(number, sent)

    return check


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _block(*headers: tuple[str, str]) -> bytes:
    encoder = Encoder()
    encoder.header_table_size = 0
    return bytes(encoder.encode(headers, huffman=True))


def _answer(call: int) -> bytes:
    session = pb.StoredSession(value=b"sealed")
    session.ttl.seconds = 60
    results = [pb.BatchResult(put=pb.PutResponse(ttl=session.ttl)), pb.BatchResult(get=pb.GetResponse(session=session))]
    results += [pb.BatchResult(take=pb.TakeResponse()), pb.BatchResult(remove=pb.RemoveResponse(removed=True))]
    results[2].error.code, results[2].error.message = 6, "held"
    stored = pb.WatchEvent(stored=pb.SessionStored(key=_KEY, session=session))
    stored.stored.issue_time.seconds = 1_700_000_000
    removed, purged = pb.WatchEvent(removed=pb.SessionRemoved(key=_KEY)), pb.WatchEvent(purged=pb.NamespacePurged())
    answers = (
        pb.GetResponse(session=session),
        pb.TakeResponse(session=session),
        pb.PutResponse(ttl=session.ttl),
        pb.RemoveResponse(removed=True),
        pb.BatchResponse(results=results),
        pb.BatchResponse(results=results[:2]),
        pb.WatchResponse(events=[stored, removed, purged], position=b"behind", live=True, continued=True),
        pb.BatchResponse(results=results[::3]),
    )
    return answers[call].SerializeToString()


def _frame_lists() -> Iterable[tuple[int, list[tuple[int, int, int, bytes]]]]:
    """Yield what honest stores and odd ones send: a call's number, and kinds, flags, streams, payloads."""
    head = (HEADERS, END_HEADERS, 1, _block((":status", "200"), ("content-type", "application/grpc")))
    tail = (HEADERS, END_HEADERS | END_STREAM, 1, _block(("grpc-status", "0")))
    settings = (SETTINGS, 0, 0, b"\0\4\0\1\0\0" + b"\0\5\0\0\x40\0")
    acks = [settings, (SETTINGS, ACK, 0, b""), (PING, 0, 0, bytes(8)), (WINDOW_UPDATE, 0, 0, b"\0\1\0\0")]
    for call in range(8):
        message = _answer(call)
        body = (DATA, 0, 1, b"\0" + len(message).to_bytes(4, "big") + message)
        yield call, [*acks, head, body, tail]
    failure = _block(("grpc-status", "14"), ("grpc-message", "draining%21"))
    yield 0, [settings, (HEADERS, END_HEADERS | END_STREAM, 1, _block((":status", "200")) + failure)]
    yield 0, [settings, (HEADERS, END_HEADERS | END_STREAM, 1, _block((":status", "503")))]
    yield 1, [settings, (HEADERS, 0, 1, failure[:4]), (CONTINUATION, END_HEADERS, 1, failure[4:])]
    yield 1, [settings, (RST_STREAM, 0, 1, b"\0\0\0\7")]
    yield 3, [settings, (GOAWAY, 0, 0, bytes(8) + b"going"), (RST_STREAM, 0, 1, b"\0\0\0\x08")]
    yield 2, [(SETTINGS, 0, 0, b"\0\4\0\0\0\0"), (WINDOW_UPDATE, 0, 1, b"\0\0\0\1"), head, tail]
    yield (
        0,
        [(HEADERS, END_HEADERS | PADDED | PRIORITY, 1, b"\2" + bytes(5) + head[3] + bytes(2)), (DATA, 8, 1, b"\1\0")],
    )
    yield 0, [(PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\2" + head[3])]


def _http2_byte_seeds() -> Iterable[bytes]:
    for call, frames in _frame_lists():
        yield bytes((call,)) + b"".join(_frame(*frame) for frame in frames)


def _http2_frame_seeds() -> Iterable[bytes]:
    for call, frames in _frame_lists():
        parts = (
            bytes((kind, flags, _STREAMS.index(stream))) + len(payload).to_bytes(2, "big") + payload
            for kind, flags, stream, payload in frames
        )
        yield bytes((call,)) + b"".join(parts)


class _Answers:
    """Stands in for the Channel of a StoreClient: every answer is the same."""

    confirmed = 0.0

    def __init__(self, message: bytes) -> None:
        self._message = message

    def call(self, *_: object) -> bytes:
        """Answer."""
        return self._message

    def stream(self, *_: object) -> _Answers:
        """Answer three times."""
        return self

    def __iter__(self) -> Iterator[bytes]:
        yield from [self._message] * 3
        raise StoreError("the end")

    def cancel(self) -> None:
        """Do nothing."""


def messages() -> Check:
    """Any response message is decoded or rejected, and its users do not break."""
    store = StoreClient("unix:/nowhere", namespace="shop")

    def check(data: bytes) -> None:
        store._channel = cast("Any", _Answers(data[1:]))
        _use(store, int.from_bytes(data[:1], "big"))

    return check


def _message_seeds() -> Iterable[bytes]:
    for call in range(8):
        yield bytes((call,)) + _answer(call)


_CALLS = (
    "resumed/_transport/http2.py",
    "resumed/_transport/channel.py",
    "resumed/_transport/pool.py",
    "resumed/_client/store.py",
    "resumed/_exceptions.py",
)
ANSWERS = (
    Target("http2_bytes", http2_bytes, _http2_byte_seeds, _CALLS, 8_192),
    Target("http2_frames", http2_frames, _http2_frame_seeds, _CALLS, 20_000),
    Target(
        "messages",
        messages,
        _message_seeds,
        ("resumed/_client/store.py", "resumed/_exceptions.py", "resumed/_policy/mirror.py"),
        2_048,
    ),
)
