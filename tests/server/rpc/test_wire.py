"""The promises of the contract, over the wire with a generated client, for every kind of server."""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from resumed_server.rpc.validation import MAX_PINNED_VALUE
from support.redis import valkey_server
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from google.rpc.status_pb2 import Status

    from support.server import RunningServer

DAY = 86_400
MAX_BATCH_BYTES = 256 * (65_536 + 256)
SERVICE = "resumed.v1.SessionStoreService"


@pytest.fixture(
    scope="module",
    params=[
        "one process",
        "two workers",
        "two workers on Valkey",
        "one native process",
        "two native workers on Valkey",
    ],
)
def server(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    with contextlib.ExitStack() as held:
        valkey = held.enter_context(valkey_server()).url + "?timeout_ms=5000" if "Valkey" in request.param else "lmdb:"
        front = "native" if "native" in request.param else "grpcio"
        yield held.enter_context(
            running_server("--storage", valkey, "--transport", front, workers=1 + ("two" in request.param))
        )


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    """A channel for each test, so that two workers share the tests."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", MAX_BATCH_BYTES)]
    with grpc.insecure_channel(server.target, options=options) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> SessionStoreServiceStub:
    return SessionStoreServiceStub(channel)


@pytest.fixture
def key() -> bytes:
    """A key that no other test uses."""
    return uuid.uuid4().bytes


def put(
    key: bytes, value: bytes = b"sealed", ttl: float | Duration | None = 60.0, namespace: str = "shop"
) -> pb.PutRequest:
    """Return a Put; a float is a ttl in seconds."""
    if isinstance(ttl, float):
        ttl = Duration(seconds=int(ttl), nanos=round(ttl % 1 * 1e9))
    return pb.PutRequest(namespace=namespace, key=key, value=value, ttl=ttl)


def get(key: bytes, namespace: str = "shop") -> pb.GetRequest:
    return pb.GetRequest(namespace=namespace, key=key)


def take(key: bytes, namespace: str = "shop") -> pb.TakeRequest:
    return pb.TakeRequest(namespace=namespace, key=key)


def remove(key: bytes, namespace: str = "shop") -> pb.RemoveRequest:
    return pb.RemoveRequest(namespace=namespace, key=key)


REQUESTS: dict[str, Callable[..., Any]] = {"Put": put, "Get": get, "Take": take, "Remove": remove}


def seconds(ttl: Duration) -> float:
    return ttl.seconds + ttl.nanos / 1e9


def rejection(call: Any, request: Any) -> tuple[grpc.StatusCode, Status]:
    """Return the status code and the rich status of a failing call."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    status = rpc_status.from_call(caught.value)
    assert status is not None, "an error without details"
    assert status.code == caught.value.code().value[0]
    return caught.value.code(), status


def info(status: Status) -> ErrorInfo:
    (found,) = [detail for detail in status.details if detail.Is(ErrorInfo.DESCRIPTOR)]
    unpacked = ErrorInfo()
    found.Unpack(unpacked)
    assert unpacked.domain == "resumed.github.io"
    assert pb.ErrorReason.Value(unpacked.reason)
    return unpacked


def assert_invalid(status: Status, field: str) -> None:
    """Check that an error names `field`, in the ErrorInfo and in the BadRequest."""
    assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert info(status).reason == "ERROR_REASON_INVALID_FIELD"
    assert info(status).metadata == {"field": field}
    (found,) = [detail for detail in status.details if detail.Is(BadRequest.DESCRIPTOR)]
    violations = BadRequest()
    found.Unpack(violations)
    assert [violation.field for violation in violations.field_violations] == [field]
    assert violations.field_violations[0].description


# --- Limits --------------------------------------------------------------------------------------------------------


NAMESPACES = ["a", "a" * 63, "0.shop-9"]
BAD_NAMESPACES = ["", "a" * 64, "Shop", "a b", "a/b", "ä", "a\n", "a\0", "_"]
KEYS = [b"k", b"\0" * 64, bytes(range(192, 256))]
BAD_KEYS = [b"", b"k" * 65]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_valid_namespace_is_accepted(stub: SessionStoreServiceStub, key: bytes, namespace: str) -> None:
    """1 to 63 of [a-z0-9.-]; a session exists in its own namespace only."""
    stub.Put(put(key, namespace=namespace))
    assert stub.Get(get(key, namespace)).session.value == b"sealed"
    assert not stub.Get(get(key, "another")).HasField("session")
    assert stub.Take(take(key, namespace)).session.value == b"sealed"
    assert not stub.Remove(remove(key, namespace)).removed


@pytest.mark.parametrize("method", ["Put", "Get", "Take", "Remove"])
@pytest.mark.parametrize("namespace", BAD_NAMESPACES)
def test_an_invalid_namespace_is_rejected(
    stub: SessionStoreServiceStub, key: bytes, method: str, namespace: str
) -> None:
    """Empty, 64 characters, or characters outside [a-z0-9.-]."""
    request = REQUESTS[method](key, namespace=namespace)
    assert_invalid(rejection(getattr(stub, method), request)[1], "namespace")


@pytest.mark.parametrize("key", KEYS)
def test_a_valid_key_is_accepted(stub: SessionStoreServiceStub, key: bytes) -> None:
    """1 to 64 bytes of any value."""
    namespace = uuid.uuid4().hex
    stub.Put(put(key, namespace=namespace))
    assert stub.Get(get(key, namespace)).session.value == b"sealed"
    assert stub.Remove(remove(key, namespace)).removed


@pytest.mark.parametrize("method", ["Put", "Get", "Take", "Remove"])
@pytest.mark.parametrize("key", BAD_KEYS)
def test_an_invalid_key_is_rejected(stub: SessionStoreServiceStub, method: str, key: bytes) -> None:
    """Empty, or 65 bytes."""
    request = REQUESTS[method](key)
    assert_invalid(rejection(getattr(stub, method), request)[1], "key")


@pytest.mark.parametrize("size", [1, 65_535, 65_536])
def test_a_valid_value_is_stored(stub: SessionStoreServiceStub, key: bytes, size: int) -> None:
    """1 to 65,536 bytes, including NULs."""
    value = b"\0" * size
    stub.Put(put(key, value))
    assert stub.Get(get(key)).session.value == value


@pytest.mark.parametrize("size", [0, 65_537])
def test_an_invalid_value_is_rejected(stub: SessionStoreServiceStub, key: bytes, size: int) -> None:
    """Empty, or 65,537 bytes; nothing is stored."""
    assert_invalid(rejection(stub.Put, put(key, b"v" * size))[1], "value")
    assert not stub.Get(get(key)).HasField("session")


def test_a_pinned_value_is_smaller(stub: SessionStoreServiceStub, key: bytes) -> None:
    """At most 1,024 bytes."""
    for size in (1_025, 1_024):
        request = put(key, b"v" * size)
        request.pinned = True
        if size > MAX_PINNED_VALUE:
            assert_invalid(rejection(stub.Put, request)[1], "value")
            (result,) = stub.Batch(pb.BatchRequest(operations=[pb.BatchOperation(put=request)])).results
            assert_invalid(result.error, "operations[0].put.value")
            assert not stub.Get(get(key)).HasField("session")
        else:
            stub.Put(request)
            assert stub.Get(get(key)).session.value == request.value


@pytest.mark.parametrize(
    "ttl",
    [
        Duration(),
        Duration(seconds=-1),
        Duration(nanos=1_000_000_000),
        Duration(seconds=315_576_000_001),
    ],
    ids=str,
)
def test_an_invalid_ttl_of_a_removal_is_rejected(stub: SessionStoreServiceStub, key: bytes, ttl: Duration) -> None:
    """Nothing is removed."""
    stub.Put(put(key))
    request = remove(key)
    request.ttl.CopyFrom(ttl)
    assert_invalid(rejection(stub.Remove, request)[1], "ttl")
    (result,) = stub.Batch(pb.BatchRequest(operations=[pb.BatchOperation(remove=request)])).results
    assert_invalid(result.error, "operations[0].remove.ttl")
    assert stub.Get(get(key)).HasField("session")


@pytest.mark.parametrize("ttl", [Duration(nanos=1), Duration(seconds=600), Duration(seconds=315_576_000_000)], ids=str)
def test_a_lasting_removal_is_accepted(stub: SessionStoreServiceStub, key: bytes, ttl: Duration) -> None:
    """Of a session and of an unknown key, and again."""
    request = remove(key)
    request.ttl.CopyFrom(ttl)
    stub.Put(put(key))
    assert [stub.Remove(request).removed for _ in range(2)] == [True, False]
    request.key = key[::-1]
    (result,) = stub.Batch(pb.BatchRequest(operations=[pb.BatchOperation(remove=request)])).results
    assert not result.remove.removed
    assert rejection(stub.Put, put(key))[0] is grpc.StatusCode.ALREADY_EXISTS


@pytest.mark.parametrize(
    "ttl",
    [
        None,
        Duration(),
        Duration(seconds=-1),
        Duration(nanos=-1),
        Duration(seconds=1, nanos=-1),
        Duration(seconds=-1, nanos=1),
        Duration(nanos=1_000_000_000),
        Duration(seconds=315_576_000_001),
    ],
    ids=str,
)
def test_an_invalid_ttl_is_rejected(stub: SessionStoreServiceStub, key: bytes, ttl: Duration | None) -> None:
    """A valid one is above zero, and a valid Duration: both parts have the same sign."""
    assert_invalid(rejection(stub.Put, put(key, ttl=ttl))[1], "ttl")


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        (Duration(seconds=1), 1),
        (Duration(seconds=60, nanos=500_000_000), 60.5),
        (Duration(seconds=DAY - 1), DAY - 1),
        (Duration(seconds=DAY), DAY),
        (Duration(seconds=DAY, nanos=1), DAY),
        (Duration(seconds=7 * DAY + 1), DAY),
        (Duration(seconds=315_576_000_000, nanos=999_999_999), DAY),
    ],
    ids=str,
)
def test_a_put_returns_the_stored_ttl(stub: SessionStoreServiceStub, key: bytes, asked: Duration, kept: float) -> None:
    """It is at most --max-ttl; a hit returns the remaining one."""
    assert seconds(stub.Put(put(key, ttl=asked)).ttl) == pytest.approx(kept, abs=0.5)
    remaining = seconds(stub.Get(get(key)).session.ttl)
    assert kept - 30 < remaining <= kept


