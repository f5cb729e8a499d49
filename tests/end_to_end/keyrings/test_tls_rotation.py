"""Certificates, authorities and grants change under traffic: no call fails, and revoked clients stay out."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

import resumed
from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from support.mtls import HOUR, Authority, Files, Pem, channel, grant
from support.server import PATIENCE, running_server
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from typing_extensions import Self

    from support.server import RunningServer

OLD, NEW = Authority(), Authority()
BOTH = OLD.pem + NEW.pem
SHOP, PAY = "spiffe://example.org/shop", "spiffe://example.org/pay"
EVERYTHING = ["put", "get", "take", "remove", "watch"]
SHOP_GRANT, PAY_GRANT = grant(SHOP, ["shop"], EVERYTHING), grant(PAY, ["pay"], EVERYTHING)
TAKEN = "reloaded"
IGNORED = "reload failed, keeping the previous configuration"


class Traffic:
    """Threads that make calls continuously; `begin` makes each call.

    They run at full speed only while a test waits for calls.
    """

    def __init__(self, begin: Callable[[contextlib.ExitStack], Callable[[], object]], threads: int = 3) -> None:
        self.calls = 0
        self.errors: list[str] = []
        self._wanted = 0
        self._begin = begin
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.wait_for_more()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def wait_for_more(self, calls: int = 200) -> None:
        """Wait until that many more calls were made."""
        self._wanted = self.calls + calls
        until(lambda: self.calls >= self._wanted or self.errors)

    def _run(self) -> None:
        with contextlib.ExitStack() as held:
            call = self._begin(held)
            while not self._stopping.is_set() and not self.errors:
                try:
                    call()
                except (grpc.RpcError, resumed.ResumedError, AssertionError) as error:
                    self.errors.append(str(error))
                self.calls += 1
                if self.calls >= self._wanted:
                    self._stopping.wait(0.02)


def grpcio_traffic(target: str, pems: list[Pem]) -> Traffic:
    """Return look-ups by clients of grpcio, which connect anew when there is another certificate in `pems`."""

    def begin(held: contextlib.ExitStack) -> Callable[[], object]:
        stubs: dict[int, SessionStoreServiceStub] = {}

        def call() -> object:
            number = len(pems) - 1
            if number not in stubs:
                stubs[number] = SessionStoreServiceStub(held.enter_context(channel(target, BOTH, pems[number])))
            return stubs[number].Get(pb.GetRequest(namespace="shop", key=b"key"), timeout=PATIENCE)

        return call

    return Traffic(begin)


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def files(tmp_path: Path) -> Files:
    """The files of a server, before anything changes."""
    return Files(tmp_path).write(OLD.server(), OLD.pem, SHOP_GRANT + PAY_GRANT)


@pytest.fixture
def server(files: Files, request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    """A server whose connections do not get old."""
    workers = request.node.callspec.params["files"]
    with running_server(*files.options, "--max-connection-age", "1s", workers=workers) as server:
        yield server


@contextlib.contextmanager
def taken(server: RunningServer, event: str = TAKEN) -> Iterator[list[dict[str, Any]]]:
    """Wait, after files were changed, until every worker has logged `event` once more; fill the list with the lines."""
    workers, so_far = len(server.log_lines("ready")), len(server.log_lines(event))
    lines: list[dict[str, Any]] = []
    yield lines
    lines += server.wait_for_log(event, so_far + workers)[so_far:]


def code_of(target: str, pem: Pem, namespace: str = "shop", trust: bytes = BOTH) -> grpc.StatusCode | None:
    """Connect anew, and return how a look-up failed."""
    with channel(target, trust, pem) as connection:
        try:
            SessionStoreServiceStub(connection).Get(pb.GetRequest(namespace=namespace, key=b"key"), timeout=PATIENCE)
        except grpc.RpcError as error:
            return error.code()
    return None


def shown_certificate(server: RunningServer) -> bytes:
    """Return the certificate that the server shows to a new connection."""
    host, port = server.target.split(":")
    context = ssl.create_default_context(cadata=BOTH.decode())
    context.load_verify_locations(cadata=BOTH.decode())
    with (
        socket.create_connection((host, int(port))) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        return ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True) or b"").encode()


# --- Nothing fails -------------------------------------------------------------------------------------------------


def test_a_whole_rotation_fails_no_call(server: RunningServer, files: Files) -> None:
    old = OLD.issue(SHOP)
    pems = [old]
    with grpcio_traffic(server.target, pems) as traffic:
        with taken(server):
            files.write(client_ca=BOTH)
        traffic.wait_for_more()
        renewed = NEW.server()
        with taken(server):
            files.write(renewed)
        traffic.wait_for_more()
        assert shown_certificate(server) == renewed.certificate
        pems.append(NEW.issue(SHOP))
        traffic.wait_for_more()
        with taken(server):
            files.write(client_ca=NEW.pem)
        traffic.wait_for_more(1_000)
        assert code_of(server.target, old) is grpc.StatusCode.UNAVAILABLE
    assert not traffic.errors
    assert not server.log_lines(IGNORED)


def test_a_whole_rotation_fails_no_call_of_a_session_store(
    server: RunningServer, files: Files, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ours = Files(tmp_path_factory.mktemp("client")).write(OLD.issue(SHOP), BOTH)
    ca, certificate, key = (ours.directory / name for name in ("ca.crt", "tls.crt", "tls.key"))
    credentials = resumed.Credentials(ca=ca, cert=certificate, key=key, server_name="localhost")
    store = resumed.StoreClient(server.target, namespace="shop", deadline=PATIENCE, credentials=credentials)

    def begin(_held: contextlib.ExitStack) -> Callable[[], object]:
        def call() -> None:
            key = os.urandom(16)
            store.put(key, b"value", 60)
            assert store.get(key), "a session is gone"
            assert store.take(key), "a session is gone"
            assert not store.remove(key)
            put, get = store.batch([resumed.Put(key + b"2", b"value", 60), resumed.Get(key + b"2")])
            assert put and get, (put, get)  # noqa: PT018

        return call

    with Traffic(begin) as traffic:
        with taken(server):
            files.write(client_ca=BOTH)
        traffic.wait_for_more(50)
        with taken(server):
            files.write(NEW.server())
        traffic.wait_for_more(50)
        ours.write(NEW.issue(SHOP))
        traffic.wait_for_more(50)
        with taken(server):
            files.write(client_ca=NEW.pem)
        traffic.wait_for_more(500)
    store.close()
    assert not traffic.errors


def test_grants_change_under_traffic_and_only_the_withdrawn_is_denied(server: RunningServer, files: Files) -> None:
    pay = OLD.issue(PAY)
    with grpcio_traffic(server.target, [OLD.issue(SHOP)]) as traffic:
        assert code_of(server.target, pay, "pay") is None
        for grants, code in (
            (SHOP_GRANT, grpc.StatusCode.PERMISSION_DENIED),
            (PAY_GRANT + SHOP_GRANT, None),
            (grant(PAY, ["pay"], ["put"]) + SHOP_GRANT, grpc.StatusCode.PERMISSION_DENIED),
        ):
            with taken(server):
                files.write(grants=grants)
            assert code_of(server.target, pay, "pay") is code
            traffic.wait_for_more()
    assert not traffic.errors


def test_a_secret_that_kubernetes_swaps_again_and_again_fails_no_connection(tmp_path: Path) -> None:
    """Kubernetes swaps a symbolic link to a directory, so two files read in turn may belong to different versions."""
    for number in range(2):
        (tmp_path / f"data-{number}").mkdir()
        Files(tmp_path / f"data-{number}").write(OLD.server(), OLD.pem)
    (tmp_path / "..data").symlink_to("data-0")
    for name in ("tls.crt", "tls.key", "ca.crt"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    with running_server(*Files(tmp_path).options, "--max-connection-age", "1s") as server:
        with grpcio_traffic(server.target, [OLD.issue(SHOP)]) as traffic:
            for number in range(1, 400):
                (tmp_path / "..new").symlink_to(f"data-{number % 2}")
                (tmp_path / "..new").replace(tmp_path / "..data")
                traffic.wait_for_more(5)
            while shown_certificate(server) != (tmp_path / "tls.crt").read_bytes():
                traffic.wait_for_more(100)
        assert not traffic.errors
        assert not server.log_lines(IGNORED)


def test_every_address_takes_the_new_certificate(tmp_path: Path) -> None:
    files = Files(tmp_path).write(OLD.server(), OLD.pem)
    listen = ("--listen", f"unix:{tmp_path}/socket", "--listen", "127.0.0.1:0", "--listen", "localhost:0")
    with running_server(*files.options, *listen[2:], listen=listen[1]) as server:
        addresses = server.log_lines("listening")[0]["addresses"]
        assert len(set(addresses)) == 3

        def trusted(authority: Authority) -> list[bool]:
            return [code_of(address, OLD.issue(SHOP), trust=authority.pem) is None for address in addresses]

        assert trusted(OLD) == [True] * 3
        with taken(server):
            files.write(NEW.server())
        assert trusted(OLD) == [False] * 3
        assert trusted(NEW) == [True] * 3


# --- What cannot be used is ignored --------------------------------------------------------------------------------

EXPIRED = OLD.issue("dns:localhost", lifetime=-HOUR)
ED25519 = OLD.issue("dns:localhost", key=ed25519.Ed25519PrivateKey.generate())
BAD_FILES = {
    "a certificate without its key": ("tls.crt", OLD.server().certificate, "do not match"),
    "a key without its certificate": ("tls.key", OLD.server().key, "do not match"),
    "no certificate": ("tls.crt", b"nonsense", "tls.crt contains no certificate in PEM format"),
    "an empty certificate": ("tls.crt", b"", "tls.crt contains no certificate in PEM format"),
    "no key": ("tls.key", b"nonsense", "tls.key contains no private key in PEM format"),
    "half a key": ("tls.key", OLD.server().key[:100], "tls.key contains no private key in PEM format"),
    "no authority": ("ca.crt", b"\xff\x00", "ca.crt contains no certificate in PEM format"),
    "a huge authority": ("ca.crt", bytes(2 << 20), "ca.crt cannot be read: it is larger than"),
    "no grants": ("grants.toml", b"[[grant", "grants.toml: not valid TOML"),
    "grants with an unknown operation": ("grants.toml", grant(SHOP, ["shop"], ["read"]).encode(), "operations 'read'"),
    "grants that are no text": ("grants.toml", b"\xff", "grants.toml: not valid UTF-8"),
}


@pytest.mark.parametrize("files", [1], indirect=True)
def test_files_that_cannot_be_used_are_ignored_with_one_line_each(server: RunningServer, files: Files) -> None:
    good = {path.name: path.read_bytes() for path in files.directory.iterdir()}
    with grpcio_traffic(server.target, [OLD.issue(SHOP)]) as traffic:
        for name, content, problem in BAD_FILES.values():
            with taken(server, IGNORED) as lines:
                (files.directory / name).write_bytes(content)
            (line,) = lines
            assert problem in line["problem"]
            assert line["level"] == "error"
            assert code_of(server.target, OLD.issue(SHOP)) is None
            with taken(server):
                (files.directory / name).write_bytes(good[name])
        for pem, problem in ((EXPIRED, "tls.crt expired at"), (ED25519, "must be RSA of")):
            with taken(server, IGNORED) as lines:
                files.write(pem)
            assert problem in lines[0]["problem"]
            assert code_of(server.target, OLD.issue(SHOP)) is None
        shutil.rmtree(files.directory)
        server.wait_for_log(IGNORED, len(BAD_FILES) + 4)  # of TLS and of the grants
        traffic.wait_for_more()
    assert not traffic.errors
    assert "PRIVATE KEY" not in str(server.log_lines())


# --- Revoked clients stay out --------------------------------------------------------------------------------------


def test_a_watcher_whose_grant_is_withdrawn_is_cut_off(server: RunningServer, files: Files) -> None:
    with (
        channel(server.target, OLD.pem, OLD.issue(PAY)) as one,
        channel(server.target, OLD.pem, OLD.issue(SHOP)) as two,
    ):
        streams = [
            SessionStoreServiceStub(connection).Watch(pb.WatchRequest(namespace=namespace), timeout=PATIENCE)
            for connection, namespace in ((one, "pay"), (two, "shop"))
        ]
        for stream in streams:
            assert next(stream).live
        files.write(grants=SHOP_GRANT)
        with pytest.raises(grpc.RpcError) as caught:
            for _ in streams[0]:
                pass
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert next(streams[1]).live


def test_a_tls_session_from_before_the_rotation_is_not_accepted(server: RunningServer, files: Files) -> None:
    """A ticket stands for a certificate and must not outlive the trust in it."""
    host, port = server.target.split(":")
    pem = OLD.issue(SHOP)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=BOTH.decode())
    context.set_alpn_protocols(["h2"])
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # its handshake fails if the server rejects the client
    (files.directory / "client.pem").write_bytes(pem.key + pem.certificate)
    context.load_cert_chain(files.directory / "client.pem")

    def connect(session: ssl.SSLSession | None) -> tuple[bool | None, ssl.SSLSession | None]:
        with (
            socket.create_connection((host, int(port))) as plain,
            context.wrap_socket(plain, server_hostname="localhost", session=session) as tls,
        ):
            return tls.session_reused, tls.session

    _, session = connect(None)
    if len(server.log_lines("ready")) == 1:  # each worker has ticket keys of its own
        assert connect(session)[0], "without a rotation it is resumed"
    with taken(server):
        files.write(client_ca=NEW.pem)
    with pytest.raises(OSError):  # noqa: PT011 - a reset or an alert, as the timing has it
        connect(session)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.parametrize("files", [1], indirect=True)
def test_tls_older_than_1_2_is_refused(server: RunningServer, version: ssl.TLSVersion) -> None:
    """RFC 8996."""
    host, port = server.target.split(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=OLD.pem.decode())
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version = context.maximum_version = version
    with socket.create_connection((host, int(port))) as plain, pytest.raises(OSError):  # noqa: PT011
        context.wrap_socket(plain, server_hostname="localhost")
