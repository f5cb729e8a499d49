"""One HTTP/2 connection with a peer whose every byte is controlled by the test."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from hpack import Decoder, Encoder
from hypothesis import given
from hypothesis import strategies as st

from resumed._transport.http2 import (
    MAX_MESSAGE,
    UNAVAILABLE,
    Connection,
    ConnectionBroken,
    RequestNotProcessed,
    Status,
    request_headers,
)
from support.tls import client_context, server_context

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 5, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
CALL = request_headers("store:7400", "/package.Service/Method", False)
SOON = 5.0


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">BHBBL", len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


def block(*headers: tuple[str, str]) -> bytes:
    """Return encoded headers, as a peer without a table makes them."""
    encoder = Encoder()
    encoder.header_table_size = 0
    return bytes(encoder.encode(headers, huffman=True))


def message(data: bytes) -> bytes:
    return struct.pack(">?L", False, len(data)) + data


HEAD = frame(HEADERS, END_HEADERS, 1, block((":status", "200"), ("content-type", "application/grpc")))
TAIL = frame(HEADERS, END_HEADERS | END_STREAM, 1, block(("grpc-status", "0")))
ANSWER = HEAD + frame(DATA, 0, 1, message(b"answer")) + TAIL


def failed(status: str, text: str, stream: int = 1) -> bytes:
    """Return the trailers of a call that failed."""
    return frame(HEADERS, END_HEADERS | END_STREAM, stream, block(("grpc-status", status), ("grpc-message", text)))


def page(status: str) -> bytes:
    headers = frame(HEADERS, END_HEADERS, 1, block((":status", status), ("content-type", "text/html")))
    return headers + frame(DATA, 0, 1, b"<html>" + bytes(10_000)) + frame(DATA, END_STREAM, 1, b"</html>")


class Peer:
    def __init__(self) -> None:
        ours, self.socket = socket.socketpair()
        self.socket.settimeout(SOON)
        self.connection = Connection(ours)

    def call(self, answer: bytes, request: bytes = b"request") -> bytes:
        """Let the connection make a call whose answer is already on its way."""
        if answer:
            self.socket.sendall(answer)
        end = time.monotonic() + SOON
        self.connection.request(CALL, request, end)
        return self.connection.answer(end)

    def sent(self) -> bytes:
        return self.socket.recv(1 << 20)


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.connection.close()
    peer.socket.close()


def test_a_call_and_its_answer(peer: Peer) -> None:
    assert peer.call(ANSWER) == b"answer"
    sent = peer.sent()
    assert sent.startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert sent.endswith(frame(DATA, END_STREAM, 1, message(b"request")))
    assert b"grpc-timeout" in sent
    assert peer.connection.reusable()
    again = ANSWER.replace(b"\0\0\0\1", b"\0\0\0\3")
    assert peer.call(again) == b"answer"
    assert b"PRI" not in peer.sent()


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + frame(DATA, 0, 1, message(b"answer")[:3]) + frame(DATA, 0, 1, message(b"answer")[3:]) + TAIL,
        HEAD + frame(DATA, PADDED, 1, b"\3" + message(b"answer") + bytes(3)) + TAIL,
        frame(HEADERS, 0, 1, HEAD[9:12]) + frame(CONTINUATION, END_HEADERS, 1, HEAD[12:]) + ANSWER[len(HEAD) :],
        frame(HEADERS, END_HEADERS | PRIORITY, 1, bytes(5) + HEAD[9:]) + ANSWER[len(HEAD) :],
        frame(SETTINGS, 0, 0) + frame(PING, 0, 0, b"12345678") + frame(99, 0, 0, b"?") + ANSWER,
        frame(DATA, 0, 5, b"of no call") + ANSWER,
        frame(HEADERS, END_HEADERS, 1, block((":status", "103"), ("link", "</x>"))) + ANSWER,
    ],
    ids=[
        "in pieces",
        "padded",
        "continued headers",
        "with a priority",
        "other frames",
        "unknown stream",
        "early hints",
    ],
)
def test_frames_that_the_protocol_allows_are_understood(peer: Peer, answer: bytes) -> None:
    """RFC 9113 sections 4 to 6."""
    assert peer.call(answer) == b"answer"


def test_an_answer_may_come_byte_by_byte(peer: Peer) -> None:
    def dribble() -> None:
        for byte in ANSWER:
            peer.socket.sendall(bytes([byte]))

    thread = threading.Thread(target=dribble)
    thread.start()
    assert peer.call(b"") == b"answer"
    thread.join()


def test_pings_and_settings_are_acknowledged(peer: Peer) -> None:
    peer.call(frame(SETTINGS, 0, 0) + frame(PING, 0, 0, b"12345678") + ANSWER)
    assert peer.sent().endswith(frame(SETTINGS, ACK, 0) + frame(PING, ACK, 0, b"12345678"))


def test_received_data_is_as_old_as_the_last_answered_ping(peer: Peer) -> None:
    peer.socket.sendall(HEAD + frame(DATA, 0, 1, message(b"one")))
    end = time.monotonic() + SOON
    before = time.monotonic()
    peer.connection.request(CALL, b"request", end, lasts=True)
    begun = peer.connection.confirmed
    assert before <= begun <= time.monotonic()
    assert peer.connection.message(end) == b"one"
    for _ in range(3):
        peer.connection.ping()
    assert peer.sent().count(frame(PING, 0, 0, bytes(8))) == 1
    pinged = time.monotonic()
    peer.socket.sendall(frame(DATA, 0, 1, message(b"two")))
    assert peer.connection.message(end) == b"two"
    assert peer.connection.confirmed == begun
    peer.socket.sendall(frame(PING, ACK, 0, bytes(8)) + frame(DATA, 0, 1, message(b"three")))
    assert peer.connection.message(end) == b"three"
    assert begun < peer.connection.confirmed <= pinged
    peer.connection.ping()
    assert peer.sent() == frame(PING, 0, 0, bytes(8))


def test_pings_are_answered_between_calls(peer: Peer) -> None:
    peer.call(ANSWER)
    peer.sent()
    peer.socket.sendall(frame(PING, 0, 0, b"12345678")[:5])
    assert peer.connection.reusable()
    peer.socket.sendall(frame(PING, 0, 0, b"12345678")[5:])
    assert peer.connection.reusable()
    assert peer.sent() == frame(PING, ACK, 0, b"12345678")


def test_a_peer_that_does_not_read_gets_no_further_call(peer: Peer) -> None:
    """A partially written PING acknowledgement may be in flight."""
    peer.call(ANSWER)
    peer.connection._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    peer.socket.sendall(frame(PING, 0, 0, b"12345678") * 3000)
    assert not peer.connection.reusable()


def test_where_there_is_no_poll_connections_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("select.poll")
    peer = Peer()
    with peer.socket, contextlib.closing(peer.connection):
        peer.call(ANSWER)
        assert peer.connection.reusable()
        peer.socket.sendall(frame(PING, 0, 0, b"12345678"))
        assert peer.connection.reusable()
        peer.socket.shutdown(socket.SHUT_WR)
        assert not peer.connection.reusable()


@pytest.mark.parametrize("ending", ["closed", "going away"])
def test_a_connection_that_ended_meanwhile_is_not_used_again(peer: Peer, ending: str) -> None:
    peer.call(ANSWER)
    if ending == "closed":
        peer.socket.shutdown(socket.SHUT_WR)
    else:
        peer.socket.sendall(frame(GOAWAY, 0, 0, struct.pack(">LL", 1, 0)))
    assert not peer.connection.reusable()


def test_a_call_that_the_peer_accepted_before_it_goes_is_answered(peer: Peer) -> None:
    assert peer.call(frame(GOAWAY, 0, 0, struct.pack(">LL", 2**31 - 1, 0)) + ANSWER) == b"answer"
    assert not peer.connection.reusable()


@pytest.mark.parametrize(
    "answer",
    [frame(GOAWAY, 0, 0, struct.pack(">LL", 0, 0)), frame(RST_STREAM, 0, 1, struct.pack(">L", 7))],
    ids=["going away", "refused stream"],
)
def test_requests_that_the_peer_did_not_process_are_distinguished(peer: Peer, answer: bytes) -> None:
    with pytest.raises(RequestNotProcessed):
        peer.call(answer)


@pytest.mark.parametrize(
    ("answer", "number", "text"),
    [
        (failed("14", "the engine%20is down: %E2%82%AC"), 14, "the engine is down: €"),
        (HEAD + failed("8", "full"), 8, "full"),
        (HEAD + failed("many", ""), 2, ""),
        (frame(HEADERS, END_HEADERS | END_STREAM, 1, block((":status", "503"))), UNAVAILABLE, "HTTP status 503"),
        (frame(HEADERS, END_HEADERS | END_STREAM, 1, block((":status", "404"))), 12, "HTTP status 404"),
        (page("503"), UNAVAILABLE, "HTTP status 503"),
        (page("429"), UNAVAILABLE, "HTTP status 429"),
        (page("403"), 7, "HTTP status 403"),
        (page("200"), 2, "HTTP status 200"),
        (HEAD + frame(RST_STREAM, 0, 1, struct.pack(">L", 8)), 1, "HTTP/2 error 8"),
    ],
)
def test_failures_have_a_number_and_the_peers_words(peer: Peer, answer: bytes, number: int, text: str) -> None:
    with pytest.raises(Status) as caught:
        peer.call(answer)
    assert caught.value.number == number
    assert text in caught.value.message
    assert peer.connection.reusable()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        HEAD + frame(DATA, END_STREAM, 1, message(b"answer")),
        HEAD + frame(DATA, 0, 1, message(b"answer")[:-1]) + TAIL,
        HEAD + frame(DATA, 0, 1, message(b"one") + message(b"two")) + TAIL,
        HEAD + TAIL,
        HEAD + frame(DATA, 0, 1, struct.pack(">?L", True, 3) + b"zip") + TAIL,
        HEAD + frame(DATA, 0, 1, struct.pack(">?L", False, MAX_MESSAGE + 1)),
        HEAD + frame(DATA, PADDED, 1, b"\xff" + message(b"answer")),
        frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff"),
        frame(HEADERS, END_HEADERS, 1, b"\xbe"),
        frame(HEADERS, 0, 1, HEAD[9:]) + frame(DATA, 0, 1),
        frame(CONTINUATION, END_HEADERS, 1, HEAD[9:]),
        frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4)),
        frame(DATA, 0, 1, bytes(16_385)),
    ],
    ids=[
        *("HTTP/1", "no status", "half a message", "two messages", "no message", "compressed", "too long"),
        *("bad padding", "bad headers", "a table entry", "headers broken off", "a stray continuation", "a push"),
        "a frame too long",
    ],
)
def test_frames_that_the_protocol_forbids_end_the_connection(peer: Peer, answer: bytes) -> None:
    with pytest.raises(ConnectionBroken):
        peer.call(answer)


def test_a_peer_that_closes_ends_the_call(peer: Peer) -> None:
    peer.socket.sendall(HEAD)
    peer.socket.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionBroken):
        peer.call(b"")


def test_nothing_is_sent_after_the_deadline(peer: Peer) -> None:
    with pytest.raises(TimeoutError):
        peer.connection.request(CALL, b"", time.monotonic() - 1)


def test_a_silent_peer_is_not_waited_for_beyond_the_deadline(peer: Peer) -> None:
    end = time.monotonic() + 0.05
    peer.connection.request(CALL, b"", end)
    with pytest.raises(TimeoutError):
        peer.connection.answer(end)
    with pytest.raises(TimeoutError):
        peer.connection.request(CALL, bytes(100_000), time.monotonic() + 0.05)


def test_a_large_request_waits_for_the_peers_windows(peer: Peer) -> None:
    """RFC 9113 section 5.2."""
    body = bytes(200_000)
    received, raw = bytearray(), bytearray()

    def serve() -> None:
        granted = 65_535
        while len(received) < len(body) + 5:
            read = peer.socket.recv(1 << 20)
            frames = bytearray(read)
            if b"PRI" in frames:
                del frames[: 24 + 9 + 18 + 13]
            raw.extend(frames)
            while len(raw) >= 9:
                length = int.from_bytes(raw[:3], "big")
                if len(raw) < 9 + length:
                    break
                assert length <= 16_384
                if raw[3] == DATA:
                    received.extend(raw[9 : 9 + length])
                del raw[: 9 + length]
            assert len(received) <= granted
            if len(received) == granted:
                granted += 50_000
                more = struct.pack(">L", 50_000)
                peer.socket.sendall(frame(WINDOW_UPDATE, 0, 0, more) + frame(WINDOW_UPDATE, 0, 1, more))
        peer.socket.sendall(ANSWER)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert peer.call(b"", body) == b"answer"
    thread.join()
    assert bytes(received[5:]) == body


def test_a_peer_may_refuse_a_large_request_before_it_has_it_all(peer: Peer) -> None:
    with pytest.raises(Status, match="too large"):
        peer.call(failed("8", "too large"), bytes(100_000))
    assert not peer.connection.reusable()


def test_a_long_stream_gives_back_what_it_read(peer: Peer) -> None:
    peer.connection.request(CALL, b"", time.monotonic() + SOON, lasts=True)
    peer.sent()

    def serve() -> None:
        peer.socket.sendall(HEAD)
        for _ in range(40):
            peer.socket.sendall(frame(DATA, 0, 1, struct.pack(">?L", False, 1 << 20)))
            for _ in range(64):
                peer.socket.sendall(frame(DATA, 0, 1, bytes(16_384)))
        peer.socket.sendall(TAIL)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    messages = 0
    while peer.connection.message(time.monotonic() + SOON) is not None:
        messages += 1
    thread.join()
    assert messages == 40
    updates = peer.sent()
    assert updates[3] == WINDOW_UPDATE
    assert int.from_bytes(updates[9:13], "big") > MAX_MESSAGE


@given(st.binary(max_size=200), st.integers(0, len(ANSWER)))
def test_arbitrary_bytes_at_worst_end_the_connection(noise: bytes, position: int) -> None:
    peer = Peer()
    try:
        peer.socket.sendall(ANSWER[:position] + noise + ANSWER[position:])
        peer.socket.shutdown(socket.SHUT_WR)
        peer.call(b"")
        peer.connection.reusable()
    except (Status, ConnectionBroken):
        pass
    finally:
        peer.connection.close()
        peer.socket.close()


@pytest.mark.parametrize("length", [1, 126, 127, 128, 253])
def test_names_of_every_length_reach_the_server(length: int) -> None:
    authority = "s" * length
    headers = Decoder().decode(request_headers(authority, "/package.Service/Method", False))
    assert {str(name): str(value) for name, value in headers} == {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/package.Service/Method",
        ":authority": authority,
        "content-type": "application/grpc",
        "te": "trailers",
    }


@pytest.mark.parametrize("size", [0, 3, 5, 16_000])
def test_a_reset_with_no_code_or_too_long_a_one_is_broken(peer: Peer, size: int) -> None:
    with pytest.raises(ConnectionBroken):
        peer.call(frame(RST_STREAM, 0, 1, b"\xff" * size))


def test_an_answer_that_does_not_end_while_the_request_must_wait_is_broken(peer: Peer) -> None:
    peer.connection._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)  # the peer does not read
    peer.socket.sendall(frame(SETTINGS, 0, 0, struct.pack(">HL", 4, 0)))

    def send() -> None:
        with contextlib.suppress(OSError):
            for _ in range(2 * MAX_MESSAGE // 16_384):
                peer.socket.sendall(frame(DATA, 0, 1, bytes(16_384)))

    sender = threading.Thread(target=send)
    sender.start()
    try:
        with pytest.raises(ConnectionBroken, match="too long"):
            peer.connection.request(CALL, bytes(100_000), time.monotonic() + 3 * SOON)
        assert len(peer.connection._message) < 2 * MAX_MESSAGE
    finally:
        peer.connection.close()
        sender.join()


def test_a_call_that_lasts_is_sent_in_time_or_not_at_all(peer: Peer) -> None:
    peer.socket.sendall(frame(SETTINGS, 0, 0, struct.pack(">HL", 4, 0)))
    peer.connection.request(CALL, b"", time.monotonic() + SOON)
    with pytest.raises((ConnectionBroken, TimeoutError)):
        peer.connection.answer(time.monotonic() + 0.05)
    with pytest.raises(TimeoutError):
        peer.connection.request(CALL, b"request", time.monotonic() + 0.05, lasts=True)


def test_after_a_cancelled_call_nothing_is_read_without_tls() -> None:
    """A socket that forgets its TLS object would hand plaintext of the network to the caller."""
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(server_context("ssl").wrap_socket, theirs, server_side=True)
        context = client_context(ssl.TLSVersion.TLSv1_3)
        connection = Connection(context.wrap_socket(ours, server_hostname="localhost"))
        peer = accepted.result(SOON)
    end = time.monotonic() + SOON
    connection.request(CALL, b"request", end, lasts=True)
    peer.sendall(HEAD + frame(DATA, 0, 1, message(b"first")))
    assert connection.message(end) == b"first"
    socket.socket.sendall(peer, frame(DATA, 0, 1, message(b"forged")))
    connection.cancel()
    with pytest.raises(ConnectionBroken):
        connection.message(end)
    connection.close()
    peer.close()
