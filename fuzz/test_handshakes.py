"""Odd handshakes with a frontend that has the shim: as tlsfuzzer makes them, with tlslite-ng, or byte by byte.

After each, an honest client must be served, and resume.
"""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from OpenSSL import SSL
from tlslite.api import HandshakeSettings, TLSConnection
from tlslite.errors import TLSLocalAlert, TLSRemoteAlert

import resumed
from support.server import running_server
from support.suspension import offer, sessions_of
from support.tls import HOSTS, PATIENCE, STACKS, VERSIONS, Client, Frontend

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    from support.server import RunningServer
    from support.tls import Stack

TLS12, TLS13 = VERSIONS
ALERT, HANDSHAKE = 0x15, 0x16
ILLEGAL_PARAMETER, DECODE_ERROR, DECRYPT_ERROR = 47, 50, 51
OP_ALLOW_CLIENT_RENEGOTIATION = 1 << 8
BINDER = 33
"""Bytes at the end of a ClientHello that offers a session of a cipher with SHA-256: a binder and its length."""


@pytest.fixture(scope="module")
def store() -> Iterator[RunningServer]:
    """A store of their own."""
    with running_server() as server:
        yield server


@pytest.fixture(scope="module", params=STACKS)
def shared(request: pytest.FixtureRequest, store: RunningServer) -> Iterator[Frontend]:
    """A frontend of each stack, with a patient shim."""
    yield from _frontend(request.param, store)


@pytest.fixture
def frontend(shared: Frontend) -> Iterator[Frontend]:
    """The same; after each test an honest client is served by it, and resumes."""
    yield shared
    _assert_healthy(shared)


def _frontend(stack: Stack, store: RunningServer) -> Iterator[Frontend]:
    frontend = Frontend(stack, store.target, resumed.Keyring.from_keys([os.urandom(32)]), deadline=PATIENCE)
    yield frontend
    frontend.shim.uninstall()


def _assert_healthy(frontend: Frontend) -> None:
    for version in VERSIONS:
        client = Client(version)
        [session] = sessions_of(client, frontend)
        assert client.visit(frontend, session).reused
    assert not frontend.shim.stats.misses["internal-error"]


@pytest.fixture(params=VERSIONS, ids=lambda version: version.name)
def client(request: pytest.FixtureRequest) -> Client:
    """A client of each version."""
    return Client(request.param)


@contextlib.contextmanager
def served(frontend: Frontend) -> Iterator[socket.socket]:
    """Connect; the frontend must have let go of the connection soon after it is closed."""
    ours, theirs = socket.socketpair()
    with _serving(frontend, ours, theirs):
        yield ours


@contextlib.contextmanager
def _serving(frontend: Frontend, ours: socket.socket, theirs: socket.socket) -> Iterator[None]:
    server = threading.Thread(target=frontend.serve, args=(theirs,))
    server.start()
    ours.settimeout(PATIENCE)
    try:
        with ours:
            yield
    finally:
        server.join(PATIENCE)
        assert not server.is_alive(), "the frontend hangs"


def answer(frontend: Frontend, hello: bytes) -> bytes:
    """Return all that comes back for these bytes and an end."""
    received = b""
    with served(frontend) as connection, contextlib.suppress(OSError):
        connection.sendall(hello)
        connection.shutdown(socket.SHUT_WR)
        while data := connection.recv(65_536):
            received += data
    return received


def hello_of(client: Client, session: ssl.SSLSession | None) -> bytes:
    """Return the ClientHello that offers a session."""
    ours, theirs, hello = offer(client, session)
    ours.close()
    theirs.close()
    return hello


def record(handshake: bytes) -> bytes:
    """Return a ClientHello's body as a message in a record, with the right lengths."""
    message = b"\x01" + len(handshake).to_bytes(3, "big") + handshake
    return b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message


class Visit(NamedTuple):
    """Result of a visit with tlslite-ng: whether it resumed and its session, or the alert."""

    resumed: bool
    session: Any
    alert: int | None


