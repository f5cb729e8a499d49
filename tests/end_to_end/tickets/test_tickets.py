"""Tickets resume at every frontend of the fleet, and at no other: real handshakes with a real store."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from OpenSSL import SSL

import resumed
from resumed._crypto.ticket_secret import TicketSecret
from support.loops import LoopFrontend, running
from support.ports import free_port
from support.processes import paused
from support.server import running_server
from support.tickets import TicketFrontend
from support.tls import CA, CERTIFICATE, PATIENCE, Client, Frontend, OrderedClient
from support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from support.server import RunningServer
    from support.tls import Stack

NAMESPACES = (f"shop-{number}" for number in itertools.count())
OTHER: dict[Stack, Stack] = {"ssl": "pyopenssl", "pyopenssl": "ssl"}
TLS12, TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


def mixed(store: RunningServer, keyring: resumed.Keyring, stack: Stack, **options: Any) -> list[TicketFrontend]:
    """Return a frontend of a stack and one of the other, in a namespace of their own."""
    options = {"namespace": next(NAMESPACES), **options}
    return [TicketFrontend(each, store.target, keyring, **options) for each in (stack, OTHER[stack])]


def test_a_ticket_resumes_at_another_frontend_of_another_stack(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    negotiator, resumer = mixed(store, keyring, stack)
    session = client.visit(negotiator).session
    for frontend in (resumer, negotiator, resumer):
        visit = client.visit(frontend, session)
        assert visit.reused
        session = visit.session
    assert (negotiator.resumed, resumer.resumed) == (1, 2)
    for frontend in (negotiator, resumer):
        stats = frontend.shim.stats
        assert not stats.puts
        assert not stats.lookup_seconds_sum, "no handshake called the store"


def test_tls_1_2_keeps_its_stored_sessions_unless_tickets_are_wanted_there(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    one, other = mixed(store, keyring, stack, tickets_tls12=False)
    session = client.visit(one).session
    assert one.shim.flush(PATIENCE)
    assert client.visit(other, session).reused
    stored = client.version == TLS12
    assert sum(other.shim.stats.hits.values()) == stored
    assert other.resumed == (not stored)


def test_a_fleet_moves_to_tickets_without_losing_a_session(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    before, after = Frontend(stack, store.target, keyring), TicketFrontend(stack, store.target, keyring)
    session = client.visit(before).session
    assert before.shim.flush(PATIENCE)
    for _ in range(2):
        visit = client.visit(after, session)
        assert visit.reused
        session = visit.session
    assert sum(after.shim.stats.hits.values()) == after.resumed == 1


def test_a_client_that_offers_a_stored_session_in_vain_gets_a_ticket(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    stranger = Frontend(stack, store.target, resumed.Keyring.from_keys([os.urandom(32)]))
    session = client.visit(stranger).session
    frontend = TicketFrontend(stack, store.target, keyring)
    visit = client.visit(frontend, session)
    assert not visit.reused
    assert client.visit(frontend, visit.session).reused
    assert frontend.resumed == 1


def test_a_ticket_that_ends_at_once_is_withheld_and_the_next_handshake_works(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack
) -> None:
    client = Client(TLS13)
    frontend = TicketFrontend(stack, store.target, keyring, lifetime=1000)
    session = client.visit(frontend).session
    frontend.advance(999)
    limited = frontend.tickets.limited
    frontend.tickets.limited = lambda *_: None
    withheld = client.visit(frontend, session)
    assert withheld.reused
    frontend.tickets.limited = limited
    visit = client.visit(frontend, withheld.session)
    assert not visit.reused
    assert client.visit(frontend, visit.session).reused


def test_a_session_that_was_stored_does_not_live_longer_as_a_ticket(
    store: RunningServer, keyring: resumed.Keyring
) -> None:
    client = Client(TLS13)
    before, after = Frontend("ssl", store.target, keyring, lifetime=600), TicketFrontend("ssl", store.target, keyring)
    session = client.visit(before).session
    assert before.shim.flush(PATIENCE)
    ticket = client.visit(after, session).session
    assert ticket
    assert 590 <= ticket.ticket_lifetime_hint <= 600
    after.advance(601)
    assert not client.visit(after, ticket).reused
    assert after.refused == {"expired": 1}


def test_resuming_prolongs_no_lineage(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    frontend = TicketFrontend(stack, store.target, keyring, lifetime=1000)
    session = client.visit(frontend).session
    for seconds in (300, 600, 900):
        frontend.advance(seconds)
        visit = client.visit(frontend, session)
        assert visit.reused
        session = visit.session if client.version == TLS13 else session
    frontend.advance(1000)
    assert not client.visit(frontend, session).reused
    assert frontend.refused == {"expired": 1}


def test_a_ticket_for_one_server_name_is_none_for_another(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    one, other = mixed(store, keyring, stack)
    session = client.visit(one, host="public.example").session
    assert not client.visit(other, session, host="private.example").reused
    assert other.refused == {"server-name-mismatch": 1}
    assert client.visit(other, session, host="public.example").reused


def test_a_servername_callback_gets_the_name_of_the_client_when_a_ticket_resumes(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    negotiator, resumer = mixed(store, keyring, stack)  # the negotiator has no such callback
    names: list[str] = []

    def note(connection: ssl.SSLObject | SSL.Connection, name: str | None = None, *_: object) -> None:
        names.append(
            (connection.get_servername() or b"").decode() if isinstance(connection, SSL.Connection) else str(name)
        )

    if resumer.stack == "ssl":
        resumer.context.sni_callback = note
    else:
        resumer.context.set_tlsext_servername_callback(note)
    client.visit(resumer)  # learns the name
    assert client.visit(resumer, client.visit(negotiator).session).reused
    assert names == ["localhost", "localhost"]


def test_no_ticket_crosses_namespaces_or_fleets(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    session = client.visit(TicketFrontend(stack, store.target, keyring)).session
    bank = TicketFrontend(stack, store.target, keyring, namespace="bank")
    stranger = TicketFrontend(stack, store.target, resumed.Keyring.from_keys([os.urandom(32)]))
    for frontend in (bank, stranger):
        assert not client.visit(frontend, session).reused
        assert frontend.refused == {"unknown-secret": 1}


def test_a_changed_ticket_costs_a_full_handshake(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(TLS13)
    frontend = TicketFrontend(stack, store.target, keyring)
    session = client.visit(frontend).session
    monkeypatch.setattr(TicketSecret, "openssl", property(lambda self: self.name + bytes(64)))
    for secret in frontend.tickets._secrets.held(time.time()):
        secret.prepared.clear()
    visit = client.visit(frontend, session)
    assert not visit.reused
    assert frontend.refused == {"not-authentic": 1}


def test_a_ticket_with_another_hash_is_refused_and_the_next_one_fits(
    store: RunningServer, keyring: resumed.Keyring
) -> None:
    """A server of the fleet has another order of ciphersuites."""
    follows, prefers = mixed(store, keyring, "pyopenssl")
    order = "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384"
    follows.context.set_tls13_ciphersuites(order.encode())
    client = OrderedClient(order)
    _, first = client.visit(follows)
    reused, second = client.visit(prefers, first)
    assert not reused
    assert prefers.refused == {"other-cipher": 1}
    assert client.visit(prefers, second)[0]


@pytest.mark.parametrize("single_use", [False, True])
def test_a_client_that_is_asked_for_another_key_share_resumes(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, single_use: bool
) -> None:
    """With HelloRetryRequest OpenSSL calls the decrypt callback twice, and one use must suffice."""
    from cryptography.hazmat.primitives.asymmetric import ec

    client = Client(TLS13)
    frontend = TicketFrontend(stack, store.target, keyring, single_use=single_use)
    if stack == "ssl":
        frontend.context.set_ecdh_curve("secp384r1")
    else:
        frontend.context.set_tmp_ecdh(ec.SECP384R1())
    session = client.visit(frontend).session
    for _ in range(2):
        visit = client.visit(frontend, session)
        assert visit.reused
        session = visit.session
    assert not frontend.refused


# --- Removals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["send_garbage", "send_fatal_alert"])
def test_after_a_fatal_alert_no_ticket_of_the_lineage_resumes_anywhere(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client, end: str
) -> None:
    frontend, other = mixed(store, keyring, stack)
    before = client.visit(frontend).session
    with client.connect(frontend, before) as connection:
        connection.echo(b"hello")
        after = connection.tls.session
        getattr(connection, end)()
    for session in (before, after):
        assert not client.visit(frontend, session).reused, "not even before the store has heard of it"
    assert frontend.shim.flush(PATIENCE)
    assert frontend.shim.stats.removals["fatal-error"] == 1
    until(lambda: other.shim.removals_held)
    later = TicketFrontend(stack, store.target, keyring, namespace=other.shim.namespace)
    for each in (other, later):
        for session in (before, after):
            assert not client.visit(each, session).reused
        assert each.refused == {"revoked": 2}


def test_a_connection_that_was_cut_leaves_its_tickets(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    frontend, other = mixed(store, keyring, stack)
    session = client.visit(frontend).session  # without close_notify
    assert frontend.shim.stats.removals == {"kept": 1}
    assert client.visit(other, session).reused


@pytest.mark.parametrize("source", ["connection", "session", "ids"])
def test_removing_a_connection_ends_its_lineage_everywhere(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client, source: str
) -> None:
    class LoggingOut(TicketFrontend):
        def serve(self, connection: socket.socket) -> None:
            with connection:
                if self.stack == "ssl":
                    peer: Any = self.context.wrap_socket(connection, server_side=True)
                else:
                    peer = SSL.Connection(self.context, connection)
                    peer.set_accept_state()
                    peer.do_handshake()
                peer.sendall(peer.recv(16_384))
                session = peer.session if self.stack == "ssl" else peer.get_session()
                named = {"connection": peer, "session": session, "ids": self.shim.session_ids(peer)}[source]
                assert self.shim.remove(named).result(PATIENCE)
                peer.close()

    namespace = next(NAMESPACES)
    other = TicketFrontend(stack, store.target, keyring, namespace=namespace)
    negotiated = client.visit(other).session
    visit = client.visit(LoggingOut(stack, store.target, keyring, namespace=namespace), negotiated)
    assert visit.reused
    until(lambda: other.shim.removals_held)
    for session in (negotiated, visit.session):
        assert not client.visit(other, session).reused


@pytest.mark.parametrize("timed", [False, True], ids=["now", "before a time"])
def test_a_purge_ends_all_tickets_of_before(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client, timed: bool
) -> None:
    one, other = mixed(store, keyring, stack)
    session = client.visit(one).session
    name = one.tickets._secrets.current(time.time())[0].name
    before = time.time() if timed else None
    with resumed.Admin(store.target) as admin:
        admin.purge(one.shim.namespace, before)
    for frontend in (one, other):
        until(partial(getattr, frontend.tickets.removals, "void_before"))
        assert not client.visit(frontend, session).reused
    if not timed:
        for frontend in (one, other):
            until(partial(frontend.tickets._secrets.held, time.time()))
        assert {frontend.tickets._secrets.current(time.time())[0].name for frontend in (one, other)} != {name}
        again = client.visit(one).session
        assert client.visit(other, again).reused
    later = TicketFrontend(stack, store.target, keyring, namespace=one.shim.namespace)
    assert not client.visit(later, session).reused


def test_a_store_without_the_stream_of_removals_is_named(
    store: RunningServer, keyring: resumed.Keyring, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from resumed._client import store as store_module

    original = store_module.Watch.__enter__

    def entered_of_before(self: Any) -> Any:
        original(self)
        self.removals_only = False
        return self

    monkeypatch.setattr(store_module.Watch, "__enter__", entered_of_before)
    client = Client(TLS13)
    frontend = Frontend("ssl", store.target, keyring, sessions="tickets")
    until(lambda: "upgrade it before the frontends" in caplog.text)
    session = client.visit(frontend).session
    assert not client.visit(frontend, session).reused
    assert frontend.shim.stats.tickets_refused == {"removals-unknown": 1}
    frontend.shim.uninstall()


# --- Outages --------------------------------------------------------------------------------------------------------


def test_without_the_store_tickets_resume_for_the_grace_and_no_longer(
    keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    with running_server() as store:
        one, other = (
            TicketFrontend(each, store.target, keyring, revocation_grace=100) for each in (stack, OTHER[stack])
        )
        session = client.visit(one).session
        store.kill()
    until(lambda: not other.shim.removals_live)
    assert client.visit(other, session).reused, other.refused
    other.tickets._monotonic = lambda: time.monotonic() + 101
    visit = client.visit(other, session)
    assert not visit.reused
    assert other.refused == {"removals-unknown": 1}


def test_a_store_that_comes_late_costs_tickets_and_no_handshake(keyring: resumed.Keyring, client: Client) -> None:
    with running_server() as store:
        with paused(store.process):
            frontend = Frontend("ssl", store.target, keyring, sessions="tickets", tickets_tls12=True)
            for _ in range(3):
                assert not client.visit(frontend).reused
            assert frontend.shim.stats.tickets_withheld["no-secret"]
        until(lambda: frontend.shim.removals_live and frontend.shim.ticket_secrets_held)
        session = client.visit(frontend).session
        assert client.visit(frontend, session).reused


def test_the_first_secret_may_come_between_two_tickets_of_a_handshake(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    """The session of the first ticket is stored then, and the second is a ticket of the fleet."""
    client, frontend = Client(TLS13), TicketFrontend(stack, store.target, keyring)
    secrets = iter([lambda: None])
    present = frontend.tickets.secret_for_issue
    frontend.tickets.secret_for_issue = lambda: next(secrets, present)()  # noqa: PLW0108
    session = client.visit(frontend).session
    assert frontend.shim.stats.tickets_issued == {"current": 1}
    assert client.visit(frontend, session).reused
    assert not caplog.records


def test_an_outage_is_logged_once(keyring: resumed.Keyring, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with running_server() as store:
        frontend = TicketFrontend("ssl", store.target, keyring)
    until(lambda: "are not followed" in caplog.text)
    del frontend
    assert caplog.text.count("are not followed") == 1


def test_removals_that_the_store_lost_with_its_storage_are_sent_again(
    keyring: resumed.Keyring, client: Client, tmp_path: Path
) -> None:
    port = free_port()
    with running_server("--storage", f"lmdb://{tmp_path}/one", listen=f"127.0.0.1:{port}") as store:
        frontend = TicketFrontend("ssl", store.target, keyring)
        with client.connect(frontend, client.visit(frontend).session) as connection:
            connection.echo(b"hello")
            session = connection.tls.session
            connection.send_garbage()
        assert frontend.shim.flush(PATIENCE)
    with running_server("--storage", f"lmdb://{tmp_path}/other", listen=f"127.0.0.1:{port}") as store:
        watched = resumed.StoreClient(store.target, namespace="shop", deadline=PATIENCE)
        with watched.watch(removals_only=True) as watch:
            assert any(change.key and change.ttl for batch in watch for change in batch.changes)
        watched.close()
        later = TicketFrontend("ssl", store.target, keyring)
        later.tickets._secrets.revoke(lambda _: True)
        later.tickets._secrets._by_name |= frontend.tickets._secrets._by_name
        assert not client.visit(later, session).reused
        assert later.refused == {"revoked": 1}


# --- Single use -----------------------------------------------------------------------------------------------------


def test_a_ticket_that_is_good_for_one_use_resumes_once_in_the_whole_fleet(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    one, other = mixed(store, keyring, stack, single_use=True)
    session = client.visit(one).session
    assert [client.visit(frontend, session).reused for frontend in (other, one, other)] == [True, False, False]
    assert one.refused == other.refused == {"replayed": 1}


def test_a_ticket_that_many_offer_at_once_resumes_once(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    frontends = mixed(store, keyring, stack, single_use=True)
    session = client.visit(frontends[0]).session
    with ThreadPoolExecutor(16) as threads:
        visits = list(threads.map(lambda number: client.visit(frontends[number % 2], session), range(32)))
    assert sum(visit.reused for visit in visits) == 1


def test_a_ticket_is_not_used_up_where_it_does_not_fit(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    one, other = mixed(store, keyring, stack, single_use=True)
    session = client.visit(one, host="public.example").session
    assert not client.visit(other, session, host="private.example").reused
    assert client.visit(other, session, host="public.example").reused


def test_without_the_store_no_ticket_of_one_use_resumes(keyring: resumed.Keyring, stack: Stack, client: Client) -> None:
    with running_server() as store:
        frontend = TicketFrontend(stack, store.target, keyring, single_use=True)
        session = client.visit(frontend).session
    assert not client.visit(frontend, session).reused
    assert set(frontend.refused) <= {"unavailable", "timeout"}


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_on_an_event_loop_a_single_use_rests_until_the_store_has_answered(
    store: RunningServer, keyring: resumed.Keyring, loop: Any, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"sessions": "tickets", "tickets_tls12": True, "single_use": True}
    with running(LoopFrontend(loop, store.target, keyring, **options)) as frontend:
        until(lambda: frontend.shim.removals_live and frontend.shim.ticket_secrets_held)
        session = client.visit(frontend).session
        lookups = frontend.shim._policy._lookups
        claim, threads = lookups._put, []

        def slow(*arguments: Any) -> Any:
            threads.append(threading.current_thread())
            beat = threading.Event()
            frontend.loop.call_soon_threadsafe(beat.set)
            assert beat.wait(PATIENCE), "the loop waits"
            return claim(*arguments)

        monkeypatch.setattr(lookups, "_put", slow)
        assert client.visit(frontend, session).reused
        assert not client.visit(frontend, session).reused
        assert frontend._thread not in threads
        assert len(threads) == 2


# --- Contexts and processes -----------------------------------------------------------------------------------------


def test_a_session_with_long_certificates_is_stored_instead(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack
) -> None:
    client = Client(TLS13)
    authority = trustme.CA()
    names = [f"name-{number}.client.example" for number in range(600)]
    authority.issue_cert(*names).configure_cert(client.context)
    one, other = mixed(store, keyring, stack)
    for frontend in (one, other):
        authority.configure_trust(frontend.context)
        if frontend.stack == "ssl":
            frontend.context.verify_mode = ssl.CERT_REQUIRED
        else:
            frontend.context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, lambda *_: True)
    session = client.visit(one).session
    assert one.shim.flush(PATIENCE)
    assert one.shim.stats.puts == {"stored": 2}
    reused = client.visit(one, session).reused
    assert reused
    assert sum(one.shim.stats.hits.values()) == 1


def test_uninstall_gives_the_context_its_own_tickets_back(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    frontend, other = mixed(store, keyring, stack)
    session = client.visit(frontend).session
    frontend.shim.uninstall()
    own = client.visit(frontend, session)
    assert not own.reused
    assert client.visit(frontend, own.session).reused
    assert not client.visit(other, own.session).reused


def test_an_installation_of_stored_sessions_replaces_one_of_tickets(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    frontend = TicketFrontend(stack, store.target, keyring)
    tickets = frontend.shim
    session = client.visit(frontend).session
    frontend.shim = resumed.install(
        frontend.context,
        target=store.target,
        namespace="shop",
        keyring=keyring,
        deadline=PATIENCE,
        ignore_id_context=True,
        replace=True,
    )
    visit = client.visit(frontend, session)
    assert not visit.reused
    assert frontend.shim.flush(PATIENCE)
    assert client.visit(frontend, visit.session).reused
    assert sum(frontend.shim.stats.hits.values()) == 1
    frontend.shim.uninstall()
    assert client.visit(frontend, session).reused, "the replaced one goes on"
    tickets.uninstall()


def test_early_data_is_refused_with_tickets_too(store: RunningServer, keyring: resumed.Keyring) -> None:
    frontend = Frontend("ssl", None)
    from resumed._openssl.library import context_of

    library, pointer = context_of(frontend.context)[:2]
    import _ssl
    import ctypes

    ctypes.CDLL(_ssl.__file__)["SSL_CTX_set_max_early_data"](ctypes.c_void_p(pointer), 16_384)
    assert library.SSL_CTX_get_max_early_data(pointer)
    with pytest.raises(resumed.UnsupportedContext, match="early data"):
        resumed.install(frontend.context, target=store.target, namespace="shop", keyring=keyring, sessions="tickets")


def test_what_cannot_be_is_refused(store: RunningServer, keyring: resumed.Keyring) -> None:
    for wrong, text in (
        ({"sessions": "cookies"}, "'stored' or 'tickets'"),
        ({"sessions": "tickets", "rotation": 0}, "rotation must be 1 to 604800"),
        ({"sessions": "tickets", "revocation_grace": -1}, "revocation_grace must be 0"),
        ({"sessions": "tickets", "keyring": resumed.Keyring.plaintext()}, "need a keyring"),
    ):
        options: dict[str, Any] = {"target": store.target, "namespace": "shop", "keyring": keyring, **wrong}
        with pytest.raises(ValueError, match=text):
            resumed.install(Frontend("ssl", None).context, **options)


PROGRAM = """
import os, socket, ssl, sys, time
import resumed
pem, target, keyring, first, second = sys.argv[1:6]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(pem)
shim = resumed.install(context, target=target, namespace="shop", keyring=keyring, deadline=5.0, sessions="tickets")

