"""The TLS files that gRPC gets before handshakes."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from resumed_server.auth.tls import CertificateConfigFetcher, ServerCertificates, watch_files
from resumed_server.config.reloading_file import Followed
from support.mtls import Authority, Files, Pem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

AUTHORITY = Authority()


def test_grpc_gets_new_files_at_once_and_unchanged_ones_to_renew_ticket_keys(tmp_path: Path) -> None:
    now = [0.0]
    files = Files(tmp_path).write(AUTHORITY.server(), AUTHORITY.pem)
    paths = [str(tmp_path / name) for name in ("tls.crt", "tls.key", "ca.crt")]
    material = watch_files(*paths)
    fetch = CertificateConfigFetcher(material, material.value, renewal=600, clock=lambda: now[0])
    assert fetch() is None
    now[0] = 599.9
    assert fetch() is None
    now[0] = 600
    assert fetch() is not None
    assert fetch() is None
    files.write(AUTHORITY.server())
    material.follow()
    assert fetch() is None, "it may be the middle of a change"
    material.follow()
    assert fetch() is not None
    assert fetch() is None
    now[0] = 1_199.9
    assert fetch() is None


@contextlib.contextmanager
def serving(files: Files, clock: Callable[[], float] = time.monotonic) -> Iterator[int]:
    """Serve handshakes only, with these files; yield the port."""
    server = grpc.server(ThreadPoolExecutor(1))
    credentials = ServerCertificates(watch_files(*files.options[1::2]), renewal=600, clock=clock)
    port = server.add_secure_port("127.0.0.1:0", credentials.for_listener())
    server.start()
    try:
        yield port
    finally:
        server.stop(None)


def client(files: Files, version: ssl.TLSVersion) -> ssl.SSLContext:
    """Return a context with a certificate of the CA."""
    pem = AUTHORITY.issue("dns:client")
    (files.directory / "client.pem").write_bytes(pem.key + pem.certificate)
    context = ssl.create_default_context(cadata=AUTHORITY.pem.decode())
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(files.directory / "client.pem")
    return context


def handshake(
    context: ssl.SSLContext, port: int, session: ssl.SSLSession | None = None
) -> tuple[bool | None, ssl.SSLSession | None]:
    """Make a handshake, and read the first bytes of gRPC, which follow the tickets.

    Returns whether `session` was resumed, and the session to resume the next time.
    """
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost", session=session) as tls,
    ):
        assert tls.recv(1)
        return tls.session_reused, tls.session


VERSIONS = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])


@VERSIONS
def test_old_tls_sessions_are_not_resumed(tmp_path: Path, version: ssl.TLSVersion) -> None:
    """A client that resumes presents no certificate, and its certificate may have expired."""
    now = [0.0]
    files = Files(tmp_path).write(AUTHORITY.server(), AUTHORITY.pem)
    context = client(files, version)
    with serving(files, lambda: now[0]) as port:
        _, session = handshake(context, port)
        reused, session = handshake(context, port, session)
        assert reused
        now[0] = 600
        reused, session = handshake(context, port, session)
        assert not reused
        reused, _ = handshake(context, port, session)
        assert reused


KEYS = {
    "RSA 2048": rsa.generate_private_key(65_537, 2_048),
    "RSA 4096": rsa.generate_private_key(65_537, 4_096),
    "P-256": ec.generate_private_key(ec.SECP256R1()),
    "P-384": ec.generate_private_key(ec.SECP384R1()),
    "P-521": ec.generate_private_key(ec.SECP521R1()),
}


@VERSIONS
@pytest.mark.parametrize("key", KEYS)
def test_handshakes_succeed_with_every_accepted_type_of_key(tmp_path: Path, key: str, version: ssl.TLSVersion) -> None:
    """With and without client certificates."""
    files = Files(tmp_path).write(AUTHORITY.issue("dns:localhost", key=KEYS[key]))
    with serving(files) as port:
        handshake(client(files, version), port)
    files.write(client_ca=AUTHORITY.pem)
    with serving(files) as port:
        handshake(client(files, version), port)


def test_one_file_may_contain_key_and_certificate(tmp_path: Path) -> None:
    """In any order, with other text between them, as many tools write it."""
    pem = AUTHORITY.server()
    text = b"Certificate:\n    Data:\n"
    for content in (pem.key + text + pem.certificate, text + pem.certificate + AUTHORITY.pem + pem.key):
        files = Files(tmp_path).write(Pem(content, content), AUTHORITY.pem)
        with serving(files) as port:
            handshake(client(files, ssl.TLSVersion.TLSv1_3), port)


def test_the_repr_of_certificate_files_contains_no_secret(tmp_path: Path) -> None:
    files = Files(tmp_path).write(AUTHORITY.server(), AUTHORITY.pem)
    material = watch_files(*files.options[1::2]).value
    assert repr(material) == "CertificateFiles()"
    assert material.expires > time.time()


ENCRYPTED = ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize(
    ("pem", "problem"),
    [
        (AUTHORITY.issue("dns:localhost", key=rsa.generate_private_key(65_537, 1_024)), "must be RSA of 2048 bits"),
        (AUTHORITY.issue("dns:localhost", key=ec.generate_private_key(ec.SECP256K1())), "EC on P-256"),
        (AUTHORITY.issue("dns:localhost", key=dsa.generate_private_key(2_048)), "must be RSA"),
        (
            Pem(
                AUTHORITY.issue("dns:localhost", key=ENCRYPTED).certificate,
                ENCRYPTED.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password")),
            ),
            "is encrypted",
        ),
    ],
    ids=["RSA 1024", "secp256k1", "DSA", "encrypted"],
)
def test_unusable_keys_are_rejected(tmp_path: Path, pem: Pem, problem: str) -> None:
    """GRPC itself would accept them, and then reject every handshake."""
    Files(tmp_path).write(pem)
    with pytest.raises(ValueError, match=problem):
        watch_files(str(tmp_path / "tls.crt"), str(tmp_path / "tls.key"), "")


class TestFollowed:
    """Files that are reloaded when they change."""

    @staticmethod
    def numbers(contents: Sequence[bytes]) -> int:
        """Return the sum of the numbers in the files."""
        return sum(int(content) for content in contents)

    def test_files_are_applied_only_if_two_reads_are_equal(self, tmp_path: Path) -> None:
        """So a mixture of old and new files is never applied."""
        one, two = tmp_path / "one", tmp_path / "two"
        one.write_text("1")
        two.write_text("10")
        followed = Followed("numbers", [str(one), str(two)], self.numbers)
        one.write_text("2")
        followed.follow()
        two.write_text("20")
        followed.follow()
        assert followed.value == 11
        followed.follow()
        assert followed.value == 22

    def test_the_old_value_remains_after_any_error(self, tmp_path: Path) -> None:
        """Including unexpected exceptions, missing files and directories."""
        path = tmp_path / "number"
        path.write_text("1")

        def parse(contents: Sequence[bytes]) -> int:
            if contents[0] == b"boom":
                raise KeyError("secret")
            return self.numbers(contents)

        followed = Followed("numbers", [str(path)], parse)
        for content in ("nonsense", "boom"):
            path.write_text(content)
            for _ in range(3):
                followed.follow()
        path.unlink()
        followed.follow()
        followed.follow()
        path.mkdir()
        followed.follow()
        followed.follow()
        assert followed.value == 1

    def test_invalid_files_at_the_start_are_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot be read: No such file"):
            Followed("numbers", [str(tmp_path / "missing")], self.numbers)
        with pytest.raises(ValueError, match="cannot be read: embedded null byte"):
            Followed("numbers", ["\0"], self.numbers)