def test_a_pinned_value_is_stored_for_seven_days_at_most(stub: SessionStoreServiceStub, key: bytes) -> None:
    request = put(key, ttl=Duration(seconds=7 * DAY + 1))
    request.pinned = True
    assert seconds(stub.Put(request).ttl) == pytest.approx(7 * DAY, abs=0.5)


def test_the_shortest_ttl_is_accepted_and_expires_at_once(stub: SessionStoreServiceStub, key: bytes) -> None:
    """A nanosecond. An expired session is a miss, swept or not."""
    stub.Put(put(key, ttl=Duration(nanos=1)))
    assert not stub.Get(get(key)).HasField("session")


# --- Write-once, Take, Remove --------------------------------------------------------------------------------------


def test_a_put_may_be_repeated_and_extends_nothing(stub: SessionStoreServiceStub, key: bytes) -> None:
    """The same value again succeeds, and keeps the first expiry."""
    stub.Put(put(key, ttl=60.0))
    assert seconds(stub.Put(put(key, ttl=3_600.0)).ttl) <= 60


def test_another_value_is_rejected_and_changes_nothing(stub: SessionStoreServiceStub, key: bytes) -> None:
    """Ids are write-once."""
    stub.Put(put(key, b"first"))
    code, status = rejection(stub.Put, put(key, b"second"))
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert info(status).reason == "ERROR_REASON_WRITE_ONCE"
    assert info(status).metadata == {"namespace": "shop"}
    assert stub.Get(get(key)).session.value == b"first"