def await_ready():
    end = time.monotonic() + 30
    while not (shim.removals_live and shim.ticket_secrets_held):
        assert time.monotonic() < end
        time.sleep(0.002)

def serve(number):
    peer = context.wrap_socket(socket.socket(fileno=int(number)), server_side=True)
    peer.sendall(peer.recv(100))
    peer.close()

await_ready()
if not os.fork():
    serve(first)
    await_ready()  # by a thread of its own
    print("child", shim.stats.tickets_issued.total(), flush=True)
    os._exit(0)
os.wait()
serve(second)
print("parent", shim.stats.tickets_resumed.total(), flush=True)
"""


def test_a_forked_child_shares_tickets_with_its_parent(
    store: RunningServer, keyring: resumed.Keyring, tmp_path: Path
) -> None:
    pem, keys = tmp_path / "server.pem", tmp_path / "fleet.keys"
    pem.write_bytes(CERTIFICATE.private_key_and_cert_chain_pem.bytes())
    keys.touch(0o600)
    keys.write_text(resumed.Keyring.generate())
    pairs = [socket.socketpair() for _ in range(2)]
    arguments = [str(pem), store.target, str(keys), *(str(theirs.fileno()) for _, theirs in pairs)]
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PROGRAM), *arguments],
        pass_fds=[theirs.fileno() for _, theirs in pairs],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        client, session, reused = Client(TLS13), None, []
        for ours, theirs in pairs:
            theirs.close()
            ours.settimeout(PATIENCE)
            tls = client.context.wrap_socket(ours, server_hostname="localhost", session=session)
            tls.sendall(b"hello")
            assert tls.recv(5) == b"hello"
            session = tls.session
            reused.append(tls.session_reused)
            tls.close()
        output, _ = process.communicate(timeout=PATIENCE)
    assert reused == [False, True]
    assert output.split() == ["child", "2", "parent", "1"]


def test_clients_with_certificates_of_the_authority_resume_by_ticket(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    CA.issue_cert("client.example").configure_cert(client.context)
    one, other = (TicketFrontend(stack, store.target, keyring) for _ in range(2))
    for frontend in (one, other):
        CA.configure_trust(frontend.context)
        if stack == "ssl":
            frontend.context.verify_mode = ssl.CERT_REQUIRED
        else:
            frontend.context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, lambda *args: bool(args[-1]))
    session = client.visit(one).session
    assert client.visit(other, session).reused
