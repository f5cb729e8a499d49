"""Calls to real gRPC servers: TLS and its rotation, several servers, aging connections, unix sockets."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trustme

import resumed
from resumed import Credentials, StoreClient
from resumed._transport.channel import Channel, Method
from resumed._transport.pool import _FIRST_BACKOFF, IDLE_SECONDS, ConnectionPool
from resumed._transport.target import Target
from support.ports import free_port
from support.relay import Relay
from support.server import running_server
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from resumed._transport.http2 import Connection
    from resumed._transport.target import SocketAddress

ECHO, ONCE = Method("/test.Service/Echo", repeatable=True), Method("/test.Service/Echo", repeatable=False)
LONG = 10.0


class Server:
    """A gRPC server of grpcio whose only method does what `behaviour` says."""

    def __init__(
        self,
        behaviour: Callable[[bytes, grpc.ServicerContext], bytes] = lambda request, _: request,
        listen: str = "127.0.0.1:0",
        credentials: grpc.ServerCredentials | None = None,
        **options: int,
    ) -> None:
        self.calls: list[bytes] = []
        self.peers: set[str] = set()

        def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.calls.append(request)
            self.peers.add(context.peer())
            return behaviour(request, context)

        self._server = grpc.server(
            ThreadPoolExecutor(8),
            options=[("grpc.so_reuseport", 0), *((f"grpc.{name}", value) for name, value in options.items())],
        )
        handlers: dict[str, Any] = {"Echo": grpc.unary_unary_rpc_method_handler(handle)}
        self._server.add_registered_method_handlers("test.Service", handlers)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", handlers),))
        add = self._server.add_secure_port if credentials else self._server.add_insecure_port
        self.port = add(*((listen, credentials) if credentials else (listen,)))
        self._server.start()

    def stop(self, grace: float | None = None) -> None:
        self._server.stop(grace).wait()


@contextlib.contextmanager
def serving(*arguments: Any, **options: Any) -> Iterator[Server]:
    server = Server(*arguments, **options)
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def channel_to(*targets: str | Server, credentials: Credentials | None = None) -> Iterator[Channel]:
    """Open a channel to one target, or to several servers."""
    names = [each if isinstance(each, str) else f"127.0.0.1:{each.port}" for each in targets]
    channel = Channel(names[0] if len(names) == 1 else f"ipv4:{','.join(names)}", credentials)
    try:
        yield channel
    finally:
        channel.close()


def resolve_to(ports: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let names resolve to the ports of 127.0.0.1 in the list, which may change at any time."""

    def resolve(_: Target) -> list[SocketAddress]:
        return [(socket.AF_INET, ("127.0.0.1", port)) for port in ports]

    monkeypatch.setattr(Target, "resolve", resolve)
    monkeypatch.setattr("resumed._transport.pool.RESOLVE_SECONDS", 0.0)


@pytest.mark.parametrize("size", [0, 1, 16_379, 16_380, 65_536, 1 << 20])
def test_messages_of_any_size_go_there_and_back(size: int) -> None:
    with serving(max_receive_message_length=1 << 21) as server, channel_to(server) as channel:
        message = os.urandom(size)
        for _ in range(5):
            assert channel.call(ECHO, message, LONG) == message
        assert len(server.peers) == 1


def test_connections_are_used_again_and_shared_by_no_two_calls() -> None:
    barrier = threading.Barrier(4)

    def together(request: bytes, _: grpc.ServicerContext) -> bytes:
        barrier.wait(LONG)
        return request

    with serving(together) as server, channel_to(server) as channel, ThreadPoolExecutor(4) as threads:
        for _ in range(10):
            list(threads.map(lambda number: channel.call(ECHO, b"%d" % number, LONG), range(4)))
        assert len(server.peers) == 4


def test_errors_keep_the_servers_words() -> None:
    def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "voll: 100 % à la €")

    with serving(refuse) as server, channel_to(server) as channel:
        for _ in range(2):
            with pytest.raises(resumed.StoreError, match="RESOURCE_EXHAUSTED: voll: 100 % à la €"):
                channel.call(ECHO, b"", LONG)
        assert len(server.peers) == 1


def test_a_call_is_repeated_at_an_unavailable_server_if_that_is_safe() -> None:
    """The server may be overloaded, so there is one retry, after a pause."""

    def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNAVAILABLE, "not now")

    with serving(refuse) as server, channel_to(server) as channel:
        for method in (ECHO, ONCE):
            with pytest.raises(resumed.StoreUnavailable, match="not now"):
                channel.call(method, method.path.encode() + b"%d" % method.repeatable, LONG)
    assert [call[-1:] for call in server.calls] == [b"1"] * 2 + [b"0"]