def visit(frontend: Frontend, session: Any = None, name: str = HOSTS[0], **settings: Any) -> Visit:
    """Make a handshake with tlslite-ng, which offers any session, and echo a few bytes."""
    chosen = HandshakeSettings()
    chosen.maxVersion = (3, 3)
    for setting, value in settings.items():
        setattr(chosen, setting, value)
    if session is not None:
        session = copy.copy(session)
        session.serverName = name
    with served(frontend) as connection:
        tls = TLSConnection(connection)
        try:
            tls.handshakeClientCert(session=session, settings=chosen, serverName=name)
            tls.write(b"hello")
            assert tls.read(min=5, max=5) == b"hello"
        except TLSRemoteAlert as alert:
            return Visit(False, None, alert.description)
        seen = Visit(bool(tls.resumed), tls.session, None)
    assert frontend.shim.flush(PATIENCE)
    return seen


def test_a_cut_client_hello(frontend: Frontend, client: Client) -> None:
    hello = hello_of(client, sessions_of(client, frontend)[0])
    for cut in range(0, len(hello), 11):
        assert answer(frontend, hello[:cut])[:1] in (b"", bytes((ALERT,)))
        assert answer(frontend, record(hello[9 : 9 + cut])) != b"" or cut == len(hello)


def test_a_changed_client_hello(frontend: Frontend, client: Client) -> None:
    hello = hello_of(client, sessions_of(client, frontend)[0])
    for at in range(5, len(hello), 7):
        changed = bytearray(hello)
        changed[at] ^= 0xFF
        assert answer(frontend, bytes(changed))[:1] in (b"", bytes((ALERT,)), bytes((HANDSHAKE,)))


def test_a_client_hello_with_random_bytes_behind_it(frontend: Frontend, client: Client) -> None:
    hello = hello_of(client, sessions_of(client, frontend)[0])
    for size in (1, 100, 70_000):
        answer(frontend, hello + os.urandom(size))
    assert answer(frontend, record(hello[9:] + os.urandom(9)))[5:7] == bytes((2, DECODE_ERROR))


def test_session_ids_of_all_lengths(frontend: Frontend) -> None:
    """A session id that is too long makes an invalid ClientHello (RFC 5246 section 7.4.1.2)."""
    known = visit(frontend).session
    for length in range(1, 34):
        known.sessionID = bytearray(os.urandom(length))
        seen = visit(frontend, known)
        assert not seen.resumed
        assert seen.alert == (DECODE_ERROR if length > 32 else None)


def test_a_session_id_that_is_cut_or_changed(frontend: Frontend) -> None:
    known = visit(frontend).session
    whole = bytes(known.sessionID)
    for other in (whole[:-1], whole[1:], whole[:16], bytes(32), whole[:31] + bytes((whole[31] ^ 1,))):
        known.sessionID = bytearray(other)
        assert not visit(frontend, known).resumed
    known.sessionID = bytearray(whole)
    assert visit(frontend, known).resumed


def test_a_session_offered_with_another_master_secret(frontend: Frontend) -> None:
    """An attacker may have read the id on the wire."""
    known = visit(frontend).session
    known.masterSecret = bytearray(48)
    with pytest.raises(TLSLocalAlert, match="bad_record_mac"):
        visit(frontend, known)


def test_a_session_offered_for_another_name(frontend: Frontend) -> None:
    known = visit(frontend).session
    before = frontend.shim.stats.misses["server-name-mismatch"]
    assert not visit(frontend, known, HOSTS[1]).resumed
    assert frontend.shim.stats.misses["server-name-mismatch"] == before + 1
    assert visit(frontend, known).resumed


def test_a_session_offered_without_its_cipher(frontend: Frontend) -> None:
    """A client that offers a session must offer its cipher (RFC 5246 section 7.4.1.2)."""
    known = visit(frontend, cipherNames=["aes256gcm"]).session
    other = visit(frontend, cipherNames=["aes128gcm"]).session
    known.cipherSuite = other.cipherSuite
    assert visit(frontend, known, cipherNames=["aes128gcm"]) == (False, None, ILLEGAL_PARAMETER)