@pytest.mark.parametrize("end", ["Take", "Remove"])
@pytest.mark.parametrize("value", [b"sealed", b"another"])
def test_a_late_put_restores_no_session(stub: SessionStoreServiceStub, key: bytes, end: str, value: bytes) -> None:
    """A session that was taken or removed cannot be stored again, even with the same value."""
    stub.Put(put(key))
    getattr(stub, end)(REQUESTS[end](key))
    assert rejection(stub.Put, put(key, value))[0] is grpc.StatusCode.ALREADY_EXISTS
    assert not stub.Get(get(key)).HasField("session")


def test_a_put_that_arrives_after_the_remove_is_rejected(stub: SessionStoreServiceStub, key: bytes) -> None:
    """The Remove of an unknown key leaves a tombstone too."""
    assert not stub.Remove(remove(key)).removed
    assert rejection(stub.Put, put(key))[0] is grpc.StatusCode.ALREADY_EXISTS


def test_a_miss_is_no_error(stub: SessionStoreServiceStub, key: bytes) -> None:
    """Get and Take of an unknown key return OK without a session; the Take leaves nothing in the store."""
    assert not stub.Get(get(key)).HasField("session")
    assert not stub.Take(take(key)).HasField("session")


def test_a_take_returns_the_session_once(stub: SessionStoreServiceStub, key: bytes) -> None:
    """With its remaining ttl. After that it is a miss."""
    stub.Put(put(key))
    taken = stub.Take(take(key)).session
    assert taken.value == b"sealed"
    assert 0 < seconds(taken.ttl) <= 60
    assert not stub.Take(take(key)).HasField("session")
    assert not stub.Get(get(key)).HasField("session")