def test_a_call_goes_to_another_server_if_one_is_unavailable() -> None:
    def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNAVAILABLE, "not now")

    with serving(refuse) as unavailable, serving() as well, channel_to(unavailable, well) as channel:
        for _ in range(50):
            assert channel.call(ECHO, b"x", LONG) == b"x"
        assert len(well.calls) == 50
        assert 1 <= len(unavailable.calls) < 25


def test_a_call_waits_for_a_connection_to_another_server_if_one_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_again = threading.Event()

    def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
        if len(unavailable.calls) > 1:
            asked_again.set()
        context.abort(grpc.StatusCode.UNAVAILABLE, "not now")

    def connect_late(pool: ConnectionPool, where: SocketAddress, end: float) -> Connection:
        if where[1][1] == well.port:
            asked_again.wait(0.2)
        return connect(pool, where, end)

    connect = ConnectionPool._connect
    monkeypatch.setattr(ConnectionPool, "_connect", connect_late)
    with serving(refuse) as unavailable, serving() as well, channel_to(unavailable, well) as channel:
        assert channel.call(ECHO, b"x", LONG) == b"x"
        assert len(unavailable.calls) == 1


def test_no_time_is_no_second_try() -> None:
    def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNAVAILABLE, "not now")

    with serving(refuse) as server, channel_to(server) as channel:
        with pytest.raises(resumed.StoreUnavailable):
            channel.call(ECHO, b"", LONG)
        server.calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("resumed._transport.channel._LONGEST_PAUSE", 10 * LONG)
            with pytest.raises(resumed.StoreUnavailable, match="not now"):
                channel.call(ECHO, b"", LONG)
    assert len(server.calls) == 1


