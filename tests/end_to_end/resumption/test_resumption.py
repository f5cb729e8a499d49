"""Sessions resume on the intended frontends and on no others: real handshakes with a real server."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from OpenSSL import SSL

import resumed
from support.loops import LoopFrontend, running
from support.tls import PATIENCE, Client, Frontend, OrderedClient, server_context

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.server import RunningServer
    from support.tls import Stack

AES_128_FIRST = "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384"
OTHER: dict[Stack, Stack] = {"ssl": "pyopenssl", "pyopenssl": "ssl"}


def mixed(store: RunningServer, keyring: resumed.Keyring, stack: Stack, **options: Any) -> list[Frontend]:
    """Return a frontend of a stack and one of the other."""
    return [Frontend(each, store.target, keyring, **options) for each in (stack, OTHER[stack])]


def test_another_frontend_of_another_stack_resumes(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    negotiator, resumer = mixed(store, keyring, stack)
    first = client.visit(negotiator)
    second = client.visit(resumer, first.session)
    third = client.visit(negotiator, second.session)
    assert (first.reused, second.reused, third.reused) == (False, True, True)
    assert sum(resumer.shim.stats.hits.values()) == 1


def test_a_hit_is_counted_although_the_client_cannot_prove_the_secret(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack
) -> None:
    """The handshake with a wrong binder fails (RFC 8446 section 4.2.11.2), and the session stays."""
    frontend, client = Frontend(stack, store.target, keyring), Client(ssl.TLSVersion.TLSv1_3)
    session = client.visit(frontend).session
    assert frontend.shim.flush()
    outgoing = ssl.MemoryBIO()
    tls = client.context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost", session=session)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = bytearray(outgoing.read())
    hello[-1] ^= 1  # the binder ends the ClientHello
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE)
    with ours, ThreadPoolExecutor(1) as pool:
        serving = pool.submit(frontend.serve, theirs)
        ours.sendall(hello)
        assert ours.recv(1) == b"\x15"  # an alert
        serving.result(PATIENCE)
    assert (frontend.shim.stats.hits, frontend.shim.stats.misses) == ({"store": 1}, {})
    assert client.visit(frontend, session).reused


def test_without_the_shim_the_other_frontend_does_not_resume(stack: Stack, client: Client) -> None:
    """This shows that the other tests of this module measure the library."""
    one, other = Frontend(stack, None), Frontend(OTHER[stack], None)
    assert not client.visit(other, client.visit(one).session).reused


def test_a_connection_cut_by_the_peer_leaves_its_session(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    """OpenSSL calls the remove callback without a close_notify, but RFC 5246 section 7.2.1 keeps the session."""
    frontend = Frontend(stack, store.target, keyring)
    session = client.visit(frontend).session
    assert frontend.shim.flush()
    assert frontend.shim.stats.removals["kept"] == 1
    assert client.visit(frontend, session).reused


@pytest.mark.parametrize("end", ["send_garbage", "send_fatal_alert"])
def test_after_a_fatal_alert_no_session_of_the_connection_resumes_anywhere(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client, end: str
) -> None:
    """RFC 5246 section 7.2.2 and RFC 8446 section 6.2, for alerts in either direction."""
    frontend, other = mixed(store, keyring, stack)
    with client.connect(frontend) as connection:
        first_ticket = connection.tls.session
        connection.echo(b"hello")
        last_ticket = connection.tls.session
        getattr(connection, end)()
    assert frontend.shim.flush()
    assert frontend.shim.stats.removals["fatal-error"] == (2 if client.version == ssl.TLSVersion.TLSv1_3 else 1)
    for session in filter(None, (first_ticket, last_ticket)):
        assert not client.visit(frontend, session).reused
        assert not client.visit(other, session).reused


def test_after_a_fatal_alert_none_of_many_tickets_resumes(store: RunningServer, keyring: resumed.Keyring) -> None:
    """Servers that resume data channels, such as FTPS, issue a few dozen tickets."""
    frontend, client = Frontend("ssl", store.target, keyring), Client(ssl.TLSVersion.TLSv1_3)
    frontend.context.num_tickets = 40
    with client.connect(frontend) as connection:
        connection.echo(b"hello")
        connection.send_garbage()
    assert frontend.shim.flush()
    assert frontend.shim.stats.removals["fatal-error"] == 40


def test_after_a_fatal_alert_the_session_that_was_resumed_is_gone_too(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    frontend = Frontend(stack, store.target, keyring)
    session = client.visit(frontend).session
    with client.connect(frontend, session) as connection:
        connection.echo(b"hello")
        renewed = connection.tls.session
        connection.send_garbage()
    assert frontend.shim.flush()
    assert not client.visit(frontend, session).reused
    assert not client.visit(frontend, renewed).reused


def test_an_error_of_another_connection_ends_no_session(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    """The garbage collector may free a closed connection while the thread's error queue belongs to another one."""

    class Erring(Frontend):
        def serve(self, connection: socket.socket) -> None:
            with connection:
                if stack == "ssl":
                    peer: Any = self.context.wrap_socket(connection, server_side=True)
                else:
                    peer = SSL.Connection(self.context, connection)
                    peer.set_accept_state()
                    peer.do_handshake()
                peer.sendall(peer.recv(16_384))
                library, nonsense = self.shim._binding.library, ctypes.c_char_p(b"nonsense")
                library.d2i_SSL_SESSION(None, ctypes.byref(ctypes.c_void_p.from_buffer(nonsense)), 8)
                assert library.ERR_peek_last_error()
                if stack == "ssl":
                    peer._sslobj = None  # without its socket, which is to be closed
                    peer.close()

    frontend = Erring(stack, store.target, keyring)
    session = client.visit(frontend).session
    assert frontend.shim.flush(PATIENCE)
    assert frontend.shim.stats.removals == {"kept": 1}
    assert client.visit(frontend, session).reused


