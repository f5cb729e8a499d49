"""Debian's servers, unmodified, with libresumed under them: any resumes what any other negotiated."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING

import pytest
from tlslite.api import HandshakeSettings, TLSConnection

from preload.servers import SERVERS, serving, settings
from support.frontend import frontend_command
from support.mtls import Authority, Files, grant
from support.server import running_server
from support.tls import CA, VERSIONS, client_context
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
PATIENCE = 30.0
ROUNDS = 6
MIXED = {"ignore_id_context": "1"}
"""For servers that set unlike session id contexts for the same thing: unlike stacks, Apache on unlike ports."""

INSTALLED = [name for name, (program, _, _) in SERVERS.items() if shutil.which(program)]

pytestmark = pytest.mark.skipif("RESUMED_PRELOAD" not in os.environ, reason="needs Rust: make preload-test")


def visit(
    context: ssl.SSLContext, port: int, session: ssl.SSLSession | None, host: str = "localhost"
) -> tuple[bool, ssl.SSLSession]:
    """Connect, exchange a few bytes, so that tickets arrive, and go; return whether it resumed, and its session."""
    with (
        socket.create_connection(("127.0.0.1", port), PATIENCE) as connected,
        context.wrap_socket(connected, server_hostname=host, session=session) as tls,
    ):
        tls.sendall(REQUEST)
        assert tls.recv(4096)
        assert tls.session
        return tls.session_reused is True, tls.session


def shares(name: str, version: ssl.TLSVersion) -> bool:
    """Return whether a server's sessions are shared: stunnel attaches its own data to tickets."""
    return (name, version) != ("stunnel", ssl.TLSVersion.TLSv1_3)


def warm_up(ports: list[int], version: ssl.TLSVersion, host: str = "localhost") -> None:
    """Have the processes behind some ports learn which context serves a name: a full handshake each."""
    for port in ports:
        assert not visit(client_context(version), port, None, host)[0]


def resumption(ports: list[int], version: ssl.TLSVersion, rounds: int = ROUNDS) -> float:
    """Return the share of connections that resumed a session of another server, after a warm-up."""
    warm_up(ports, version)
    context = client_context(version)
    _, session = visit(context, ports[0], None)
    resumed_there = []
    for number in range(1, rounds * len(ports)):
        reused, session = visit(context, ports[number % len(ports)], session)
        resumed_there.append(reused)
    return sum(resumed_there) / len(resumed_there)


@contextmanager
def python(certificate: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[int]:
    """Run a frontend of the `ssl` module, without the shim unless `options` say so; yield its port."""
    command = frontend_command("ssl", certificate, *options)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    ) as process:
        try:
            assert process.stdout
            yield int(json.loads(process.stdout.readline())["port"])
        finally:
            process.terminate()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mirror", ["0", "64MiB"])
def test_any_server_resumes_what_any_other_negotiated(
    target: str, certificate: Path, keyring: Path, version: ssl.TLSVersion, mirror: str
) -> None:
    environment = settings(target, f"all-{version}-{mirror.lower()}", keyring, mirror=mirror, deadline="5", **MIXED)
    with ExitStack() as stack:
        ports = [
            stack.enter_context(serving(name, certificate, environment, workers=1)).port
            for name in INSTALLED
            if shares(name, version)
            for _ in range(2)
        ]
        assert resumption(ports, version) == 1.0


@pytest.mark.parametrize("version", VERSIONS)
def test_without_the_library_none_does(certificate: Path, version: ssl.TLSVersion) -> None:
    """The servers' own caches and tickets are separate."""
    with ExitStack() as stack:
        ports = [stack.enter_context(serving(name, certificate)).port for name in INSTALLED for _ in range(2)]
        assert resumption(ports, version) == 0.0