def test_remove_returns_whether_there_was_a_session(stub: SessionStoreServiceStub, key: bytes) -> None:
    """It may be repeated."""
    stub.Put(put(key))
    assert stub.Remove(remove(key)).removed
    assert not stub.Remove(remove(key)).removed


# --- Batch ---------------------------------------------------------------------------------------------------------


def test_a_batch_returns_results_in_order_and_a_failure_affects_one_operation(
    stub: SessionStoreServiceStub, key: bytes
) -> None:
    """Each operation has the result of the call of its name."""
    results = stub.Batch(
        pb.BatchRequest(
            operations=[
                pb.BatchOperation(get=get(key)),
                pb.BatchOperation(put=put(key, b"first")),
                pb.BatchOperation(put=put(key, b"second")),
                pb.BatchOperation(),
                pb.BatchOperation(get=get(b"")),
                pb.BatchOperation(put=put(key, b"first", ttl=None)),
                pb.BatchOperation(get=get(key)),
                pb.BatchOperation(take=take(key)),
                pb.BatchOperation(take=take(key)),
                pb.BatchOperation(remove=remove(key, "Shop")),
                pb.BatchOperation(remove=remove(key)),
            ]
        )
    ).results
    kinds = [result.WhichOneof("result") for result in results]
    assert kinds == ["get", "put", "error", "error", "error", "error", "get", "take", "take", "error", "remove"]
    assert not results[0].get.HasField("session")
    assert 0 < seconds(results[1].put.ttl) <= 60
    assert results[2].error.code == grpc.StatusCode.ALREADY_EXISTS.value[0]
    assert info(results[2].error).reason == "ERROR_REASON_WRITE_ONCE"
    assert_invalid(results[3].error, "operations[3]")
    assert_invalid(results[4].error, "operations[4].get.key")
    assert_invalid(results[5].error, "operations[5].put.ttl")
    assert results[6].get.session.value == b"first"
    assert results[7].take.session.value == b"first"
    assert not results[8].take.HasField("session")
    assert_invalid(results[9].error, "operations[9].remove.namespace")
    assert not results[10].remove.removed


@pytest.mark.parametrize("namespace", ["", "Shop"])
def test_a_lookup_without_a_namespace_fails_alone(stub: SessionStoreServiceStub, key: bytes, namespace: str) -> None:
    """At any place in a Batch."""
    wrong, right = pb.BatchOperation(get=get(key, namespace)), pb.BatchOperation(get=get(key))
    for operations in ([wrong, right], [right, wrong]):
        results = stub.Batch(pb.BatchRequest(operations=operations)).results
        index = operations.index(wrong)
        assert_invalid(results[index].error, f"operations[{index}].get.namespace")
        assert not results[operations.index(right)].get.HasField("session")


def test_a_batch_of_invalid_operations_has_results(stub: SessionStoreServiceStub) -> None:
    """The engine is not called."""
    (result,) = stub.Batch(pb.BatchRequest(operations=[pb.BatchOperation()])).results
    assert_invalid(result.error, "operations[0]")


@pytest.mark.parametrize("count", [1, 255, 256])
def test_a_batch_of_valid_size_is_executed(stub: SessionStoreServiceStub, key: bytes, count: int) -> None:
    """1 to 256 operations."""
    operations = [pb.BatchOperation(get=get(key))] * count
    assert len(stub.Batch(pb.BatchRequest(operations=operations)).results) == count


@pytest.mark.parametrize("count", [0, 257])
def test_a_batch_of_invalid_size_is_rejected_as_a_whole(stub: SessionStoreServiceStub, key: bytes, count: int) -> None:
    """Empty, or 257 operations."""
    operations = [pb.BatchOperation(get=get(key))] * count
    assert_invalid(rejection(stub.Batch, pb.BatchRequest(operations=operations))[1], "operations")


