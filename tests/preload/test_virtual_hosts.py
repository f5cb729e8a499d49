"""Virtual hosts of nginx and Apache with libresumed under them: no session passes from one to another."""

from __future__ import annotations

import os
import signal
import socket
import ssl
from typing import TYPE_CHECKING

import pytest
import trustme

import resumed
from preload.leaks import RELOADED, await_others, workers
from preload.servers import serving, settings
from preload.test_preload import MIXED, PATIENCE, visit, warm_up
from support.ports import free_port
from support.tls import CA, VERSIONS, client_context
from support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

OTHER_CA = trustme.CA()
NAMES = ("nginx", "apache")

pytestmark = pytest.mark.skipif("RESUMED_PRELOAD" not in os.environ, reason="needs Rust: make preload-test")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a certificate for two names, a keyring, and the certificates of two authorities."""
    directory = tmp_path_factory.mktemp("files")
    certificate = CA.issue_cert("localhost", "other.example").private_key_and_cert_chain_pem.bytes()
    (directory / "certificate.pem").write_bytes(certificate)
    (directory / "fleet.keys").touch(0o600)
    (directory / "fleet.keys").write_text(resumed.Keyring.generate() + "\n", encoding="ascii")
    CA.cert_pem.write_to_path(str(directory / "one.pem"))
    OTHER_CA.cert_pem.write_to_path(str(directory / "other.pem"))
    return directory


def verifying(name: str, authority: Path) -> str:
    """Return the configuration of a host that requires certificates of an authority."""
    if name == "nginx":
        return f"ssl_verify_client on; ssl_client_certificate {authority};"
    return f"SSLVerifyClient require\nSSLCACertificateFile {authority}"


def host(name: str, files: Path, port: int, server_name: str, more: str = "") -> str:
    """Return the configuration of a virtual host on a port."""
    certificate = files / "certificate.pem"
    if name == "nginx":
        return (
            f"server {{ listen 127.0.0.1:{port} ssl; server_name {server_name}; ssl_certificate {certificate};"
            f' ssl_certificate_key {certificate}; ssl_protocols TLSv1.2 TLSv1.3; {more} return 200 "ok"; }}'
        )
    return (
        f"Listen 127.0.0.1:{port}\n<VirtualHost 127.0.0.1:{port}>\nServerName {server_name}\nSSLEngine on\n"
        f"SSLCertificateFile {certificate}\nSSLCertificateKeyFile {certificate}\n{more}\n</VirtualHost>"
    )


def certified(version: ssl.TLSVersion, authority: trustme.CA) -> ssl.SSLContext:
    """Return a context for clients with a certificate."""
    context = client_context(version)
    authority.issue_cert("client@example.org").configure_cert(context)
    return context


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_who_proved_himself_to_one_authority_has_proved_nothing_to_another(
    target: str, files: Path, name: str, version: ssl.TLSVersion
) -> None:
    """Two ports of one name require certificates of two authorities (CVE-2025-23048, CVE-2025-23419)."""
    verified = f"verified-{name}"
    environment = settings(target, "public", files / "fleet.keys", deadline="5", verified_namespace=verified, **MIXED)
    port = free_port()
    beside = host(name, files, port, "localhost", verifying(name, files / "other.pem"))
    more = verifying(name, files / "one.pem")
    context = certified(version, CA)
    with (
        serving(name, files / "certificate.pem", environment, more=more, beside=beside, workers=1) as server,
        serving(name, files / "certificate.pem", environment, more=more, workers=1) as second,
    ):
        assert admits(certified(version, OTHER_CA), port, None)
        visit(certified(version, CA), second.port, None)
        _, session = visit(context, server.port, None)
        reused, session = visit(context, second.port, session)
        assert reused
        assert not admits(context, port, session)
        assert admits(certified(version, OTHER_CA), port, None)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_host_that_is_chosen_by_name_trusts_no_session_that_the_first_host_accepted(
    target: str, files: Path, name: str, version: ssl.TLSVersion
) -> None:
    """OpenSSL resumes with the settings of the first host of a port, before the name selects another host."""
    verified = f"chosen-{name}"
    environment = settings(target, "public", files / "fleet.keys", deadline="5", verified_namespace=verified, **MIXED)
    port, one, other = free_port(), verifying(name, files / "one.pem"), verifying(name, files / "other.pem")
    hosts = [host(name, files, port, "localhost", one), host(name, files, port, "other.example", other)]
    beside = "\n".join([hosts[0], hosts[1].replace(f"Listen 127.0.0.1:{port}\n", "")])
    context = certified(version, CA)
    with serving(name, files / "certificate.pem", environment, more=one, beside=beside, workers=1) as server:
        assert admits(certified(version, OTHER_CA), port, None, "other.example")
        _, session = visit(context, server.port, None, "other.example")
        assert visit(context, server.port, session, "other.example")[0]
        assert not admits(context, port, session, "other.example")
        assert admits(certified(version, OTHER_CA), port, None, "other.example")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_hosts_of_one_port_resume_their_own_sessions_only(
    target: str, files: Path, name: str, version: ssl.TLSVersion
) -> None:
    environment = settings(target, f"names-{name}", files / "fleet.keys", deadline="5", **MIXED)
    ports = [free_port(), free_port()]
    context = client_context(version)

    def beside(port: int) -> str:
        hosts = [host(name, files, port, each) for each in ("localhost", "other.example")]
        return "\n".join([hosts[0], hosts[1].replace(f"Listen 127.0.0.1:{port}\n", "")])

    certificate = files / "certificate.pem"
    with (
        serving(name, certificate, environment, beside=beside(ports[0]), workers=1),
        serving(name, certificate, environment, beside=beside(ports[1]), workers=1),
    ):
        for each in "localhost", "other.example":
            warm_up(ports, version, each)
        for own, strange in ("localhost", "other.example"), ("other.example", "localhost"):
            _, session = visit(context, ports[0], None, own)
            reused, session = visit(context, ports[1], session, own)
            assert reused
            assert not visit(context, ports[0], session, strange)[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_worker_that_crashes_takes_no_session_with_it(target: str, files: Path, name: str) -> None:
    context = client_context(ssl.TLSVersion.TLSv1_3)
    environment = settings(target, f"crash-{name}", files / "fleet.keys", deadline="5", puts="wait")
    with serving(name, files / "certificate.pem", environment, workers=1) as server:
        _, session = visit(context, server.port, None)
        (worker,) = workers(server.process.pid)
        os.kill(worker, signal.SIGSEGV)
        until(lambda: len(workers(server.process.pid)) == 1 and workers(server.process.pid) != [worker])
        warm_up([server.port], ssl.TLSVersion.TLSv1_3)
        assert visit(context, server.port, session)[0]


@pytest.mark.parametrize("name", RELOADED)
def test_sessions_survive_graceful_reloads(target: str, files: Path, name: str) -> None:
    context = client_context(ssl.TLSVersion.TLSv1_2)
    environment = settings(target, f"reloads-{name}", files / "fleet.keys", deadline="5", puts="wait")
    with serving(name, files / "certificate.pem", environment, workers=1) as server:
        _, session = visit(context, server.port, None)
        for _ in range(5):
            before = set(workers(server.process.pid))
            server.process.send_signal(RELOADED[name])
            await_others(server.process.pid, before)
            warm_up([server.port], ssl.TLSVersion.TLSv1_2)
            assert visit(context, server.port, session)[0]


def admits(context: ssl.SSLContext, port: int, session: ssl.SSLSession | None, host: str = "localhost") -> bool:
    """Return whether a host accepts a client: with its page, or with 404 (Apache)."""
    try:
        with (
            socket.create_connection(("127.0.0.1", port), PATIENCE) as connected,
            context.wrap_socket(connected, server_hostname=host, session=session) as tls,
        ):
            tls.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            return tls.recv(4096)[9:12] in {b"200", b"404"}
    except OSError:
        return False
