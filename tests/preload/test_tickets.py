"""Debian's servers, unmodified, with libresumed under them, and sessions that clients keep in tickets of the fleet."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import pytest

import resumed
from contexts import client
from contexts.certificates import Files
from contexts.places import SERVERS, Host, Library, Place, Profile, Settings, available
from contexts.run import build_c_server
from preload.servers import LIBRARY, ROOT, serving, settings
from preload.test_preload import INSTALLED, MIXED, PATIENCE, REQUEST, renewed, visit
from support.server import running_server
from support.tls import CA, VERSIONS, client_context
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

BAD_RECORD = bytes([0x17, 3, 3, 0, 64]) + bytes(64)
ALL_VERSIONS = {"sessions": "tickets", "tickets_tls12": "1"}
KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4v"
"""48 bytes, for servers with ticket keys of their own."""

pytestmark = pytest.mark.skipif("RESUMED_PRELOAD" not in os.environ, reason="needs Rust: make preload-test")


def resumes_itself(port: int, version: ssl.TLSVersion, host: str = "localhost") -> bool:
    context = client_context(version)
    _, session = visit(context, port, None, host)
    return visit(context, port, session, host)[0]


def await_agreement(ports: Sequence[int], version: ssl.TLSVersion, *, workers: int = 1) -> None:
    """Wait until the processes behind some ports have ticket secrets and removals, and know the context of a name."""
    # Connections reach the processes of a port by chance: so many in a row reach each of them.
    row = 1 if workers == 1 else 10 * workers

    def is_ready(port: int) -> bool:
        return all(resumes_itself(port, version) for _ in range(row))

    for port in ports:
        until(partial(is_ready, port))


def share_of_resumed(ports: Sequence[int], version: ssl.TLSVersion, rounds: int = 4) -> float:
    """Return the share of connections that resumed a session which another server had negotiated or resumed."""
    context = client_context(version)
    _, session = visit(context, ports[0], None)
    resumed_there = []
    for number in range(1, rounds * len(ports)):
        reused, session = visit(context, ports[number % len(ports)], session)
        resumed_there.append(reused)
    return sum(resumed_there) / len(resumed_there)


def makes_full_handshake(context: ssl.SSLContext, port: int, session: ssl.SSLSession | None) -> bool:
    """Return whether a server does not resume a session."""
    return not visit(context, port, session)[0]


def resumes_share(ports: Sequence[int], version: ssl.TLSVersion, share: float) -> bool:
    """Return whether the servers resume this share of the sessions."""
    return share_of_resumed(ports, version) == share


def visit_badly(context: ssl.SSLContext, port: int, session: ssl.SSLSession | None) -> ssl.SSLSession:
    """Connect, and send a record that the server answers with a fatal alert; return the session."""
    with (
        socket.create_connection(("127.0.0.1", port), PATIENCE) as connected,
        context.wrap_socket(connected, server_hostname="localhost", session=session) as tls,
    ):
        tls.sendall(REQUEST)
        assert tls.recv(4096)
        assert tls.session
        os.write(tls.fileno(), BAD_RECORD)
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            while tls.recv(4096):
                pass
        return tls.session


@pytest.fixture
def fleet(target: str, certificate: Path, keyring: Path, request: pytest.FixtureRequest) -> Iterator[list[int]]:
    """Run two nginx, with a namespace for each test, and hand out their ports."""
    environment = settings(target, f"fleet-{abs(hash(request.node.name))}", keyring, deadline="5", **ALL_VERSIONS)
    with (
        serving("nginx", certificate, environment, workers=1) as one,
        serving("nginx", certificate, environment, workers=1) as other,
    ):
        yield [one.port, other.port]


@pytest.mark.parametrize("version", VERSIONS)
def test_any_server_resumes_what_any_other_negotiated(
    target: str, certificate: Path, keyring: Path, version: ssl.TLSVersion
) -> None:
    environment = settings(target, f"all-{version.name.lower()}".replace("_", "-"), keyring, **ALL_VERSIONS, **MIXED)
    with ExitStack() as stack:
        ports = [
            stack.enter_context(serving(name, certificate, environment, workers=1)).port
            for name in INSTALLED
            for _ in range(2)
        ]
        await_agreement(ports, version)
        assert share_of_resumed(ports, version) == 1.0


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_unlike_stacks_resume_each_others_tickets(
    target: str, tmp_path_factory: pytest.TempPathFactory, keyring: Path, version: str
) -> None:
    """Python's stacks and a C server with the library of their own, and all servers that have it preloaded."""
    directory = tmp_path_factory.mktemp("stacks")
    for path in directory, directory.parent, directory.parent.parent:
        path.chmod(0o755)  # servers change their user
    files, host = Files(directory), Host("", "site", Profile())
    program = build_c_server(LIBRARY, ROOT / "client" / "c" / "include", directory / "server")
    library = Library(LIBRARY, program, [ROOT / "client" / "python", ROOT / "server"])
    namespace = f"stacks-{version}"
    common = Settings(library, target, namespace, keyring, verified=True, ignore_id_context=True, tickets=True)
    with ExitStack() as stack:
        places = []
        for name in SERVERS:
            if available(name, library):
                places.append(Place(name, [host], files.directory, common, library))
                stack.callback(places[-1].stop)

        def resume(place: Place) -> bool:
            return client.visit(place, version, session=client.visit(place, version).session).resumed

        for place in places:
            until(partial(resume, place))
        session = client.visit(places[0], version).session
        for place in [*places, *places[::-2], *places[::3]]:
            visit = client.visit(place, version, session=session)
            assert visit.resumed, place.server
            assert visit.served, place.server
            session = visit.session


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("nginx", "ssl_session_ticket_key {key};"),
        ("nginx", "ssl_session_tickets off; ssl_session_cache shared:x:1m;"),
        ("nginx", "ssl_session_tickets off; ssl_session_cache builtin;"),
        ("apache", "SSLSessionTicketKeyFile {key}"),
        ("apache", "SSLSessionTickets off"),
        ("haproxy", "tls-ticket-keys {keys}"),
        ("haproxy", "no-tls-tickets"),
        (
            "stunnel",
            "ticketKeySecret = 00112233445566778899aabbccddeeff\nticketMacSecret = 00112233445566778899aabbccddeeff",
        ),
    ],
)
def test_keys_of_a_servers_own_or_none_change_nothing(
    target: str, certificate: Path, keyring: Path, tmp_path: Path, *, name: str, more: str, version: ssl.TLSVersion
) -> None:
    (tmp_path / "key").write_bytes(bytes(range(48)))
    (tmp_path / "keys").write_text(f"{KEY}\n" * 3, encoding="ascii")
    more = more.format(key=tmp_path / "key", keys=tmp_path / "keys")
    environment = settings(target, f"own-{name}-{abs(hash(more))}", keyring, **ALL_VERSIONS, **MIXED)
    with (
        serving(name, certificate, environment, more=more, workers=1) as one,
        serving(name, certificate, environment, workers=1) as other,
    ):
        ports = [one.port, other.port]
        await_agreement(ports, version)
        assert share_of_resumed(ports, version) == 1.0


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("name", "more"),
    [("nginx", "ssl_session_tickets off;"), ("apache", "SSLSessionTickets off\nDefine NoCache")],
)
def test_resumption_stays_off_where_the_server_switched_it_off(
    target: str, certificate: Path, keyring: Path, *, name: str, more: str, version: ssl.TLSVersion
) -> None:
    environment = settings(target, f"off-{name}", keyring, **ALL_VERSIONS, **MIXED)
    with (
        serving(name, certificate, environment, more=more, workers=1) as server,
        serving(name, certificate, environment, workers=1) as other,
    ):
        await_agreement([other.port], version)
        context = client_context(version)
        _, session = visit(context, other.port, None)
        assert not visit(context, server.port, session)[0]
        assert not resumes_itself(server.port, version)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fatal_alert_ends_all_tickets_of_its_lineage_everywhere(fleet: list[int], version: ssl.TLSVersion) -> None:
    await_agreement(fleet, version)
    context = client_context(version)
    _, first = visit(context, fleet[0], None)
    resumed, second = visit(context, fleet[1], first)
    assert resumed
    last = visit_badly(context, fleet[0], second)
    for session in first, second, last:
        assert not visit(context, fleet[0], session)[0]
        until(partial(makes_full_handshake, context, fleet[1], session))
    assert share_of_resumed(fleet, version) == 1.0


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fatal_alert_after_a_full_handshake_ends_its_ticket(fleet: list[int], version: ssl.TLSVersion) -> None:
    await_agreement(fleet, version)
    context = client_context(version)
    session = visit_badly(context, fleet[0], None)
    assert not visit(context, fleet[0], session)[0]
    until(lambda: not visit(context, fleet[1], session)[0])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_ticket_resumes_only_for_its_server_name(fleet: list[int], version: ssl.TLSVersion) -> None:
    """RFC 6066 section 3."""
    await_agreement(fleet, version)
    for port in fleet:
        visit(client_context(version), port, None, "other.example")  # the process learns the context of the name
    context = client_context(version)
    _, session = visit(context, fleet[0], None)
    for port in fleet:
        assert not visit(context, port, session, "other.example")[0]
        assert visit(context, port, session)[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_purge_ends_all_tickets(certificate: Path, keyring: Path, version: ssl.TLSVersion) -> None:
    with running_server() as store:
        environment = settings(store.target, "purged", keyring, **ALL_VERSIONS)
        with (
            serving("nginx", certificate, environment, workers=1) as one,
            serving("nginx", certificate, environment, workers=1) as other,
        ):
            ports = [one.port, other.port]
            await_agreement(ports, version)
            context = client_context(version)
            _, session = visit(context, ports[0], None)
            assert visit(context, ports[1], session)[0]
            with resumed.Admin(store.target) as admin:
                admin.purge("purged")
            for port in ports:
                until(partial(makes_full_handshake, context, port, session))
            await_agreement(ports, version)
            assert share_of_resumed(ports, version) == 1.0
            assert not visit(context, ports[0], session)[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_another_namespace_resumes_nothing(
    target: str, certificate: Path, keyring: Path, version: ssl.TLSVersion
) -> None:
    with (
        serving("nginx", certificate, settings(target, "one", keyring, **ALL_VERSIONS), workers=1) as one,
        serving("nginx", certificate, settings(target, "other", keyring, **ALL_VERSIONS), workers=1) as other,
    ):
        ports = [one.port, other.port]
        await_agreement(ports, version)
        assert share_of_resumed(ports, version) == 0.0


@pytest.mark.parametrize("name", ["nginx", "apache"])
@pytest.mark.parametrize("version", VERSIONS)
def test_client_certificates_resume_in_a_namespace_of_their_own_and_nowhere_else(
    target: str, certificate: Path, keyring: Path, tmp_path: Path, *, name: str, version: ssl.TLSVersion
) -> None:
    authority, client = tmp_path / "ca.pem", tmp_path / "client.pem"
    CA.cert_pem.write_to_path(str(authority))
    client.write_bytes(CA.issue_cert("client@example.org").private_key_and_cert_chain_pem.bytes())
    more = {
        "nginx": f"ssl_verify_client on; ssl_client_certificate {authority};",
        "apache": f"SSLVerifyClient require\nSSLCACertificateFile {authority}",
    }[name]
    namespaces = {"verified_namespace": f"verified-{name}-{version.value}"}
    environment = settings(target, f"{name}-{version.value}", keyring, **ALL_VERSIONS, **MIXED, **namespaces)
    context = client_context(version)
    context.load_cert_chain(client)
    with (
        serving(name, certificate, environment, more=more, workers=1) as one,
        serving(name, certificate, environment, more=more, workers=1) as other,
        serving(name, certificate, environment, workers=1) as public,
    ):
        ports = [one.port, other.port]

        def resumes(port: int, session: ssl.SSLSession | None = None) -> bool:
            return visit(context, port, session or visit(context, port, None)[1])[0]

        for port in ports:
            until(partial(resumes, port))
        await_agreement([public.port], version)
        _, session = visit(context, one.port, None)
        assert resumes(other.port, session)
        assert not resumes(public.port, session)
        _, session = visit(context, public.port, None)
        assert not resumes(one.port, session)


@pytest.mark.parametrize(("grace", "share"), [("604800", 1.0), ("1", 0.0)])
def test_without_the_store_tickets_resume_until_the_grace_is_over_and_all_clients_are_served(
    certificate: Path, keyring: Path, grace: str, share: float
) -> None:
    with running_server() as store:
        environment = settings(store.target, "killed", keyring, revocation_grace=grace, **ALL_VERSIONS)
        with (
            serving("nginx", certificate, environment, workers=1) as one,
            serving("nginx", certificate, environment, workers=1) as other,
        ):
            ports = [one.port, other.port]
            for version in VERSIONS:
                await_agreement(ports, version)
            store.kill()
            for version in VERSIONS:
                # At once, or when the stream counts as lost.
                until(partial(resumes_share, ports, version, share))


@pytest.mark.parametrize("version", VERSIONS)
def test_what_was_stored_resumes_in_a_fleet_that_moves_to_tickets(
    target: str, certificate: Path, keyring: Path, version: ssl.TLSVersion
) -> None:
    namespace = f"moves-{version.value}"
    with (
        serving("nginx", certificate, settings(target, namespace, keyring, deadline="5"), workers=1) as stored,
        serving(
            "nginx", certificate, settings(target, namespace, keyring, deadline="5", **ALL_VERSIONS), workers=1
        ) as one,
        serving("nginx", certificate, settings(target, namespace, keyring, **ALL_VERSIONS), workers=1) as other,
    ):
        await_agreement([one.port, other.port], version)
        context = client_context(version)
        _, session = visit(context, stored.port, None)
        for port in one.port, other.port, one.port:
            resumed, session = visit(context, port, session)
            assert resumed


def test_sessions_of_tls_1_2_are_stored_unless_tickets_are_for_them_as_well(
    target: str, certificate: Path, keyring: Path
) -> None:
    environment = settings(target, "tls12", keyring, deadline="5", sessions="tickets")
    with (
        serving("nginx", certificate, environment, workers=1) as one,
        serving("nginx", certificate, environment, workers=1) as other,
    ):
        ports = [one.port, other.port]
        for version, has_ticket in (ssl.TLSVersion.TLSv1_2, False), (ssl.TLSVersion.TLSv1_3, True):
            await_agreement(ports, version)
            assert share_of_resumed(ports, version) == 1.0
            assert visit(client_context(version), one.port, None)[1].has_ticket is has_ticket


@pytest.mark.parametrize("version", VERSIONS)
def test_all_workers_resume_and_so_do_those_after_a_reload(
    target: str, certificate: Path, keyring: Path, version: ssl.TLSVersion
) -> None:
    context = client_context(version)
    environment = settings(target, f"workers-{version.value}", keyring, **ALL_VERSIONS)
    with serving("nginx", certificate, environment, workers=3) as server:
        await_agreement([server.port], version, workers=3)
        _, session = visit(context, server.port, None)
        assert all(visit(context, server.port, session)[0] for _ in range(12))
        server.process.send_signal(signal.SIGHUP)
        until(lambda: renewed(server.log()))
        await_agreement([server.port], version, workers=3)
        assert visit(context, server.port, session)[0]


def test_apache_resumes_after_a_graceful_restart(target: str, certificate: Path, keyring: Path) -> None:
    version = ssl.TLSVersion.TLSv1_3
    context = client_context(version)
    environment = settings(target, "graceful", keyring, **ALL_VERSIONS)
    with serving("apache", certificate, environment, workers=1) as server:
        await_agreement([server.port], version)
        _, session = visit(context, server.port, None)
        server.process.send_signal(signal.SIGUSR1)
        until(lambda: server.log().count("resuming normal operations") == 2)
        await_agreement([server.port], version)
        assert visit(context, server.port, session)[0]
