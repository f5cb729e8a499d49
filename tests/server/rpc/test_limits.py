"""Limits over the wire: calls and connections beyond them are rejected, and others continue."""

from __future__ import annotations

import struct
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from resumed_server.rpc.executor import MAX_AWAITING_MESSAGE
from support.mtls import Authority, Files, channel, grant
from support.raw_http2 import GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS, Raw, frame, open_socket
from support.server import PATIENCE, running_server
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.server import RunningServer

AUTHORITY = Authority()
SHOP, PAY, POD = (f"spiffe://example.org/{name}" for name in ("shop", "pay", "pods/1"))
EVERYTHING = ["put", "get", "take", "remove", "watch"]
RATE = 10  # a Batch of 256 uses it up for 25 seconds
FILE = (
    "".join(grant(name, ["*"], EVERYTHING) for name in (SHOP, PAY, "spiffe://example.org/pods/*"))
    + f"""
[[limit]]
identity = "{SHOP}"
operations_per_second = {RATE}
watchers = 2

[[limit]]
namespaces = ["small", "small.*"]
operations_per_second = {RATE}
watchers = 1

[[limit]]
namespaces = ["tiny"]
sessions = 3
"""
)
SECRET = b"5ec2e7"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Two workers with mutual TLS, grants and limits."""
    files = Files(tmp_path_factory.mktemp("files")).write(AUTHORITY.server(), AUTHORITY.pem, FILE)
    with running_server(*files.options, workers=2) as server:
        yield server


@pytest.fixture
def connect(server: RunningServer) -> Iterator[Callable[[str], SessionStoreServiceStub]]:
    with ExitStack() as held:
        yield lambda identity: SessionStoreServiceStub(
            held.enter_context(channel(server.target, AUTHORITY.pem, AUTHORITY.issue(identity)))
        )


def get(namespace: str = "shop") -> pb.GetRequest:
    return pb.GetRequest(namespace=namespace, key=SECRET)


def rejection(call: Callable[..., Any], request: Any) -> grpc.RpcError:
    """Return the error of the first call that is rejected."""
    for _ in range(3 * RATE):
        try:
            call(request, timeout=PATIENCE)
        except grpc.RpcError as error:
            return error
    pytest.fail("no call was refused")


def use_up(stub: SessionStoreServiceStub, namespace: str) -> None:
    """Make one Batch that uses up the rate for 25 seconds."""
    batch = pb.BatchRequest(operations=[pb.BatchOperation(get=get(namespace))] * 256)
    for _ in range(100):
        with suppress(grpc.RpcError):
            stub.Batch(batch, timeout=PATIENCE)
            return
    pytest.fail("no Batch is let through")


def details(error: grpc.RpcError) -> tuple[ErrorInfo, RetryInfo | None]:
    """Return the details of an error."""
    status = rpc_status.from_call(error)
    assert status is not None
    info, retry = ErrorInfo(), RetryInfo()
    assert status.details[0].Unpack(info)
    return info, retry if len(status.details) > 1 and status.details[1].Unpack(retry) else None


# --- Rates ---------------------------------------------------------------------------------------------------------


def test_an_identity_beyond_its_rate_is_rejected_and_no_other(
    connect: Callable[[str], SessionStoreServiceStub], server: RunningServer
) -> None:
    """All workers count together, for every operation and namespace. The error has the identity and a retry delay."""
    ours = [connect(SHOP) for _ in range(4)]
    error = rejection(ours[0].Get, get())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    info, retry = details(error)
    assert info.reason == "ERROR_REASON_LIMIT_EXCEEDED"
    assert info.metadata == {"of": SHOP, "limit": "operations_per_second"}
    assert retry
    assert 0 < retry.retry_delay.ToMilliseconds() <= 4_100
    key = b"refused"
    put = pb.PutRequest(namespace="shop", key=key, value=SECRET, ttl=Duration(seconds=60))
    batch = pb.BatchRequest(operations=[pb.BatchOperation(get=get())] * 256)
    use_up(ours[0], "shop")
    for stub in ours:
        for call, request in (
            (stub.Put, put),
            (stub.Get, get("elsewhere")),
            (stub.Take, pb.TakeRequest(namespace="shop", key=key)),
            (stub.Remove, pb.RemoveRequest(namespace="shop", key=key)),
            (stub.Batch, batch),
            (stub.Get, get("Not A Namespace")),
        ):
            assert rejection(call, request).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        watch = stub.Watch(pb.WatchRequest(namespace="shop"), timeout=PATIENCE)
        with pytest.raises(grpc.RpcError) as caught:
            next(watch)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    other = connect(PAY)
    assert not other.Get(pb.GetRequest(namespace="shop", key=key)).HasField("session"), "a refused Put changed nothing"
    for _ in range(100):
        other.Get(get())
    (line, *more) = server.log_lines("a limit is used up")
    assert (line["of"], line["limit"]) == (SHOP, "operations_per_second")
    assert len(more) <= 1, "a line for each worker"
    assert SECRET.decode() not in str(server.log_lines())


def test_namespaces_of_one_limit_share_it_for_all_callers(connect: Callable[[str], SessionStoreServiceStub]) -> None:
    first, second = connect(PAY), connect(POD)
    info, _ = details(rejection(first.Get, get("small.eu")))
    assert info.metadata == {"of": "small, small.*", "limit": "operations_per_second"}
    use_up(first, "small")
    assert rejection(second.Get, get("small")).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert first.Get(get("large")) == pb.GetResponse()


def test_a_caller_without_a_grant_learns_nothing_about_limits(
    connect: Callable[[str], SessionStoreServiceStub],
) -> None:
    stub = connect("spiffe://example.org/other")
    for _ in range(100):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Get(get("small"))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


# --- Sizes ---------------------------------------------------------------------------------------------------------


def test_sessions_beyond_a_limit_are_rejected(connect: Callable[[str], SessionStoreServiceStub]) -> None:
    """By all workers. In a Batch, only the Puts are rejected. Existing sessions can still be read and removed."""
    stubs = [connect(PAY), connect(POD), connect(PAY)]

    def put(key: bytes) -> pb.PutRequest:
        return pb.PutRequest(namespace="tiny", key=key, value=SECRET, ttl=Duration(seconds=600))

    for number, stub in enumerate(stubs):
        for _ in range(1 if number else 5):  # retries count once
            stub.Put(put(b"%d" % number))
    for stub in stubs:
        with pytest.raises(grpc.RpcError) as caught:
            stub.Put(put(b"another"))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        info, retry = details(caught.value)
        assert info.metadata == {"of": "tiny", "limit": "sessions"}
        assert retry is None
    operations = [
        pb.BatchOperation(put=put(b"another")),
        pb.BatchOperation(get=pb.GetRequest(namespace="tiny", key=b"1")),
    ]
    refused, found = stubs[0].Batch(pb.BatchRequest(operations=operations)).results
    assert refused.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert found.get.session.value == SECRET
    assert stubs[1].Remove(pb.RemoveRequest(namespace="tiny", key=b"0")).removed


# --- Watchers ------------------------------------------------------------------------------------------------------


def test_watchers_beyond_a_limit_are_rejected(connect: Callable[[str], SessionStoreServiceStub]) -> None:
    """Existing watchers continue, and one that ends makes room."""
    stub = connect(PAY)
    first = stub.Watch(pb.WatchRequest(namespace="small"))
    assert next(first).live
    second = stub.Watch(pb.WatchRequest(namespace="small.eu"))
    with pytest.raises(grpc.RpcError) as caught:
        next(second)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    info, retry = details(caught.value)
    assert info.metadata == {"of": "small, small.*", "limit": "watchers"}
    assert retry is None
    assert next(first).live
    first.cancel()
    deadline = time.monotonic() + PATIENCE
    while True:
        again = stub.Watch(pb.WatchRequest(namespace="small.eu"))
        try:
            assert next(again).live
        except grpc.RpcError:
            assert time.monotonic() < deadline
        else:
            break


_MAX_CONCURRENT_STREAMS = 3


# --- One connection ------------------------------------------------------------------------------------------------


@contextmanager
def unharmed(server: RunningServer) -> Iterator[None]:
    """Check that calls of other clients succeed during the context."""
    stop, answered = threading.Event(), [0]

    def call() -> None:
        with grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)]) as connection:
            stub = SessionStoreServiceStub(connection)
            while not stop.is_set():
                stub.Get(get(), timeout=PATIENCE)
                answered[0] += 1

    other = threading.Thread(target=call)
    other.start()
    try:
        yield
        before, deadline = answered[0], time.monotonic() + PATIENCE
        while answered[0] < before + 20:
            assert other.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        stop.set()
        other.join(PATIENCE)


@pytest.fixture(scope="module")
def plain() -> Iterator[RunningServer]:
    """One process without TLS, so that tests can send frames; it has two threads for calls."""
    with running_server("--threads", "2") as server:
        yield server


def test_calls_without_a_message_delay_no_other_call_and_are_cancelled(plain: RunningServer) -> None:
    """There are more of them than threads, and more than the server keeps."""
    with ExitStack() as held, unharmed(plain):
        silent = [held.enter_context(Raw(open_socket(plain.target))) for _ in range(MAX_AWAITING_MESSAGE // 100 + 1)]
        for client in silent:
            for number in range(100):
                client.open_call(2 * number + 1)
        deadline = time.monotonic() + PATIENCE
        for kind, flags, _, _ in silent[0].frames():  # the oldest calls are cancelled first
            assert time.monotonic() < deadline
            if kind == RST_STREAM or (kind == HEADERS and flags & 1):
                break
        else:
            pytest.fail("the connection was closed")


def test_too_many_pings_end_the_connection(plain: RunningServer) -> None:
    """The error is ENHANCE_YOUR_CALM (RFC 9113 section 7)."""
    with Raw(open_socket(plain.target)) as client, unharmed(plain):
        client.socket.sendall(5 * frame(PING, 0, 0, b"12345678"))
        gone = b""
        for kind, _, _, payload in client.frames():
            gone = payload if kind == GOAWAY else gone
        assert gone
        assert int.from_bytes(gone[4:8], "big") == 11
        assert b"too_many_pings" in gone


def test_a_connection_has_a_maximum_of_concurrent_calls(plain: RunningServer) -> None:
    """The server announces the maximum, and rejects calls beyond it."""
    with Raw(open_socket(plain.target)) as client, unharmed(plain):
        limit = 0
        for kind, _, stream, payload in client.frames():
            if kind == SETTINGS and payload:
                settings = dict(struct.iter_unpack(">HL", payload))
                limit = settings[_MAX_CONCURRENT_STREAMS]
                assert limit <= 128
                for number in range(limit + 1):
                    client.open_call(2 * number + 1)
            if kind == RST_STREAM:
                assert int.from_bytes(payload, "big") in {7, 11}, "neither REFUSED_STREAM nor ENHANCE_YOUR_CALM"
                assert stream == 2 * limit + 1
                break
        else:
            pytest.fail("the connection was closed")


def test_reflection_streams_without_a_message_exclude_no_other_client() -> None:
    """The oldest streams are cancelled: the client's too, if the server accepts it before some of the others."""
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    with running_server() as server, ExitStack() as stack:
        for _ in range(4):
            idle = stack.enter_context(Raw(open_socket(server.target)))
            for number in range(100):
                idle.open_call(2 * number + 1, path)
        connection = stack.enter_context(grpc.insecure_channel(server.target))
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        reflection_stub = reflection_pb2_grpc.ServerReflectionStub(connection)

        def is_answered() -> bool:
            answers: Any = reflection_stub.ServerReflectionInfo(iter([request]), timeout=PATIENCE)
            with suppress(grpc.RpcError):
                return bool(next(answers).list_services_response.service)
            assert answers.code() is grpc.StatusCode.CANCELLED
            return False

        until(is_answered)
        assert SessionStoreServiceStub(connection).Get(get(), timeout=PATIENCE) == pb.GetResponse()