def test_a_server_and_the_store_authenticate_each_other(certificate: Path, keyring: Path, tmp_path: Path) -> None:
    authority, directory = Authority(), tmp_path / "store"
    directory.mkdir()
    own = authority.issue("spiffe://example.org/shop")
    files = {"ca": authority.pem, "cert": own.certificate, "key": own.key}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    named = {name: str(tmp_path / name) for name in files}
    grants = grant("spiffe://example.org/shop", ["shop"], ["get", "put", "remove"])
    with running_server(*Files(directory).write(authority.server(), authority.pem, grants).options) as store:
        target = store.target.replace("127.0.0.1", "localhost")
        for more, share in ((named, 1.0), ({"ca": named["ca"]}, 0.0)):
            environment = settings(target, "shop", keyring, mirror="0", deadline="5", **more)
            with ExitStack() as stack:
                ports = [
                    stack.enter_context(serving("nginx", certificate, environment, workers=1)).port for _ in range(2)
                ]
                assert resumption(ports, ssl.TLSVersion.TLSv1_3) == share


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", INSTALLED)
def test_python_frontends_are_of_the_fleet(
    target: str, certificate: Path, keyring: Path, version: ssl.TLSVersion, name: str
) -> None:
    if not shares(name, version):
        pytest.skip("its sessions are not shared")
    namespace = f"python-{name}"
    shim = ["--target", target, "--namespace", namespace, "--keyring", str(keyring)]
    with (
        serving(name, certificate, settings(target, namespace, keyring, deadline="5", **MIXED), workers=1) as server,
        python(certificate, *shim) as port,
    ):
        for ports in permutations([server.port, port]):
            until(partial(resumes, list(ports), version))  # Python's deadline is short here


@pytest.mark.parametrize("version", VERSIONS)
def test_a_python_server_can_stay_as_it_is_too(
    target: str, certificate: Path, keyring: Path, version: ssl.TLSVersion
) -> None:
    environment = settings(target, "unmodified", keyring, mirror="64MiB", deadline="5", **MIXED)
    with (
        python(certificate, environment=environment) as one,
        python(certificate, environment=environment) as other,
        serving("nginx", certificate, environment, workers=1) as server,
    ):
        assert resumption([one, other, server.port], version) == 1.0


@pytest.mark.parametrize("name", INSTALLED)
def test_a_server_without_a_store_makes_full_handshakes(certificate: Path, keyring: Path, name: str) -> None:
    environment = settings("127.0.0.1:1", "down", keyring)
    with serving(name, certificate, environment) as server:
        for version in VERSIONS:
            assert resumption([server.port], version) == 0.0


@pytest.mark.parametrize("name", INSTALLED)
def test_a_wrong_setting_is_named_and_the_server_serves(certificate: Path, keyring: Path, name: str) -> None:
    environment = settings("127.0.0.1:1", "Not a namespace", keyring)
    with serving(name, certificate, environment) as server:
        visit(client_context(VERSIONS[0]), server.port, None)
        assert "namespace must be 1 to 63 characters" in server.log()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", INSTALLED)
def test_a_session_resumes_only_for_its_server_name(
    target: str, certificate: Path, keyring: Path, version: ssl.TLSVersion, name: str
) -> None:
    """RFC 6066 section 3."""
    if not shares(name, version):
        pytest.skip("its sessions are not shared")
    context = client_context(version)
    with serving(name, certificate, settings(target, f"names-{name}", keyring, deadline="5"), workers=1) as server:
        warm_up([server.port], version, "other.example")
        _, session = visit(context, server.port, None)
        assert not visit(context, server.port, session, "other.example")[0]
        assert visit(context, server.port, session)[0]


def test_workers_begin_anew_after_a_reload(target: str, certificate: Path, keyring: Path) -> None:
    context = client_context(ssl.TLSVersion.TLSv1_3)
    with serving("nginx", certificate, settings(target, "reload", keyring, deadline="5"), workers=1) as server:
        _, session = visit(context, server.port, None)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: renewed(server.log()))
        warm_up([server.port], ssl.TLSVersion.TLSv1_3)
        assert visit(context, server.port, session)[0]