def test_a_removed_session_resumes_nowhere(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    one, other = mixed(store, keyring, stack)
    session = client.visit(one).session
    assert session is not None
    assert client.visit(other, session).reused
    if client.version == ssl.TLSVersion.TLSv1_2:
        assert one.shim.remove(session.id).result(PATIENCE)
    else:  # the client knows its TLS 1.3 ticket by another name: have a connection fail instead
        with client.connect(one, session) as connection:
            connection.echo(b"hello")
            connection.send_garbage()
    assert one.shim.flush()
    assert not client.visit(one, session).reused
    assert not client.visit(other, session).reused


class LoggingOut(Frontend):
    """A frontend that removes the sessions of each connection that it serves, named by `source`."""

    def __init__(self, source: Callable[[Any], Any], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.source = source
        self.removals: list[Any] = []
        self.ids: frozenset[bytes] = frozenset()

    def serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, SSL.Error):
            if self.stack == "ssl":
                peer: Any = self.context.wrap_socket(connection, server_side=True)
            else:
                peer = SSL.Connection(self.context, connection)
                peer.set_accept_state()
                peer.do_handshake()
            with contextlib.closing(peer):
                peer.sendall(peer.recv(16_384))
                self.ids = self.shim.session_ids(peer)
                self.removals.append(self.shim.remove(self.source(peer)))
                peer.recv(1)


@pytest.mark.parametrize("source", ["connection", "session", "ids", "id"])
def test_removing_a_connections_sessions_removes_all_of_them(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client, source: str
) -> None:
    def named(peer: Any) -> Any:
        if source == "session":
            return peer.session if stack == "ssl" else peer.get_session()
        ids = frontend.shim.session_ids(peer)
        return ids if source == "ids" else min(ids) if source == "id" else peer

    frontend = LoggingOut(named, stack, store.target, keyring)
    other = Frontend("ssl", store.target, keyring)
    negotiated = client.visit(other).session
    assert other.shim.flush(PATIENCE)
    assert client.visit(frontend, negotiated).reused
    assert frontend.removals.pop().result(PATIENCE)
    assert not client.visit(other, negotiated).reused, "the session that was resumed"
    client.visit(frontend)
    assert frontend.removals.pop().result(PATIENCE)
    assert len(frontend.ids) == (2 if client.version == ssl.TLSVersion.TLSv1_3 else 1)
    keys = [resumed.StoreKeys("shop").key(each) for each in frontend.ids]
    left = resumed.StoreClient(store.target, namespace="shop", deadline=PATIENCE)
    assert [left.get(key) for key in keys] == [None] * len(keys)
    left.close()


def test_what_has_no_session_is_refused(store: RunningServer, keyring: resumed.Keyring, stack: Stack) -> None:
    frontend = Frontend(stack, store.target, keyring)
    for wrong in (None, 7, "id", frontend):
        with pytest.raises(TypeError, match="session"):
            frontend.shim.remove(wrong)
    ours, theirs = socket.socketpair()
    with ours, theirs, contextlib.ExitStack() as opened:
        peer: Any = SSL.Connection(frontend.context, theirs) if stack == "pyopenssl" else None
        if peer is None:
            peer = frontend.context.wrap_socket(theirs, server_side=True, do_handshake_on_connect=False)
            opened.enter_context(peer)
        with pytest.raises(ValueError, match="handshake is not over"):
            frontend.shim.remove(peer)


def test_single_use_sessions_resume_once_in_the_whole_fleet(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    """RFC 8446 section 8.1."""
    one, other = mixed(store, keyring, stack, single_use=True)
    session = client.visit(one).session
    assert [client.visit(frontend, session).reused for frontend in (other, one, other)] == [True, False, False]


@pytest.mark.parametrize("single_use", [False, True])
def test_a_client_that_is_asked_for_another_key_share_resumes(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, single_use: bool
) -> None:
    """With HelloRetryRequest OpenSSL calls the get callback twice."""
    client = Client(ssl.TLSVersion.TLSv1_3)
    frontend = Frontend(stack, store.target, keyring, single_use=single_use)
    if stack == "ssl":
        frontend.context.set_ecdh_curve("secp384r1")
    else:
        from cryptography.hazmat.primitives.asymmetric import ec

        frontend.context.set_tmp_ecdh(ec.SECP384R1())
    session = client.visit(frontend).session
    for count in (1, 2):
        visit = client.visit(frontend, session)
        assert visit.reused
        assert sum(frontend.shim.stats.hits.values()) == count
        session = visit.session
    assert not frontend.shim.stats.misses


@pytest.mark.parametrize("rests", [False, True])
def test_a_session_with_another_hash_is_a_miss_and_the_next_one_fits(
    store: RunningServer, keyring: resumed.Keyring, rests: bool
) -> None:
    """A server of the fleet has another order of ciphersuites.

    OpenSSL would drop such a session after the lookup and issue no ticket, so the client would never recover. A
    suspended handshake is looked up before OpenSSL has chosen a cipher.
    """
    follows, prefers = mixed(store, keyring, "pyopenssl", single_use=True)
    if rests:
        with running(LoopFrontend("asyncio", store.target, keyring, single_use=True)) as on_a_loop:
            _another_hash(follows, on_a_loop)
    else:
        _another_hash(follows, prefers)


def _another_hash(follows: Frontend, prefers: Frontend) -> None:
    follows.context.set_tls13_ciphersuites(AES_128_FIRST.encode())
    client = OrderedClient(AES_128_FIRST)
    _, first = client.visit(follows)
    reused, second = client.visit(prefers, first)
    assert not reused
    assert prefers.shim.stats.misses == {"other-cipher": 1}
    assert not prefers.shim.stats.hits
    assert client.visit(prefers, second)[0], "it was issued a ticket that fits"
    assert client.visit(follows, first)[0], "the first one was not taken"


@pytest.mark.parametrize("preferred", ["TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256"])
def test_unlike_stacks_choose_the_same_cipher_for_a_client(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, preferred: str
) -> None:
    """By default `ssl` takes the server's order, and other stacks take the client's, which is AES-128 in browsers."""
    client = OrderedClient(f"{preferred}:TLS_AES_256_GCM_SHA384")
    frontends = mixed(store, keyring, stack)
    _, session = client.visit(frontends[0])
    for visit in range(1, 6):
        reused, session = client.visit(frontends[visit % 2], session)
        assert reused


def test_a_context_with_an_order_of_its_own_is_named_once(
    store: RunningServer, keyring: resumed.Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    context = server_context("pyopenssl")
    context.set_tls13_ciphersuites(AES_128_FIRST.encode())
    options: dict[str, Any] = {"target": store.target, "namespace": "shop", "keyring": keyring}
    resumed.install(context, **options)
    assert not caplog.records, "in a fleet of one stack the order is the same everywhere"
    resumed.install(context, **options, ignore_id_context=True, replace=True)
    (record,) = caplog.records
    assert "prefers TLS_AES_128_GCM_SHA256" in record.getMessage()


def test_uninstall_gives_the_order_of_ciphers_back(store: RunningServer, keyring: resumed.Keyring) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    before = context.options
    installation = resumed.install(
        context, target=store.target, namespace="shop", keyring=keyring, ignore_id_context=True
    )
    assert context.options & ssl.OP_CIPHER_SERVER_PREFERENCE
    installation.uninstall()
    assert context.options == before


def test_no_session_crosses_namespaces(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    shop, bank = (Frontend(stack, store.target, keyring, namespace=name) for name in ("shop", "bank"))
    assert not client.visit(bank, client.visit(shop).session).reused
    assert bank.shim.stats.misses["foreign-id"] == 1


def test_no_session_crosses_fleets(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    stranger = resumed.Keyring.from_keys([bytes(32)])
    frontend = Frontend(stack, store.target, keyring)
    foreign = Frontend(stack, store.target, stranger, accept_foreign_ids=True)
    session = client.visit(frontend).session
    assert frontend.shim.flush()
    assert not client.visit(foreign, session).reused
    assert foreign.shim.stats.misses["unknown-key"] == 1


def test_sessions_live_as_long_as_their_negotiation_allows(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    clock = Clock()
    frontend = Frontend(stack, store.target, keyring, lifetime=1000)
    frontend.shim._policy._clock = clock
    session = client.visit(frontend).session
    for _ in range(3):
        frontend.shim.flush()
        clock.ahead += 300
        visit = client.visit(frontend, session)
        assert visit.reused
        session = visit.session
    frontend.shim.flush()
    clock.ahead += 101
    assert not client.visit(frontend, session).reused


@pytest.mark.parametrize("seconds", [0.0, 90.0])
def test_many_resumptions_neither_prolong_nor_shorten_a_session(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, seconds: float
) -> None:
    """TLS 1.3 issues tickets at the end of the handshake, which a client may delay."""
    clock, client = Clock(), Client(ssl.TLSVersion.TLSv1_3)
    frontend = Frontend(stack, store.target, keyring, lifetime=1000, deadline=5.0)
    frontend.shim._policy._clock = clock
    started, session = clock(), client.visit(frontend).session
    while clock() - started < 980:
        frontend.shim.flush()
        with client.connect(frontend, session, pause=lambda: clock.pass_by(seconds)) as connection:
            connection.echo(b"hello")
            assert connection.tls.session_reused
            session = connection.tls.session
        clock.pass_by(9.7)
    frontend.shim.flush()
    clock.ahead += 1001 - (clock() - started)
    assert not client.visit(frontend, session).reused


def test_plaintext_has_to_be_asked_for_and_works(store: RunningServer, stack: Stack, client: Client) -> None:
    one, other = mixed(store, resumed.Keyring.plaintext(), stack)
    assert client.visit(other, client.visit(one).session).reused


def test_stateless_tickets_are_not_stored(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    frontend = Frontend(stack, store.target, keyring)
    library, pointer = frontend.shim._binding.library, frontend.shim._binding._pointer
    library.SSL_CTX_clear_options(pointer, 1 << 14)
    assert client.visit(frontend).session
    assert frontend.shim.flush()
    assert frontend.shim.stats.puts["stored"] == 0


def test_a_session_of_another_version_makes_a_full_handshake(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack
) -> None:
    client = Client(ssl.TLSVersion.TLSv1_2)
    session = client.visit(Frontend(stack, store.target, keyring)).session
    client.context.maximum_version = ssl.TLSVersion.TLSv1_3
    modern = Frontend(stack, store.target, keyring)
    if stack == "ssl":
        modern.context.minimum_version = ssl.TLSVersion.TLSv1_3
    else:
        modern.context.set_min_proto_version(ssl.TLSVersion.TLSv1_3)
    assert not client.visit(modern, session).reused


def test_a_tls_1_2_session_keeps_its_cipher_wherever_it_resumes(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack
) -> None:
    """OpenSSL checks the cipher of a session against the client's list only (see SECURITY.md)."""
    ciphers = (b"ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256", b"AES256+ECDHE")
    client = Client(ssl.TLSVersion.TLSv1_2)
    frontends = [Frontend(stack, store.target, keyring) for _ in ciphers]
    for frontend, cipher in zip(frontends, ciphers, strict=True):
        if stack == "ssl":
            frontend.context.set_ciphers(cipher.decode())
        else:
            frontend.context.set_cipher_list(cipher)
    session = client.visit(frontends[0]).session
    with client.connect(frontends[1], session) as connection:
        assert connection.tls.session_reused
        assert "AES128-GCM-SHA256" in str(connection.tls.cipher())


def test_a_session_without_extended_master_secret_makes_a_full_handshake_with_it(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack
) -> None:
    """RFC 7627 section 5.3."""
    client = Client(ssl.TLSVersion.TLSv1_2)
    frontend = Frontend(stack, store.target, keyring)
    client.context.options |= NO_EXTENDED_MASTER_SECRET
    session = client.visit(frontend).session
    assert client.visit(frontend, session).reused
    client.context.options ^= NO_EXTENDED_MASTER_SECRET
    assert not client.visit(frontend, session).reused


def test_a_session_with_extended_master_secret_is_refused_without_it(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack
) -> None:
    """RFC 7627 section 5.3: the server MUST abort, since an attacker may have removed the extension."""
    client = Client(ssl.TLSVersion.TLSv1_2)
    frontend = Frontend(stack, store.target, keyring)
    session = client.visit(frontend).session
    client.context.options |= NO_EXTENDED_MASTER_SECRET
    with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
        client.visit(frontend, session)


NO_EXTENDED_MASTER_SECRET = 1  # SSL_OP_NO_EXTENDED_MASTER_SECRET


class Clock:
    """The real time plus an offset."""

    ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead

    def pass_by(self, seconds: float) -> None:
        self.ahead += seconds
