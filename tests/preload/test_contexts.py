"""Debian's servers with libresumed under them let in no client that they would not let in alone: docs/contexts.md."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

import pytest

import resumed
from preload.servers import serving, settings
from preload.test_preload import MIXED, PATIENCE, visit, warm_up
from preload.test_virtual_hosts import certified, host
from support.ports import free_port
from support.tls import CA, VERSIONS, client_context

if TYPE_CHECKING:
    import ssl
    from pathlib import Path

pytestmark = pytest.mark.skipif("RESUMED_PRELOAD" not in os.environ, reason="needs Rust: make preload-test")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the certificates of two hosts, a keyring, and the certificate of the clients' authority."""
    directory = tmp_path_factory.mktemp("files")
    for name, names in ("certificate", ("localhost", "other.example")), ("other", ("localhost",)):
        (directory / f"{name}.pem").write_bytes(CA.issue_cert(*names).private_key_and_cert_chain_pem.bytes())
    (directory / "fleet.keys").touch(0o600)
    (directory / "fleet.keys").write_text(resumed.Keyring.generate() + "\n", encoding="ascii")
    CA.cert_pem.write_to_path(str(directory / "ca.pem"))
    return directory


@pytest.mark.parametrize("more", [{}, MIXED], ids=["own id contexts", "one id context"])
@pytest.mark.parametrize("version", VERSIONS)
def test_two_listens_with_different_certificates_share_no_session(
    target: str, files: Path, version: ssl.TLSVersion, more: dict[str, str]
) -> None:
    """CVE-2014-3616."""
    environment = settings(target, f"listens-{len(more)}", files / "fleet.keys", deadline="5", **more)
    ports, context = [free_port(), free_port()], client_context(version)

    def beside(port: int) -> str:
        own = host("nginx", files, port, "localhost")
        return own.replace(str(files / "certificate.pem"), str(files / "other.pem"))

    with (
        serving("nginx", files / "certificate.pem", environment, beside=beside(ports[0]), workers=1) as one,
        serving("nginx", files / "certificate.pem", environment, beside=beside(ports[1]), workers=1) as two,
    ):
        warm_up([one.port, two.port, *ports], version)
        for own, same, strange in (one.port, two.port, ports[1]), (ports[0], ports[1], two.port):
            _, session = visit(context, own, None)
            reused, session = visit(context, same, session)
            assert reused
            assert not visit(context, strange, session)[0]


@pytest.mark.parametrize("settled", [{}, {"verified_namespace": "verified"}], ids=["", "verified namespace"])
@pytest.mark.parametrize("version", VERSIONS)
def test_stunnel_accepts_no_client_without_a_certificate(
    target: str, files: Path, version: ssl.TLSVersion, settled: dict[str, str]
) -> None:
    """A service that verifies clients receives the session of a public nginx for its name."""
    environment = settings(target, f"stunnel-{len(settled)}", files / "fleet.keys", deadline="5", **MIXED, **settled)
    slave = (
        f"[private]\nsni = tls:other.example\ncert = {files / 'certificate.pem'}\nkey = {files / 'certificate.pem'}\n"
        f"verifyChain = yes\nCAfile = {files / 'ca.pem'}\nexec = /bin/cat\nexecArgs = cat\n"
    )
    with (
        serving("nginx", files / "certificate.pem", environment, workers=1) as public,
        serving("stunnel", files / "certificate.pem", environment, more=slave) as server,
    ):
        context = client_context(version)
        assert echoes(certified(version, CA), server.port, None)
        _, session = visit(context, public.port, None, "other.example")
        assert not echoes(context, server.port, session)
        certificated = certified(version, CA)
        _, session = visit(certificated, server.port, None, "other.example")
        assert not visit(certificated, server.port, session, "other.example")[0]
        assert "this program attaches data to its sessions" in server.log()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_certificate_for_one_location_of_apache_proves_nothing_elsewhere(
    target: str, files: Path, version: ssl.TLSVersion
) -> None:
    """Renegotiation (TLS 1.2) and post-handshake authentication (TLS 1.3) request the certificate later."""
    more = (
        f"SSLCACertificateFile {files / 'ca.pem'}\n<Location /private>\nSSLVerifyClient require\n"
        "SSLOptions +StdEnvVars\n</Location>"
    )
    environment = settings(target, "locations", files / "fleet.keys", deadline="5", verified_namespace="locs", **MIXED)
    with (
        serving("apache", files / "certificate.pem", environment, more=more, workers=1) as server,
        serving("nginx", files / "certificate.pem", environment, workers=1) as other,
    ):
        warm_up([server.port, other.port], version)
        context = certified(version, CA)
        context.post_handshake_auth = True
        status, session = private(context, server.port, None)
        assert status == b"404"  # let in, and there is no such file
        assert not visit(context, other.port, session)[0]
        status, _ = private(context, server.port, session)
        assert status == b"404"
        anonymous = client_context(version)
        anonymous.post_handshake_auth = True
        reused, session = visit(anonymous, server.port, None)
        reused, session = visit(anonymous, server.port, session)
        assert reused
        status = b""
        with contextlib.suppress(OSError):
            status, _ = private(anonymous, server.port, session)
        assert status != b"404"


def private(context: ssl.SSLContext, port: int, session: ssl.SSLSession | None) -> tuple[bytes, ssl.SSLSession]:
    """Ask for a page that requires a certificate; return the status and the session behind it."""
    with (
        socket.create_connection(("127.0.0.1", port), PATIENCE) as connected,
        context.wrap_socket(connected, server_hostname="localhost", session=session) as tls,
    ):
        tls.sendall(b"GET /private HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = tls.recv(4096)
        assert tls.session
        return answer[9:12], tls.session


def echoes(context: ssl.SSLContext, port: int, session: ssl.SSLSession | None) -> bool:
    """Return whether stunnel's private service accepts a client."""
    try:
        with (
            socket.create_connection(("127.0.0.1", port), PATIENCE) as connected,
            context.wrap_socket(connected, server_hostname="other.example", session=session) as tls,
        ):
            tls.sendall(b"hello\n")
            return tls.recv(16) == b"hello\n"
    except OSError:
        return False
