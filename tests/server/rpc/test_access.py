"""Authentication and authorization over the wire, with every invalid credential and every operation."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import uuid
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from resumed.v1 import admin_pb2
from resumed.v1 import session_store_pb2 as pb
from resumed.v1.admin_pb2_grpc import AdminServiceStub
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from support.mtls import HOUR, Authority, Files, channel, grant
from support.server import running_server
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from google.rpc.status_pb2 import Status

    from support.mtls import Pem
    from support.server import RunningServer

AUTHORITY, STRANGER = Authority(), Authority()
SHOP = "spiffe://example.org/shop"
FRONTEND = ["put", "get", "take", "remove", "watch"]
OPERATOR = ["purge", "stats"]
GRANTS = "".join(
    [
        grant(SHOP, ["shop", "shop.*"], FRONTEND),
        grant("spiffe://example.org/reader", ["shop"], ["get"]),
        grant("spiffe://example.org/pods/*", ["pods"], FRONTEND),
        grant("dns:frontend.pay.svc", ["pay"], FRONTEND),
        grant("spiffe://example.org/operator", ["ops"], OPERATOR),
        grant("spiffe://example.org/counter", ["*"], ["stats"]),
    ]
)
SECRET = "5ec2e7"
DENIED = grpc.StatusCode.PERMISSION_DENIED


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two workers"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with mutual TLS and grants, and a plaintext address for probes."""
    files = Files(tmp_path_factory.mktemp("files")).write(AUTHORITY.server(), AUTHORITY.pem, GRANTS)
    with running_server(*files.options, "--health-listen", "127.0.0.1:0", workers=request.param) as server:
        yield server


class Stub(SessionStoreServiceStub):
    def __init__(self, channel: grpc.Channel) -> None:
        super().__init__(channel)
        admin = AdminServiceStub(channel)
        self.Purge, self.Stats = admin.Purge, admin.Stats


@pytest.fixture
def connect(server: RunningServer) -> Iterator[Callable[[Pem | None], SessionStoreServiceStub]]:
    with ExitStack() as held:
        yield lambda pem: Stub(held.enter_context(channel(server.target, AUTHORITY.pem, pem)))


@pytest.fixture
def shop(connect: Callable[[Pem | None], SessionStoreServiceStub]) -> SessionStoreServiceStub:
    """The caller with the grants of the shop."""
    return connect(AUTHORITY.issue(SHOP))


def requests(namespace: str, key: bytes) -> dict[str, Any]:
    address: dict[str, Any] = {"namespace": namespace, "key": key}
    return {
        "put": pb.PutRequest(**address, value=SECRET.encode(), ttl=Duration(seconds=60)),
        "get": pb.GetRequest(**address),
        "take": pb.TakeRequest(**address),
        "remove": pb.RemoveRequest(**address),
        "watch": pb.WatchRequest(namespace=namespace),
        "purge": admin_pb2.PurgeRequest(namespace=namespace),
        "stats": admin_pb2.StatsRequest(namespace=namespace),
    }


def call(stub: SessionStoreServiceStub, operation: str, request: Any) -> Any:
    """Make the call of an operation; return its response, or the first one of a stream."""
    answer = getattr(stub, operation.capitalize())(request, timeout=10)
    return next(answer) if operation == "watch" else answer