def test_the_largest_batch_passes_in_both_directions(stub: SessionStoreServiceStub) -> None:
    """256 sessions of 65,536 bytes, with the longest keys and namespace, are stored and read in one call each."""
    namespace = "n" * 63
    keys = [uuid.uuid4().bytes * 4 for _ in range(256)]
    puts = [pb.BatchOperation(put=put(key, b"v" * 65_536, ttl=60.5, namespace=namespace)) for key in keys]
    stored = stub.Batch(pb.BatchRequest(operations=puts)).results
    assert {result.WhichOneof("result") for result in stored} == {"put"}
    takes = [pb.BatchOperation(take=take(key, namespace)) for key in keys]
    taken = stub.Batch(pb.BatchRequest(operations=takes)).results
    assert [len(result.take.session.value) for result in taken] == [65_536] * 256


def test_a_larger_message_is_rejected(stub: SessionStoreServiceStub, key: bytes) -> None:
    """Before the server reads it into memory."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.Put(put(key, bytes(MAX_BATCH_BYTES)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# --- Everything else -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", ["", SERVICE])
def test_health_is_serving(channel: grpc.Channel, service: str) -> None:
    """For the whole server and for the service, by Check and by Watch."""
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
    assert next(health.Watch(request)).status == health_pb2.HealthCheckResponse.SERVING


def test_open_streams_do_not_delay_calls(channel: grpc.Channel, stub: SessionStoreServiceStub, key: bytes) -> None:
    """Neither health nor reflection streams, however many are open."""
    health = health_pb2_grpc.HealthStub(channel)
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    streams = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(32)]
    assert all(next(stream).status == health_pb2.HealthCheckResponse.SERVING for stream in streams)
    never = threading.Event()
    streams += [reflection.ServerReflectionInfo(iter(never.wait, True)) for _ in range(32)]
    assert not stub.Get(get(key), timeout=5).HasField("session")
    for stream in streams:
        stream.cancel()
    never.set()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_the_services(channel: grpc.Channel, version: str) -> None:
    """And the messages of the contract; in both versions, because some tools call the one and some the other."""
    request = reflection_pb2.ServerReflectionRequest
    call = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    listed, found = call(iter([request(list_services=""), request(file_containing_symbol="resumed.v1.PutRequest")]))
    names = {service.name for service in listed.list_services_response.service}
    assert names == {
        SERVICE,
        "resumed.v1.AdminService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert found.file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize(
    "method",
    [
        f"{SERVICE}/Get",
        f"{SERVICE}/Watch",
        "grpc.health.v1.Health/Check",
        "grpc.health.v1.Health/Watch",
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ],
)
def test_an_invalid_message_is_an_error(server: RunningServer, channel: grpc.Channel, method: str) -> None:
    """Neither the caller nor the log gets a stack trace, and the server continues."""
    raw: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{method}")
    for garbage in (b"\xff" * 100, b"\x0a\x02\xff\xfe"):
        with pytest.raises(grpc.RpcError) as caught:
            next(raw(iter([garbage]), timeout=10))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        status = rpc_status.from_call(cast("grpc.Call", caught.value))
        assert status is not None
        assert info(status).reason == "ERROR_REASON_MALFORMED_REQUEST"
    assert not server.log_lines("library")
    assert all("text" not in line for line in server.log_lines())


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_stream"])
def test_an_unknown_method_is_rejected_with_a_reason(channel: grpc.Channel, kind: str) -> None:
    """With or without a message. A method of an unknown service is rejected without a reason."""
    never = threading.Event()

    def called(path: str) -> grpc.Call:
        method = getattr(channel, kind)(path)
        with pytest.raises(grpc.RpcError) as caught:
            list(method(iter(never.wait, True) if kind.startswith("stream") else b"", timeout=10))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        return cast("grpc.Call", caught.value)

    for name in ("Fetch", "x" * 1_000):
        status = rpc_status.from_call(called(f"/{SERVICE}/{name}"))
        assert status is not None
        assert info(status).reason == "ERROR_REASON_UNIMPLEMENTED"
        assert info(status).metadata == {"method": name[:64]}
    called("/nobody.Service/Get")
    never.set()


def test_no_log_line_contains_a_key_a_value_or_a_namespace(
    server: RunningServer, stub: SessionStoreServiceStub
) -> None:
    """After valid and invalid requests."""
    secret = b"secret-" + uuid.uuid4().hex.encode()
    stub.Put(put(secret, secret, namespace="tenant-x"))
    rejection(stub.Put, put(secret, b"other", namespace="tenant-x"))
    rejection(stub.Get, get(secret * 2, "tenant-x"))
    stub.Take(take(secret, "tenant-x"))
    server.wait_for_log("ready")
    log = json.dumps(server.log_lines())
    assert secret.decode() not in log
    assert secret.hex() not in log
    assert "tenant-x" not in log