def test_a_defect_of_this_program_is_no_outage_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise an operator would look for the fault in the server."""

    def defective(_: socket.socket) -> None:
        raise AttributeError("module 'select' has no attribute 'poll'")

    with serving() as server, channel_to(server) as channel:
        with monkeypatch.context() as patch:
            patch.setattr("resumed._transport.pool.Connection", defective)
            with pytest.raises(RuntimeError) as caught:
                channel.call(ECHO, b"x", LONG)
            assert isinstance(caught.value.__cause__, AttributeError)
        until(lambda: not any(each.backing_off for each in channel._connections._servers))
        assert channel.call(ECHO, b"x", LONG) == b"x"


def test_the_server_knows_the_deadline_and_the_caller_keeps_it() -> None:
    remaining: list[float | None] = []
    release = threading.Event()

    def slow(_: bytes, context: grpc.ServicerContext) -> bytes:
        remaining.append(context.time_remaining())
        release.wait(LONG)
        return b""

    with serving(slow) as server, channel_to(server) as channel:
        started = time.monotonic()
        with pytest.raises(resumed.StoreTimeout, match=r"100 ms|DEADLINE_EXCEEDED"):  # the client or the server
            channel.call(ECHO, b"", 0.1)
        assert time.monotonic() - started < LONG / 2
        release.set()
        assert channel.call(ECHO, b"", 100) == b""  # the late response is discarded
    assert remaining[0] is not None
    assert remaining[0] <= 0.1
    assert remaining[1] is not None
    assert 90 < remaining[1] <= 100


def test_calls_take_turns_between_servers() -> None:
    with serving() as one, serving() as other, channel_to(one, other) as channel:
        while not (one.calls and other.calls):  # until there is a connection to each
            channel.call(ECHO, b"", LONG)
        before = len(one.calls), len(other.calls)
        for _ in range(10):
            channel.call(ECHO, b"", LONG)
        assert (len(one.calls), len(other.calls)) == (before[0] + 5, before[1] + 5)


def test_a_server_that_hangs_is_left_alone() -> None:
    """It still accepts connections, so only unanswered calls reveal it."""
    stopped = threading.Event()

    def hang(request: bytes, _: grpc.ServicerContext) -> bytes:
        stopped.wait(LONG)
        return request

    late, began = 0, time.monotonic()
    with serving() as well, serving(hang) as hangs, channel_to(well, hangs) as channel:
        for _ in range(60):
            try:
                channel.call(ECHO, b"call", 0.5)  # also a busy machine answers within this time
            except resumed.StoreTimeout:
                late += 1
        stopped.set()
    pauses = (time.monotonic() - began) / _FIRST_BACKOFF
    assert late <= 2 + math.log2(1 + pauses), "a few, each pause twice as long as the one before"
    assert len(well.calls) == 60 - late


def test_a_connection_that_was_idle_for_long_is_not_used() -> None:
    """A middlebox may have dropped the connection silently."""
    with serving() as server, channel_to(server) as channel:
        channel.call(ECHO, b"one", LONG)
        channel.call(ECHO, b"two", LONG)
        assert len(server.peers) == 1
        free = channel._connections._servers[0]._free
        free.append((free.pop()[0], time.monotonic() - IDLE_SECONDS - 1))
        channel.call(ECHO, b"three", LONG)
        assert len(server.peers) == 2


def test_a_call_without_an_answer_ends_all_connections_of_before() -> None:
    """They may all be dead, and each would cost a call its deadline."""
    together = threading.Barrier(6)

    def answer(request: bytes, _: grpc.ServicerContext) -> bytes:
        if request == b"together":
            together.wait(LONG)
        return request

    with (
        serving(answer) as server,
        contextlib.closing(Relay(f"127.0.0.1:{server.port}")) as relay,
        channel_to(relay.target) as channel,
        ThreadPoolExecutor(6) as threads,
    ):
        calls = [threads.submit(channel.call, ECHO, b"together", LONG) for _ in range(6)]
        assert [call.result() for call in calls] == [b"together"] * 6
        relay.delay = LONG
        with pytest.raises(resumed.StoreTimeout, match="no answer"):
            channel.call(ECHO, b"silence", 0.05)
        relay.delay = 0.0
        before = set(server.peers)
        assert channel.call(ECHO, b"again", LONG) == b"again"
        assert server.peers - before, "it has a connection of its own"


def test_a_server_that_is_down_costs_no_call() -> None:
    """A call that was not sent may always be retried."""
    with serving() as server, channel_to(f"ipv4:127.0.0.1:{free_port()},127.0.0.1:{server.port}") as channel:
        for _ in range(6):
            assert channel.call(ONCE, b"x", LONG) == b"x"
        assert len(server.calls) == 6


def test_a_server_that_stops_loses_no_call_and_is_found_again() -> None:
    port = free_port()
    with serving() as other, channel_to(f"ipv4:127.0.0.1:{port},127.0.0.1:{other.port}") as channel:
        for _ in range(2):
            with serving(listen=f"127.0.0.1:{port}") as one:
                end = time.monotonic() + LONG
                while not one.calls:
                    assert channel.call(ECHO, b"", LONG) == b""
                    assert time.monotonic() < end
                stopping = threading.Thread(target=one.stop, args=(LONG,))
                stopping.start()
                while stopping.is_alive():
                    channel.call(ECHO, b"", LONG)
            for _ in range(4):
                channel.call(ONCE, b"", LONG)


def test_while_nothing_listens_calls_fail_at_once() -> None:
    with channel_to(f"127.0.0.1:{free_port()}") as channel:
        with pytest.raises(resumed.StoreUnavailable, match="refused"):
            channel.call(ECHO, b"", LONG)
        with pytest.raises(resumed.StoreUnavailable, match="a moment ago"):
            channel.call(ECHO, b"", LONG)


def test_connections_age_without_an_error() -> None:
    """The server sends GOAWAY during steady traffic of calls that must not be repeated."""
    with serving(max_connection_age_ms=200, max_connection_age_grace_ms=1_000) as server, channel_to(server) as channel:
        end = time.monotonic() + LONG
        while len(server.peers) < 4:
            assert channel.call(ONCE, b"x", LONG) == b"x"
            assert time.monotonic() < end


def test_a_unix_socket(tmp_path: Path) -> None:
    with serving(listen=f"unix:{tmp_path}/store.sock"):
        for name in (f"unix:{tmp_path}/store.sock", f"unix://{tmp_path}/store.sock"):
            with channel_to(name) as channel:
                assert channel.call(ECHO, b"x", LONG) == b"x"


def test_a_name_is_looked_up_while_calls_wait_no_longer_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    with serving() as server:

        def slowly(_: Target) -> list[Any]:
            release.wait(LONG)
            return [(socket.AF_INET, ("127.0.0.1", server.port))]

        monkeypatch.setattr(Target, "resolve", slowly)
        with channel_to("dns:///store.example:7400") as channel:
            with pytest.raises(resumed.StoreUnavailable, match="does not resolve in time"):
                channel.call(ECHO, b"", 0.05)
            release.set()
            assert channel.call(ECHO, b"x", LONG) == b"x"


def test_new_addresses_are_found_when_a_server_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as one, serving() as other:
        ports = [one.port]
        resolve_to(ports, monkeypatch)
        with channel_to("dns:///store.example:7400") as channel:
            channel.call(ECHO, b"", LONG)
            ports[:] = [other.port]
            one.stop()
            end = time.monotonic() + LONG
            while not other.calls:
                with contextlib.suppress(resumed.StoreUnavailable):
                    channel.call(ECHO, b"", LONG)
                assert time.monotonic() < end


def blocked(monkeypatch: pytest.MonkeyPatch, *ports: int) -> threading.Event:
    """Delay connections to these ports until the returned event is set."""
    connect, release = ConnectionPool._connect, threading.Event()

    def slowly(self: ConnectionPool, where: SocketAddress, end: float) -> Connection:
        assert where[1][1] not in ports or release.wait(LONG)
        return connect(self, where, end)

    monkeypatch.setattr(ConnectionPool, "_connect", slowly)
    return release


def test_no_call_waits_for_a_server_while_another_one_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as one, serving() as other, channel_to(one, other) as channel:
        release = blocked(monkeypatch, other.port)
        for _ in range(6):
            assert channel.call(ONCE, b"x", LONG) == b"x"
        assert not release.is_set()
        assert (len(one.calls), len(other.calls)) == (6, 0)
        release.set()
        end = time.monotonic() + LONG
        while not other.calls:
            channel.call(ONCE, b"x", LONG)
            assert time.monotonic() < end


def test_a_connection_that_is_ready_too_late_is_there_for_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server, channel_to(server) as channel:
        release = blocked(monkeypatch, server.port)
        with pytest.raises(resumed.StoreTimeout, match="no connection in time"):
            channel.call(ECHO, b"", 0.05)
        release.set()
        (known,) = channel._connections._servers
        end = time.monotonic() + LONG
        while known.connecting:
            assert time.monotonic() < end
        assert channel.call(ECHO, b"x", LONG) == b"x"
        assert len(server.peers) == 1


def test_a_call_waits_for_a_slow_server_while_it_has_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server, channel_to(server) as channel, ThreadPoolExecutor(1) as thread:
        release = blocked(monkeypatch, server.port)
        answered = thread.submit(channel.call, ONCE, b"x", LONG)
        connections, end = channel._connections, time.monotonic() + LONG
        while not (connections._servers and connections._servers[0].connecting):
            assert time.monotonic() < end
        with connections._changed:
            connections._failed(connections._servers[0], "no connection in time")
        with pytest.raises(resumed.StoreUnavailable, match="a moment ago"):
            channel.call(ONCE, b"x", LONG)
        release.set()
        assert answered.result(LONG) == b"x"


def test_calls_that_begin_together_wait_for_any_connection() -> None:
    with serving() as server, channel_to(server) as channel, ThreadPoolExecutor(32) as threads:
        assert list(threads.map(lambda _: channel.call(ONCE, b"x", LONG), range(200))) == [b"x"] * 200
        (known,) = channel._connections._servers
        assert not known.connecting
        assert channel._connections._waiting == 0


def test_servers_that_were_added_are_found_when_connections_age(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(max_connection_age_ms=200, max_connection_age_grace_ms=60_000) as one, serving() as other:
        ports = [one.port]
        resolve_to(ports, monkeypatch)
        with channel_to("dns:///store.example:7400") as channel:
            channel.call(ONCE, b"", LONG)
            ports.append(other.port)
            end = time.monotonic() + LONG
            while not other.calls:
                channel.call(ONCE, b"", LONG)
                assert time.monotonic() < end


def test_without_new_threads_calls_connect_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that shuts down starts no threads, but still flushes its queue."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "resumed-connector":
            raise RuntimeError("can't create new thread at interpreter shutdown")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with serving() as server, channel_to(server) as channel:
        assert channel.call(ECHO, b"x", LONG) == b"x"


def test_a_name_that_does_not_resolve_is_an_error_that_says_so() -> None:
    with (
        channel_to("dns:///no-such-host.invalid:7400") as channel,
        pytest.raises(resumed.StoreUnavailable, match="does not resolve"),
    ):
        channel.call(ECHO, b"", LONG)


@pytest.mark.parametrize(
    ("text", "hosts", "path"),
    [
        ("127.0.0.1:7400", [("127.0.0.1", 7400)], ""),
        ("[::1]:7400", [("::1", 7400)], ""),
        ("store:7400", [("store", 7400)], ""),
        ("dns:///store.example.org:7400", [("store.example.org", 7400)], ""),
        ("dns:store:7400", [("store", 7400)], ""),
        ("ipv4:10.0.0.1:1,10.0.0.2:2", [("10.0.0.1", 1), ("10.0.0.2", 2)], ""),
        ("ipv6:[::1]:1,[::2]:2", [("::1", 1), ("::2", 2)], ""),
        ("unix:/run/store.sock", [], "/run/store.sock"),
        ("unix:///run/store.sock", [], "/run/store.sock"),
        ("unix:store.sock", [], "store.sock"),
        ("unix-abstract:store", [], "\0store"),
    ],
)
def test_targets_are_written_as_grpc_writes_them(text: str, hosts: list[tuple[str, int]], path: str) -> None:
    """https://github.com/grpc/grpc/blob/master/doc/naming.md."""
    target = Target.parse(text)
    assert (list(target.hosts), target.path) == (hosts, path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "store",
        "store:",
        "store:99999",
        "xds:///store",
        "dns://8.8.8.8/store:1",
        "a b:1",
        "a\x04:1",
        "unix:a\0b",
        "a\udc80:1",
    ],
)
def test_other_targets_are_refused_at_once(text: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        StoreClient(text, namespace="shop")


@pytest.mark.parametrize("host", ["a..b", ".", "a" * 64])
def test_a_host_that_no_resolver_takes_is_refused_at_once(host: str) -> None:
    with pytest.raises(ValueError, match="is no host name"):
        StoreClient(f"dns:///{host}:7400", namespace="shop")


class Files:
    """PEM files of a frontend and its store, each with a certificate of one authority."""

    def __init__(self, directory: Path) -> None:
        self.ca, self.cert, self.key = (directory / name for name in ("ca.pem", "cert.pem", "key.pem"))
        self.renew(trustme.CA())

    def renew(self, authority: trustme.CA) -> None:
        """Replace them all, each in one step, as a Kubernetes Secret does."""
        self.authority = authority
        leaf = authority.issue_cert("frontend.example")
        contents = {
            self.ca: authority.cert_pem.bytes(),
            self.cert: leaf.cert_chain_pems[0].bytes(),
            self.key: leaf.private_key_pem.bytes(),
        }
        for path, content in contents.items():
            new = path.with_suffix(".new")
            new.write_bytes(content)
            new.replace(path)

    def server_credentials(self, name: str = "localhost") -> grpc.ServerCredentials:
        """Return those of a server that trusts the same authority, and only clients of it."""
        leaf = self.authority.issue_cert(name, "127.0.0.1")
        return grpc.ssl_server_credentials(
            [(leaf.private_key_pem.bytes(), leaf.cert_chain_pems[0].bytes())],
            self.authority.cert_pem.bytes(),
            require_client_auth=True,
        )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_mutual_tls(files: Files) -> None:
    def who(_: bytes, context: grpc.ServicerContext) -> bytes:
        (name,) = context.auth_context()["x509_subject_alternative_name"]
        return bytes(name)

    with (
        serving(who, credentials=files.server_credentials()) as server,
        channel_to(server, credentials=Credentials(ca=files.ca, cert=files.cert, key=files.key)) as channel,
    ):
        for _ in range(3):
            assert channel.call(ECHO, b"", LONG) == b"frontend.example"
        assert len(server.peers) == 1


def test_a_server_that_is_not_the_right_one_is_not_talked_to(files: Files, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Files(tmp_path / "other")
    credentials = Credentials(ca=files.ca, cert=files.cert, key=files.key)
    misnamed = Credentials(ca=files.ca, cert=files.cert, key=files.key, server_name="bank.example")
    for server_credentials, used, reason in (
        (other.server_credentials(), credentials, "self-signed certificate|unable to get local issuer"),
        (files.server_credentials(), misnamed, "bank.example"),
        (None, credentials, "."),
    ):
        with (
            serving(credentials=server_credentials) as server,
            channel_to(server, credentials=used) as channel,
            pytest.raises(resumed.StoreUnavailable, match=reason),
        ):
            channel.call(ECHO, b"", LONG)
        assert not server.calls


def test_a_frontend_without_a_certificate_is_not_served(files: Files) -> None:
    with (
        serving(credentials=files.server_credentials()) as server,
        channel_to(server, credentials=Credentials(ca=files.ca)) as channel,
        pytest.raises(resumed.StoreUnavailable),
    ):
        channel.call(ECHO, b"", LONG)
    assert not server.calls


def test_certificates_are_rotated_under_traffic(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resumed._reload.CHECK_SECONDS", 0.0)
    credentials = Credentials(ca=files.ca, cert=files.cert, key=files.key)
    with (
        serving(credentials=files.server_credentials()) as server,
        channel_to(server, credentials=credentials) as channel,
    ):
        for generation in range(1, 4):
            for _ in range(5):
                assert channel.call(ONCE, b"x", LONG) == b"x"
            assert len(server.peers) == generation
            files.renew(files.authority)


def test_half_a_rotation_changes_nothing(
    files: Files, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A key without its certificate keeps the previous pair, with one log line."""
    monkeypatch.setattr("resumed._reload.CHECK_SECONDS", 0.0)
    credentials = Credentials(ca=files.ca, cert=files.cert, key=files.key)
    with (
        serving(credentials=files.server_credentials()) as server,
        channel_to(server, credentials=credentials) as channel,
    ):
        files.key.write_bytes(files.authority.issue_cert("frontend.example").private_key_pem.bytes())
        for _ in range(3):
            assert channel.call(ECHO, b"x", LONG) == b"x"
        assert len(server.peers) == 1
    (complaint,) = [record.message for record in caplog.records if "not read again" in record.message]
    assert complaint.endswith(f"{files.cert} and {files.key} are no certificate and its key (KEY_VALUES_MISMATCH)")


@pytest.mark.parametrize("damage", ["ca", "cert", "key", "encrypted"])
def test_bad_files_are_reported_at_once(files: Files, damage: str) -> None:
    if damage == "encrypted":
        files.key.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
    else:
        getattr(files, damage).write_text("nonsense")
    with pytest.raises(resumed.CredentialsError, match="no certificate"):
        Credentials(ca=files.ca, cert=files.cert, key=files.key)
    getattr(files, damage if damage != "encrypted" else "key").unlink()
    with pytest.raises(resumed.CredentialsError, match="No such file"):
        Credentials(ca=files.ca, cert=files.cert, key=files.key)
    with pytest.raises(ValueError, match="cert"):
        Credentials(key=files.key)


FORKING = """
import contextlib, os, socket, sys, threading
from pathlib import Path
from resumed._transport.channel import Channel, Method

method, patience, port = Method(sys.argv[1], repeatable=True), float(sys.argv[2]), int(sys.argv[3])


def connections():
    count = 0
    for descriptor in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):
            if descriptor.readlink().name.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(descriptor.name))) as each:
                    count += each.getpeername()[1:] == (port,)
    return count


with contextlib.closing(Channel(f"127.0.0.1:{port}")) as channel:
    threading.Thread(target=channel.call, args=(method, b"slow", patience)).start()
    sys.stdin.readline()  # the server has the call
    channel.call(method, b"x", patience)
    before = connections()
    child = os.fork()
    if not child:
        os._exit(connections())
    print(before, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""A frontend in a process without gRPC, whose threads do not survive a fork."""


def test_a_child_has_no_connection_of_its_parents() -> None:
    """Otherwise the server would not see the parent's connections close."""
    going, gone = threading.Event(), threading.Event()

    def slow(request: bytes, _: grpc.ServicerContext) -> bytes:
        if request == b"slow":
            going.set()
            gone.wait(LONG)
        return request

    with serving(slow) as server:
        command = [sys.executable, "-W", "ignore", "-c", FORKING, ECHO.path, str(LONG), str(server.port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as frontend:
            assert going.wait(LONG)
            assert frontend.stdin
            assert frontend.stdout
            print(file=frontend.stdin, flush=True)
            assert frontend.stdout.readline() == "2 0\n"
            gone.set()
        assert frontend.returncode == 0


def test_a_child_has_connections_of_its_own() -> None:
    with running_server() as server:
        store = StoreClient(server.target, namespace="shop", deadline=LONG)
        key = os.urandom(32)
        store.put(key, b"value", 100)
        child = os.fork()
        if not child:
            status = 1
            with contextlib.suppress(Exception):
                status = 0 if all(store.get(key) for _ in range(100)) else 2
            os._exit(status)
        assert all(store.get(key) for _ in range(100))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        store.close()