def rejection(stub: SessionStoreServiceStub, operation: str, request: Any) -> grpc.RpcError:
    """Return the error of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(stub, operation, request)
    return caught.value


def info(status: Status) -> ErrorInfo:
    (found,) = [detail for detail in status.details if detail.Is(ErrorInfo.DESCRIPTOR)]
    unpacked = ErrorInfo()
    found.Unpack(unpacked)
    return unpacked


def to_status(error: grpc.RpcError) -> Status:
    """Return the rich status of an error."""
    status = rpc_status.from_call(error)
    assert status is not None
    return status


# --- Granted calls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("identities", "namespace"),
    [
        ([SHOP], "shop"),
        ([SHOP], "shop.eu"),
        (["spiffe://example.org/pods/7f"], "pods"),
        (["dns:frontend.pay.svc"], "pay"),
        (["dns:Frontend.Pay.SVC"], "pay"),
        (["dns:other.svc", "dns:frontend.pay.svc"], "pay"),
        (["spiffe://example.org/nobody", "dns:frontend.pay.svc"], "pay"),
    ],
)
def test_a_granted_operation_is_executed(
    connect: Callable[[Pem | None], SessionStoreServiceStub], identities: list[str], namespace: str
) -> None:
    """The grant names a SPIFFE ID or any DNS name, exact or by prefix."""
    stub = connect(AUTHORITY.issue(*identities))
    asked = requests(namespace, uuid.uuid4().bytes)
    assert call(stub, "watch", asked["watch"]).live
    assert call(stub, "put", asked["put"]).ttl.seconds
    assert call(stub, "get", asked["get"]).session.value == SECRET.encode()
    assert call(stub, "take", asked["take"]).session.value == SECRET.encode()
    assert not call(stub, "remove", asked["remove"]).removed


def test_an_operator_may_purge_and_count_granted_namespaces(
    connect: Callable[[Pem | None], SessionStoreServiceStub],
) -> None:
    """Counting all namespaces requires a grant for all."""
    operator: Any = connect(AUTHORITY.issue("spiffe://example.org/operator"))
    counter: Any = connect(AUTHORITY.issue("spiffe://example.org/counter"))
    assert call(operator, "purge", admin_pb2.PurgeRequest(namespace="ops")).HasField("issued_before_time")
    (stats,) = call(operator, "stats", admin_pb2.StatsRequest(namespace="ops")).namespaces
    assert (stats.namespace, stats.session_count) == ("ops", 0)
    everything = admin_pb2.StatsRequest()
    call(counter, "stats", everything)
    assert info(to_status(rejection(operator, "stats", everything))).metadata["namespace"] == "*"
    assert rejection(counter, "purge", admin_pb2.PurgeRequest(namespace="ops")).code() is DENIED


# --- Denied calls --------------------------------------------------------------------------------------------------

EXPIRED = AUTHORITY.issue(SHOP, lifetime=-HOUR)
REFUSED_BY_TLS = {
    "none": None,
    "expired": EXPIRED,
    "of another authority": STRANGER.issue(SHOP),
    "malformed": AUTHORITY.issue(names=b"\x30\x7f"),
}
NAMELESS = {
    "no name": AUTHORITY.issue(),
    "only an e-mail-like URI": AUTHORITY.issue("mailto:shop@example.org"),
    "two URIs": AUTHORITY.issue(SHOP, "spiffe://example.org/reader"),
    "a SPIFFE id cut short by a NUL": AUTHORITY.issue(SHOP + "\0/evil"),
    "a URI that is no ASCII": AUTHORITY.issue(names=b"\x30\x03\x86\x01\xff"),
    "a name of a kind that nobody reads": AUTHORITY.issue(names=b"\x30\x02\xa3\x00"),
    "a DNS name cut short by a NUL": AUTHORITY.issue("dns:frontend.pay.svc\0.evil"),
}
OTHERS = {
    "another identity": AUTHORITY.issue("spiffe://example.org/other"),
    "another trust domain": AUTHORITY.issue("spiffe://example.org.evil/shop"),
    "the SPIFFE id as a DNS name": AUTHORITY.issue(f"dns:{SHOP}"),
    "a longer identity": AUTHORITY.issue(SHOP + "/admin"),
    "a prefix alone": AUTHORITY.issue("spiffe://example.org/pods"),
    "a wildcard certificate": AUTHORITY.issue("dns:*.pay.svc"),
    "another tenant": AUTHORITY.issue("dns:frontend.pay.svc"),
}


@pytest.fixture
def stored(shop: SessionStoreServiceStub) -> bytes:
    """The key of a session in the namespace `shop`."""
    key = uuid.uuid4().bytes
    shop.Put(requests("shop", key)["put"])
    return key


def assert_untouched(shop: SessionStoreServiceStub, key: bytes, fresh: bytes) -> None:
    """Check that the session still exists, and that the other key does not."""
    assert shop.Get(pb.GetRequest(namespace="shop", key=key)).session.value == SECRET.encode()
    assert not shop.Get(pb.GetRequest(namespace="shop", key=fresh)).HasField("session")
    shop.Put(requests("shop", fresh)["put"])


@pytest.mark.parametrize("credential", REFUSED_BY_TLS)
def test_without_a_valid_certificate_no_call_is_read(
    connect: Callable[[Pem | None], SessionStoreServiceStub],
    shop: SessionStoreServiceStub,
    stored: bytes,
    credential: str,
) -> None:
    """The handshake fails, so the client only reports that it cannot connect."""
    fresh = uuid.uuid4().bytes
    for operation in FRONTEND + OPERATOR:
        key = fresh if operation == "put" else stored
        error = rejection(connect(REFUSED_BY_TLS[credential]), operation, requests("shop", key)[operation])
        assert error.code() is grpc.StatusCode.UNAVAILABLE, operation
    assert_untouched(shop, stored, fresh)


def test_rejected_handshakes_are_logged_by_reason_and_once_in_a_while(server: RunningServer, tmp_path: Path) -> None:
    def visit(credential: str) -> None:
        context = ssl.create_default_context(cadata=AUTHORITY.pem.decode())
        if pem := REFUSED_BY_TLS[credential]:
            (tmp_path / "client.pem").write_bytes(pem.key + pem.certificate)
            context.load_cert_chain(tmp_path / "client.pem")
        host, port = server.target.split(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as plain:  # noqa: SIM117
            with context.wrap_socket(plain, server_hostname="localhost") as tls:
                tls.recv(1)

    def reasons() -> list[str]:
        return [line["reason"] for line in server.log_lines() if line.get("event") == "TLS handshake refused"]

    def logged(credential: str, reason: str) -> bool:
        visit(credential)
        return reason in reasons()

    until(lambda: logged("none", "no-certificate"))
    until(lambda: logged("expired", "untrusted-certificate"))
    assert "PRIVATE KEY" not in str(server.log_lines())


@pytest.mark.parametrize("credential", NAMELESS)
def test_a_certificate_without_an_identity_is_unauthenticated(
    connect: Callable[[Pem | None], SessionStoreServiceStub],
    shop: SessionStoreServiceStub,
    stored: bytes,
    credential: str,
) -> None:
    """Neither the common name nor a prefix of a name that ends at a NUL is an identity."""
    stub = connect(NAMELESS[credential])
    fresh = uuid.uuid4().bytes
    for operation in FRONTEND + OPERATOR:
        key = fresh if operation == "put" else stored
        error = rejection(stub, operation, requests("shop", key)[operation])
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED, operation
        assert info(to_status(error)).reason == "ERROR_REASON_UNAUTHENTICATED"
    assert_untouched(shop, stored, fresh)


@pytest.mark.parametrize("credential", OTHERS)
def test_another_identity_is_denied_with_the_missing_grant(
    connect: Callable[[Pem | None], SessionStoreServiceStub],
    shop: SessionStoreServiceStub,
    stored: bytes,
    credential: str,
) -> None:
    """The error does not depend on whether the session exists."""
    stub = connect(OTHERS[credential])
    fresh = uuid.uuid4().bytes
    for operation in FRONTEND + OPERATOR:
        errors = [rejection(stub, operation, requests("shop", key)[operation]) for key in (stored, fresh)]
        assert {error.code() for error in errors} == {grpc.StatusCode.PERMISSION_DENIED}, operation
        first, second = map(to_status, errors)
        assert first == second
        metadata = info(first).metadata
        assert info(first).reason == "ERROR_REASON_NOT_GRANTED"
        assert (metadata["namespace"], metadata["operation"]) == ("shop", operation)
        assert all(text in first.message for text in metadata.values())
    assert_untouched(shop, stored, fresh)


@pytest.mark.parametrize("operation", FRONTEND + OPERATOR)
def test_a_grant_of_one_operation_grants_no_other(
    connect: Callable[[Pem | None], SessionStoreServiceStub], stored: bytes, operation: str
) -> None:
    stub = connect(AUTHORITY.issue("spiffe://example.org/reader"))
    request = requests("shop", stored)[operation]
    if operation == "get":
        assert call(stub, operation, request).session.value == SECRET.encode()
    else:
        assert rejection(stub, operation, request).code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("namespace", ["shops", "sho", "pay", "shop-eu"])
def test_a_grant_of_one_namespace_grants_no_other(shop: SessionStoreServiceStub, namespace: str) -> None:
    for operation, request in requests(namespace, b"key").items():
        assert rejection(shop, operation, request).code() is grpc.StatusCode.PERMISSION_DENIED


def test_a_batch_is_checked_operation_by_operation(
    connect: Callable[[Pem | None], SessionStoreServiceStub], shop: SessionStoreServiceStub, stored: bytes
) -> None:
    """Granted operations are executed; each of the others gets the error of its own call."""
    stub = connect(AUTHORITY.issue("spiffe://example.org/reader"))
    fresh = uuid.uuid4().bytes
    asked = requests("shop", stored) | {"put": requests("shop", fresh)["put"]}
    operations = [pb.BatchOperation(**{name: asked[name]}) for name in ("put", "get", "take", "remove", "get")]
    operations.append(pb.BatchOperation(get=pb.GetRequest(namespace="pay", key=stored)))
    results = stub.Batch(pb.BatchRequest(operations=operations)).results
    assert [result.WhichOneof("result") for result in results] == ["error", "get", "error", "error", "get", "error"]
    assert results[4].get.session.value == SECRET.encode()
    for number, operation, namespace in (
        (0, "put", "shop"),
        (2, "take", "shop"),
        (3, "remove", "shop"),
        (5, "get", "pay"),
    ):
        error = results[number].error
        assert error.code == grpc.StatusCode.PERMISSION_DENIED.value[0]
        assert info(error).metadata["operation"] == operation
        assert info(error).metadata["namespace"] == namespace
        alone = rejection(stub, operation, asked[operation] if namespace == "shop" else operations[5].get)
        assert to_status(alone) == error
    assert_untouched(shop, stored, fresh)


@pytest.mark.parametrize(
    ("credentials", "code"),
    [(REFUSED_BY_TLS, grpc.StatusCode.UNAVAILABLE), (NAMELESS, grpc.StatusCode.UNAUTHENTICATED)],
    ids=["refused by TLS", "nameless"],
)
def test_a_batch_without_an_identity_is_rejected_as_a_whole(
    connect: Callable[[Pem | None], SessionStoreServiceStub],
    shop: SessionStoreServiceStub,
    stored: bytes,
    credentials: dict[str, Pem | None],
    code: grpc.StatusCode,
) -> None:
    fresh = uuid.uuid4().bytes
    asked = requests("shop", stored) | {"put": requests("shop", fresh)["put"]}
    request = pb.BatchRequest(
        operations=[pb.BatchOperation(**{each: asked[each]}) for each in FRONTEND if each != "watch"]
    )
    for pem in credentials.values():
        assert rejection(connect(pem), "batch", request).code() is code
    assert_untouched(shop, stored, fresh)


@pytest.mark.parametrize("credential", OTHERS)
def test_a_batch_of_another_identity_is_denied_in_each_operation(
    connect: Callable[[Pem | None], SessionStoreServiceStub],
    shop: SessionStoreServiceStub,
    stored: bytes,
    credential: str,
) -> None:
    """The errors do not depend on whether the session exists."""
    stub, fresh = connect(OTHERS[credential]), uuid.uuid4().bytes
    names = [each for each in FRONTEND if each != "watch"]
    answers = []
    for key in (stored, fresh):
        asked = requests("shop", key) | {"put": requests("shop", fresh)["put"]}
        answers.append(
            stub.Batch(pb.BatchRequest(operations=[pb.BatchOperation(**{each: asked[each]}) for each in names]))
        )
    assert answers[0] == answers[1]
    errors = [result.error for result in answers[0].results]
    assert {error.code for error in errors} == {grpc.StatusCode.PERMISSION_DENIED.value[0]}
    assert [info(error).metadata["operation"] for error in errors] == names
    assert_untouched(shop, stored, fresh)


def test_fields_are_validated_before_grants(shop: SessionStoreServiceStub) -> None:
    """So neither the log nor the cache of decisions contains names that callers invent."""
    for operation, request in requests("Not A Namespace", b"key").items():
        assert rejection(shop, operation, request).code() is grpc.StatusCode.INVALID_ARGUMENT


def test_denials_are_logged_once_and_without_a_secret(server: RunningServer) -> None:
    """Once by identity and operation, for any number of calls and namespaces."""
    identity = f"spiffe://example.org/{uuid.uuid4().hex}"
    with channel(server.target, AUTHORITY.pem, AUTHORITY.issue(identity)) as connection:
        stub = Stub(connection)
        for number in range(20):
            for operation, request in requests(f"shop.{number}", SECRET.encode()).items():
                rejection(stub, operation, request)
    lines = [line for line in server.log_lines("no grant allows this") if line["identity"] == identity]
    assert sorted((line["operation"], line["namespace"]) for line in lines) == sorted(
        (operation, "shop.0") for operation in FRONTEND + OPERATOR
    )
    assert SECRET not in json.dumps(server.log_lines())
    assert "PRIVATE KEY" not in json.dumps(server.log_lines())


# --- Probes --------------------------------------------------------------------------------------------------------


def test_probes_need_no_certificate_and_get_health_only(server: RunningServer) -> None:
    """They have an address of their own, in plaintext."""
    (address,) = server.log_lines("listening")[0]["health"]
    with grpc.insecure_channel(address) as connection:
        health = health_pb2_grpc.HealthStub(connection)
        for service in ("", "resumed.v1.SessionStoreService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = Stub(connection)
        for operation, request in requests("shop", b"key").items():
            assert rejection(stub, operation, request).code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_tls_listener_rejects_plaintext(server: RunningServer) -> None:
    with grpc.insecure_channel(server.target) as connection:
        error = rejection(SessionStoreServiceStub(connection), "get", requests("shop", b"key")["get"])
    assert error.code() is grpc.StatusCode.UNAVAILABLE


# --- Without grants ------------------------------------------------------------------------------------------------


def test_without_grants_every_client_of_the_ca_may_do_everything(tmp_path: Path) -> None:
    """That includes a certificate without a name."""
    files = Files(tmp_path).write(AUTHORITY.server(), AUTHORITY.pem)
    with running_server(*files.options) as server:
        with channel(server.target, AUTHORITY.pem, AUTHORITY.issue()) as connection:
            asked = requests("any", b"key")
            assert call(SessionStoreServiceStub(connection), "put", asked["put"]).ttl.seconds
        for pem in REFUSED_BY_TLS.values():
            with channel(server.target, AUTHORITY.pem, pem) as connection:
                error = rejection(SessionStoreServiceStub(connection), "get", asked["get"])
                assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_without_a_client_ca_clients_need_no_certificate(tmp_path: Path) -> None:
    """TLS protects the connection, and the server still has a certificate."""
    files = Files(tmp_path).write(AUTHORITY.server())
    with running_server(*files.options) as server:
        with channel(server.target, AUTHORITY.pem, None) as connection:
            assert call(SessionStoreServiceStub(connection), "get", requests("any", b"key")["get"]) == pb.GetResponse()
        with channel(server.target, STRANGER.pem, None) as connection:
            error = rejection(SessionStoreServiceStub(connection), "get", requests("any", b"key")["get"])
            assert error.code() is grpc.StatusCode.UNAVAILABLE