@pytest.mark.parametrize("name", ["nginx", "apache"])
def test_contexts_that_ask_for_certificates_have_their_own_namespace_or_none(
    target: str, certificate: Path, keyring: Path, tmp_path: Path, name: str
) -> None:
    """Contexts without client verification share no session with contexts that verify."""
    authority = tmp_path / "ca.pem"
    CA.cert_pem.write_to_path(str(authority))
    more = {
        "nginx": f"ssl_verify_client optional; ssl_client_certificate {authority};",
        "apache": f"SSLVerifyClient optional\nSSLCACertificateFile {authority}",
    }[name]
    for settled, share in ((), 0.0), ((("verified_namespace", "verified"),), 1.0):
        environment = settings(target, f"certificates-{name}", keyring, deadline="5", **MIXED, **dict(settled))
        with (
            serving(name, certificate, environment, more=more, workers=1) as one,
            serving(name, certificate, environment, more=more, workers=1) as other,
        ):
            assert resumption([one.port, other.port], ssl.TLSVersion.TLSv1_2) == share


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("nginx", "ssl_session_tickets off;"),  # its cache is "none" by default
        ("nginx", "ssl_session_tickets off; ssl_session_cache off;"),
        ("apache", "SSLSessionTickets off\nDefine NoCache"),
    ],
)
def test_resumption_stays_off_where_the_server_switched_it_off(
    target: str, certificate: Path, keyring: Path, *, name: str, more: str, version: ssl.TLSVersion
) -> None:
    cache = {"nginx": "ssl_session_tickets off; ssl_session_cache shared:x:1m;", "apache": "SSLSessionTickets off"}[
        name
    ]
    environment = settings(target, f"off-{name}", keyring, deadline="5", **MIXED)
    for configuration, share in (more, 0.0), (cache, 1.0):
        with (
            serving(name, certificate, environment, more=configuration, workers=1) as one,
            serving(name, certificate, environment, more=configuration, workers=1) as other,
        ):
            assert resumption([one.port, other.port], version) == share
            assert one.log().count("has switched resumption off") == (not share)


@pytest.mark.parametrize(
    ("more", "lifetime", "seconds"),
    [("", "7200", 300), ("ssl_session_timeout 1h;", "7200", 3600), ("ssl_session_timeout 1h;", "60", 60)],
)
def test_a_session_lives_for_the_shorter_of_the_servers_timeout_and_the_lifetime(
    target: str, certificate: Path, keyring: Path, *, more: str, lifetime: str, seconds: int
) -> None:
    environment = settings(target, f"timeout-{seconds}", keyring, deadline="5", lifetime=lifetime)
    with serving("nginx", certificate, environment, more=more, workers=1) as server:
        _, session = visit(client_context(ssl.TLSVersion.TLSv1_3), server.port, None)
        assert session.ticket_lifetime_hint == seconds


def test_a_client_whose_random_is_always_the_same_resumes_each_time(
    target: str, certificate: Path, keyring: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients such as tlsfuzzer repeat their random, so handshakes must be distinguished by connection."""
    monkeypatch.setattr("tlslite.tlsconnection.getRandomBytes", bytes)
    session = None
    with serving(
        "nginx", certificate, settings(target, "random", keyring, deadline="5", mirror="0"), workers=1
    ) as server:
        warm_up([server.port], ssl.TLSVersion.TLSv1_2)
        for number in range(6):
            with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connected:
                connection = TLSConnection(connected)
                versions = HandshakeSettings()
                versions.maxVersion = (3, 3)
                connection.handshakeClientCert(serverName="localhost", session=session, settings=versions)
                assert connection.resumed == (number > 0)
                session = connection.session
                connection.sendall(REQUEST)
                assert connection.recv(4096)
                connection.close()


def resumes(ports: list[int], version: ssl.TLSVersion) -> bool:
    """Return whether all connections but the first resume."""
    return resumption(ports, version) == 1.0


def renewed(log: str) -> bool:
    """Return whether nginx' worker has ended and another one has begun."""
    return log.count("exited with code 0") >= 1 and log.count("start worker process ") >= 2