def test_a_tls_1_2_session_offered_where_tls_1_3_is_spoken_too(frontend: Frontend) -> None:
    """TLS 1.3 does not resume by session ids, so the handshake is full."""
    known = visit(frontend).session
    assert not visit(frontend, known, maxVersion=(3, 4)).resumed


def test_a_tls_1_3_ticket_offered_as_a_tls_1_2_session(frontend: Frontend) -> None:
    """Both are ids of the fleet, but the stored session has one version."""
    known = visit(frontend).session
    client = Client(TLS13)
    ids: list[bytes] = []
    shim = frontend.shim._policy
    look_up = shim.on_get_session

    def spy(offer: Any, *more: Any) -> int | None:
        ids.append(offer.session_id)
        found: int | None = look_up(offer, *more)
        return found

    shim.on_get_session = spy
    try:
        assert client.visit(frontend, sessions_of(client, frontend)[0]).reused
    finally:
        del shim.on_get_session
    known.sessionID = bytearray(ids[-1])
    assert not visit(frontend, known).resumed


def test_tickets_with_broken_binders(frontend: Frontend) -> None:
    """A stolen ticket without its secret causes an alert (RFC 8446 section 4.2.11), and still resumes later."""
    client = Client(TLS13)
    client.context.set_ciphers("ALL")
    [session] = sessions_of(client, frontend)
    hello = hello_of(client, session)
    for at in range(1, BINDER - 1, 4):
        broken = bytearray(hello)
        broken[-at] ^= 1
        seen = answer(frontend, bytes(broken))
        assert seen[0] == ALERT
        assert seen[5:7] in (bytes((2, DECRYPT_ERROR)), bytes((2, ILLEGAL_PARAMETER)))
    assert client.visit(frontend, session).reused


def test_a_finished_that_is_wrong(frontend: Frontend) -> None:
    """A stolen id in TLS 1.2 causes a fatal alert, which ends the session (RFC 5246 section 7.2.2)."""
    client = Client(TLS12)
    [session] = sessions_of(client, frontend)
    hello = hello_of(client, session)
    garbage = b"\x14\x03\x03\0\1\1" + b"\x16\x03\x03\0\x28" + os.urandom(40)
    assert bytes((ALERT,)) in answer(frontend, hello + garbage)
    assert frontend.shim.flush(PATIENCE)
    assert not client.visit(frontend, session).reused


@pytest.fixture(params=STACKS)
def another(request: pytest.FixtureRequest, store: RunningServer) -> Iterator[Frontend]:
    """A new frontend of each stack."""
    yield from _frontend(request.param, store)


@pytest.mark.parametrize("allowed", [False, True])
def test_renegotiation(another: Frontend, allowed: bool) -> None:
    """OpenSSL rejects it by default; where it is allowed, it ends in a normal handshake."""
    if allowed and another.stack == "ssl":
        another.context.options |= OP_ALLOW_CLIENT_RENEGOTIATION
    elif allowed:
        another.context.set_options(OP_ALLOW_CLIENT_RENEGOTIATION)
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    with served(another) as connection:
        connection.setblocking(True)
        tls = SSL.Connection(context, connection)
        tls.set_connect_state()
        tls.set_tlsext_host_name(HOSTS[0].encode())
        tls.do_handshake()
        echo(tls, b"hello")
        assert tls.renegotiate()
        if allowed:
            tls.do_handshake()
            echo(tls, b"again")
            assert tls.total_renegotiations() == 1
        else:
            with pytest.raises(SSL.Error, match="no renegotiation"):
                tls.do_handshake()
    _assert_healthy(another)


def echo(tls: SSL.Connection, data: bytes) -> None:
    """Send `data` and read it back."""
    tls.send(data)
    assert tls.recv(len(data)) == data
