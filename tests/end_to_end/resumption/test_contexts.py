"""A session resumes only where a full handshake would have proved the same: docs/contexts.md."""

from __future__ import annotations

import contextlib
import ctypes
import datetime as dt
import ssl
import time
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import trustme
from OpenSSL import SSL

from support.tls import CA, HOSTS, Client, Frontend, server_context
from support.waiting import until

if TYPE_CHECKING:
    from collections import Counter

    import resumed
    from support.server import RunningServer
    from support.tls import Stack, Visit

PUBLIC, PRIVATE = "public.example", "private.example"
ASKS = SSL.VERIFY_PEER
DEMANDS = SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT
OTHER_CA = trustme.CA()


class Fleet:
    """Frontends of one stack in one namespace; each respects its own session id context."""

    sharing: ClassVar[dict[str, Any]] = {}

    def __init__(self, stack: Stack, store: RunningServer, keyring: resumed.Keyring) -> None:
        self.stack, self._target, self._keyring = stack, store.target, keyring

    def frontend(self, authority: trustme.CA | None = None, mode: int = DEMANDS, **options: Any) -> Frontend:
        frontend = Frontend(
            self.stack, self._target, self._keyring, **{"ignore_id_context": False, **self.sharing, **options}
        )
        if self.sharing:
            until(lambda: frontend.shim.removals_live and frontend.shim.ticket_secrets_held)
        if authority is not None:
            verify(frontend.context, authority, mode)
        return frontend


def verify(context: Any, authority: trustme.CA, mode: int = DEMANDS) -> None:
    """Let a context ask for certificates of an authority."""
    authority.configure_trust(context)
    if isinstance(context, ssl.SSLContext):
        context.verify_mode = ssl.CERT_REQUIRED if mode == DEMANDS else ssl.CERT_OPTIONAL
    else:
        context.set_verify(mode, lambda *arguments: bool(arguments[-1]))
        context.set_session_id(b"application")  # without one OpenSSL caches no session of such a context


def choose(frontend: Frontend, decide: Any) -> None:
    """Set a servername callback: `decide` returns the context for a name, or None to keep the current one."""
    if frontend.stack == "ssl":

        def choose_context(connection: Any, name: str | None, _context: ssl.SSLContext) -> None:
            chosen = decide(name)
            if chosen is not None:
                connection.context = chosen

        frontend.context.sni_callback = choose_context
    else:

        def choose_context_too(connection: SSL.Connection) -> None:
            chosen = decide((connection.get_servername() or b"").decode() or None)
            if chosen is not None:
                connection.set_context(chosen)
                connection.set_verify(chosen.get_verify_mode(), lambda *arguments: bool(arguments[-1]))

        frontend.context.set_tlsext_servername_callback(choose_context_too)


def served(client: Client, frontend: Frontend, session: ssl.SSLSession | None, host: str = HOSTS[0]) -> Visit | None:
    """Return the bytes that a client reads, or None if the server rejects it, in TLS 1.3 after the handshake."""
    with contextlib.suppress(OSError, AssertionError):
        return client.visit(frontend, session, host)
    return None


def with_certificate(client: Client, authority: trustme.CA = CA) -> Client:
    """Return another client of the same version that shows a certificate."""
    certified = Client(client.version)
    authority.issue_cert("client.example").configure_cert(certified.context)
    return certified


def missed(frontend: Frontend) -> Counter[str]:
    """Return how many sessions or tickets did not resume, by reason."""
    stats: resumed.Stats = frontend.shim.stats
    return stats.misses + stats.tickets_refused


def shared(frontend: Frontend) -> int:
    """Return how many sessions were stored, or tickets issued."""
    assert frontend.shim.flush()
    stats: resumed.Stats = frontend.shim.stats
    return stats.puts["stored"] + stats.tickets_issued.total()


def advance(frontend: Frontend, seconds: float) -> None:
    """Set the frontend's clock forward."""
    policy = frontend.shim._policy
    for owner in filter(None, (policy, policy.tickets)):
        owner._clock = lambda: time.time() + seconds


@pytest.fixture(params=["stored", "tickets"], autouse=True)
def sharing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Share sessions in each of the two ways."""
    way: str = request.param
    if way == "tickets":
        monkeypatch.setattr(Fleet, "sharing", {"sessions": "tickets", "tickets_tls12": True})
    return way


@pytest.fixture
def fleet(stack: Stack, store: RunningServer, keyring: resumed.Keyring) -> Fleet:
    """A fleet of each stack."""
    return Fleet(stack, store, keyring)


# --- Client certificates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("single_use", [False, True], ids=["", "single use"])
def test_a_session_without_a_certificate_is_no_way_to_where_one_is_required(
    fleet: Fleet, client: Client, single_use: bool
) -> None:
    """Both frontends share a namespace, because an application may forget to separate them."""
    public, private = fleet.frontend(single_use=single_use), fleet.frontend(CA, single_use=single_use)
    session = client.visit(public).session
    assert served(client, private, session) is None
    assert missed(private) == {"context-mismatch": 1}
    assert not private.shim.stats.hits
    assert client.visit(public, session).reused


def test_a_session_with_a_certificate_is_none_where_no_one_asks(fleet: Fleet, client: Client) -> None:
    """The application must not see a certificate that was not verified in its context."""
    client = with_certificate(client)
    public, private = fleet.frontend(), fleet.frontend(CA)
    session = client.visit(private).session
    assert not client.visit(public, session).reused
    assert missed(public) == {"context-mismatch": 1}
    assert client.visit(private, session).reused


def test_a_certificate_of_one_authority_proves_nothing_to_another(fleet: Fleet, client: Client) -> None:
    """CVE-2025-23048: the trust stores are compared, not only the names that a context sends."""
    client = with_certificate(client)
    one, other, both = fleet.frontend(CA), fleet.frontend(OTHER_CA), fleet.frontend(CA)
    OTHER_CA.configure_trust(both.context)
    session = client.visit(one).session
    assert served(client, other, session) is None
    assert not client.visit(both, session).reused, "another trust store is another policy"
    assert client.visit(fleet.frontend(CA), session).reused


def test_asking_and_insisting_are_two_things(fleet: Fleet, client: Client) -> None:
    optional, required = fleet.frontend(CA, ASKS), fleet.frontend(CA)
    session = client.visit(optional).session
    assert client.visit(fleet.frontend(CA, ASKS), session).reused
    assert served(client, required, session) is None


def test_crl_checks_are_part_of_the_policy(fleet: Fleet, client: Client) -> None:
    client = with_certificate(client)
    one, other = fleet.frontend(CA), fleet.frontend(CA)
    if fleet.stack == "ssl":
        other.context.verify_flags |= ssl.VERIFY_X509_STRICT
    else:
        other.context.get_cert_store().set_flags(0x20)  # X509_V_FLAG_X509_STRICT
    session = client.visit(one).session
    client.visit(other, session)
    assert missed(other) == {"context-mismatch": 1}


def test_one_context_whose_second_port_asks_for_certificates(
    store: RunningServer, keyring: resumed.Keyring, client: Client
) -> None:
    """With pyOpenSSL the verify mode belongs to a connection, so the connection counts, not its context."""
    frontend = Fleet("pyopenssl", store, keyring).frontend()
    CA.configure_trust(frontend.context)
    frontend.context.set_session_id(b"application")
    session = client.visit(frontend).session
    connection = SSL.Connection

    class Demanding(SSL.Connection):
        def set_accept_state(self) -> None:
            super().set_accept_state()
            self.set_verify(DEMANDS, lambda *arguments: bool(arguments[-1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SSL, "Connection", Demanding)
        assert served(client, frontend, session) is None
    assert SSL.Connection is connection
    assert missed(frontend) == {"context-mismatch": 1}
    assert client.visit(frontend, session).reused


def test_a_session_with_a_certificate_shown_behind_the_handshake_is_none_elsewhere(
    store: RunningServer, keyring: resumed.Keyring
) -> None:
    """Post-handshake authentication (RFC 8446 section 4.6.2) issues sessions with the certificate in them."""
    client = with_certificate(Client(ssl.TLSVersion.TLSv1_3))
    client.context.post_handshake_auth = True
    fleet = Fleet("ssl", store, keyring)
    private, public = fleet.frontend(CA), fleet.frontend()
    private.context.post_handshake_auth = True
    before = client.visit(private).session

    class Demanding(ssl.SSLSocket):
        def recv(self, *arguments: Any) -> bytes:
            data = super().recv(*arguments)
            if data == b"demand":
                self.verify_client_post_handshake()
            return data

    private.context.sslsocket_class = Demanding
    with client.connect(private, before) as connection:
        connection.echo(b"demand")
        connection.echo(b"hello")
        assert connection.tls.session_reused
        after = connection.tls.session
    assert client.visit(private, after).reused
    for session in before, after:
        assert not client.visit(public, session).reused
    assert missed(public) == {"context-mismatch": 2}


def test_a_later_ticket_is_of_the_context_that_the_connection_has_by_then(
    store: RunningServer, keyring: resumed.Keyring
) -> None:
    import _ssl

    client, frontend = Client(ssl.TLSVersion.TLSv1_3), Fleet("ssl", store, keyring).frontend()
    binding, libssl, seen = frontend.shim._binding, ctypes.CDLL(_ssl.__file__), []

    def see(pointer: int, _argument: object) -> int:
        seen.append(pointer)
        return binding._tickets._on_generate(pointer, 0) if binding._tickets else 1

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(see)
    decrypt = binding._tickets._trampolines[2] if binding._tickets else None
    libssl["SSL_CTX_set_session_ticket_cb"](ctypes.c_void_p(binding._pointer), callback, decrypt, None)
    with client.connect(frontend) as connection:
        connection.echo(b"before")
        libssl["SSL_set_verify"](ctypes.c_void_p(seen[-1]), ASKS, None)
        libssl["SSL_new_session_ticket"](ctypes.c_void_p(seen[-1]))
        connection.echo(b"behind")
        session = connection.tls.session
    assert len(seen) == 3
    assert not client.visit(frontend, session).reused
    assert missed(frontend) == {"context-mismatch": 1}


def test_a_session_ends_with_the_certificate_of_its_client(fleet: Fleet, client: Client) -> None:
    soon = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=600)
    CA.issue_cert("client.example", not_after=soon).configure_cert(client.context)
    frontend = fleet.frontend(CA)
    session = client.visit(frontend).session
    session = client.visit(frontend, session).session
    assert frontend.shim.flush()
    advance(frontend, 590)
    assert client.visit(frontend, session).reused
    advance(frontend, 601)
    assert not client.visit(frontend, session).reused


# --- The server's identity ------------------------------------------------------------------------------------------


def test_a_session_of_one_certificate_is_no_way_to_another(fleet: Fleet, client: Client) -> None:
    """CVE-2014-3616: a resumed client sees no certificate, so it could not notice the wrong one."""
    client.context.check_hostname = False
    one, other = fleet.frontend(), fleet.frontend(certificate=CA.issue_cert("other.example"))
    session = client.visit(one).session
    assert not client.visit(other, session).reused
    assert missed(other) == {"context-mismatch": 1}


def test_a_renewed_certificate_keeps_the_sessions(fleet: Fleet, client: Client) -> None:
    one, other = fleet.frontend(), fleet.frontend(certificate=CA.issue_cert(*HOSTS[::-1]))
    assert client.visit(other, client.visit(one).session).reused


def test_a_certificate_with_another_kind_of_key_keeps_the_sessions(fleet: Fleet, client: Client) -> None:
    one, other = fleet.frontend(), fleet.frontend()
    CA.issue_cert(*HOSTS, key_type=trustme.KeyType.RSA).configure_cert(other.context)
    assert client.visit(other, client.visit(one).session).reused
    assert client.visit(one, client.visit(other).session).reused


# --- The application's session id context ---------------------------------------------------------------------------


def test_id_contexts_of_the_application_keep_sessions_apart(
    store: RunningServer, keyring: resumed.Keyring, client: Client
) -> None:
    for ignored in (False, True):
        one, other, alike = (
            Fleet("pyopenssl", store, keyring).frontend(
                ignore_id_context=ignored, namespace=f"ignored-{ignored}".lower()
            )
            for _ in range(3)
        )
        if not ignored:
            for frontend, name in ((one, b"one"), (other, b"other"), (alike, b"one")):
                frontend.context.set_session_id(name)
        session = client.visit(one).session
        assert client.visit(other, session).reused is ignored
        session = client.visit(one).session
        assert client.visit(alike, session).reused


def test_an_id_context_of_before_install_counts(store: RunningServer, keyring: resumed.Keyring, client: Client) -> None:
    import resumed

    contexts = [server_context("pyopenssl") for _ in range(2)]
    frontends = []
    for context, name in zip(contexts, (b"one", b"other"), strict=True):
        context.set_session_id(name)
        frontend = Frontend("pyopenssl", None)
        frontend.context = context
        frontend.shim = resumed.install(context, target=store.target, namespace="shop", keyring=keyring, deadline=10)
        frontends.append(frontend)
    session = client.visit(frontends[0]).session
    assert not client.visit(frontends[1], session).reused
    session = client.visit(frontends[0]).session
    assert client.visit(frontends[0], session).reused


def test_a_context_that_verifies_without_an_id_context_is_logged(
    store: RunningServer, keyring: resumed.Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenSSL then caches no session, without an error."""
    client = with_certificate(Client(ssl.TLSVersion.TLSv1_3))
    frontend = Fleet("pyopenssl", store, keyring).frontend(CA)
    frontend.context.set_session_id(b"")
    session = client.visit(frontend).session
    assert not client.visit(frontend, session).reused
    [line] = [record.message for record in caplog.records if "no session id context" in record.message]
    assert "set one (Context.set_session_id), or pass ignore_id_context=True" in line


# --- Virtual hosts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_session_offered_to_a_public_frontend_does_not_open_a_private_host(
    store: RunningServer, keyring: resumed.Keyring, client: Client, warm: bool
) -> None:
    """The public frontend serves unknown names by default; another frontend requires certificates for this one.

    With `ssl` a connection keeps its first verify_mode, so no host requires certificates by name there.
    """
    fleet = Fleet("pyopenssl", store, keyring)
    public, first, private = fleet.frontend(), fleet.frontend(), fleet.frontend(CA)
    first.context.set_session_id(b"application")
    choose(first, lambda name: private.context if name == PRIVATE else None)
    if warm:
        with_certificate(client).visit(first, host=PRIVATE)
    session = client.visit(public, host=PRIVATE).session
    assert served(client, first, session, PRIVATE) is None
    assert missed(first) == {"context-mismatch" if warm else "context-unknown": 1}
    assert client.visit(public, session, PRIVATE).reused


def test_each_name_costs_a_process_one_full_handshake(fleet: Fleet, client: Client) -> None:
    client.context.check_hostname = False
    fronts = []
    for _ in range(2):
        front, shop = fleet.frontend(), fleet.frontend(certificate=CA.issue_cert("shop.example"))
        choose(front, lambda name, shop=shop: shop.context if name == "shop.example" else None)
        fronts.append(front)
    one, other = fronts
    session = client.visit(one, host="shop.example").session
    assert not client.visit(other, session, "shop.example").reused
    assert missed(other) == {"context-unknown": 1}
    session = client.visit(one, host="shop.example").session
    for frontend in (other, one, other):
        visit = client.visit(frontend, session, "shop.example")
        assert visit.reused
        session = visit.session
    session = client.visit(one).session
    assert not client.visit(other, session).reused, "a name of its own"
    assert client.visit(other, client.visit(one).session).reused


@pytest.mark.parametrize("single_use", [False, True], ids=["", "single use"])
def test_a_context_chosen_by_other_means_than_the_name_ends_the_connection(
    fleet: Fleet, client: Client, caplog: pytest.LogCaptureFixture, single_use: bool
) -> None:
    front = fleet.frontend(single_use=single_use)
    private = fleet.frontend(certificate=CA.issue_cert("localhost", "other.example"))
    secretly: list[Any] = []
    choose(front, lambda _name: secretly[0] if secretly else None)
    client.visit(front)
    session = client.visit(front).session
    secretly.append(private.context)
    assert served(client, front, session) is None
    assert front.shim.stats.terminations == {"context-mismatch": 1}
    before = shared(front)
    session = client.visit(front).session
    assert not client.visit(front, session).reused
    assert missed(front)["context-unstable"] == 1
    assert front.shim.stats.terminations == {"context-mismatch": 1}
    assert len([each for each in caplog.records if "was ended" in each.message]) == 1
    assert shared(front) > before, "full handshakes go on, and are shared"


def test_honest_hosts_are_never_ended(fleet: Fleet, client: Client) -> None:
    certified = with_certificate(client)
    front, private = fleet.frontend(), fleet.frontend(CA)
    if fleet.stack == "pyopenssl":
        front.context.set_session_id(b"application")
    choose(front, lambda name: private.context if name == PRIVATE else None)
    sessions: dict[str, ssl.SSLSession | None] = {PUBLIC: None, PRIVATE: None}
    reused = []
    for _ in range(5):
        for host, visitor in ((PUBLIC, client), (PRIVATE, certified)):
            visit = visitor.visit(front, sessions[host], host)
            sessions[host] = visit.session
            reused.append(visit.reused)
    assert reused == [False] * 2 + [True] * 8
    assert not front.shim.stats.terminations


def test_a_host_in_a_namespace_of_its_own_resumes_nothing_of_the_first_host(fleet: Fleet, client: Client) -> None:
    """Only the namespace separates tenants here: both hosts have the same certificate and verify no clients."""
    front, tenant, other = fleet.frontend(), fleet.frontend(namespace="tenant"), fleet.frontend()
    choose(front, lambda name: tenant.context if name == PRIVATE else None)
    for warm in (False, True):
        if warm:
            client.visit(front, host=PRIVATE)
        session = client.visit(other, host=PRIVATE).session
        assert not client.visit(front, session, PRIVATE).reused
    assert missed(front) == {"context-unknown": 2}
    assert not front.shim.stats.terminations


def test_a_single_use_is_not_taken_for_another_id_context(
    store: RunningServer, keyring: resumed.Keyring, client: Client
) -> None:
    """OpenSSL compares id contexts after the lookup, so the frontend must do so before it."""
    one, other = (Fleet("pyopenssl", store, keyring).frontend(single_use=True) for _ in range(2))
    one.context.set_session_id(b"one")
    client.visit(other)
    session = client.visit(one).session
    assert not client.visit(other, session).reused
    assert missed(other) == {"context-mismatch": 1}
    assert client.visit(one, session).reused


# --- Data of the application in a session ----------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["stored"], indirect=True)
def test_ticket_data_of_the_application_are_left_alone(
    store: RunningServer, keyring: resumed.Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    """ProFTPD stores ticket data; its sessions are not shared. With tickets, the installation owns the callbacks."""
    frontend = Fleet("ssl", store, keyring).frontend()
    binding = frontend.shim._binding
    generate_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    data, seen = b"the application's own, 32 bytes.", []

    def generate(connection: int, _argument: object) -> int:
        session = binding.library.SSL_get_session(connection)
        held, length = ctypes.c_void_p(), ctypes.c_size_t()
        binding.library.SSL_SESSION_get0_ticket_appdata(session, ctypes.byref(held), ctypes.byref(length))
        seen.append(ctypes.string_at(held.value, length.value) if held.value else b"")
        binding.library.SSL_SESSION_set1_ticket_appdata(session, data, len(data))
        return 1

    import _ssl

    setter = ctypes.CDLL(_ssl.__file__)["SSL_CTX_set_session_ticket_cb"]
    setter.argtypes = [ctypes.c_void_p] * 4
    callback = generate_type(generate)
    setter(binding._pointer, ctypes.cast(callback, ctypes.c_void_p), None, None)
    client = Client(ssl.TLSVersion.TLSv1_3)
    session = client.visit(frontend).session
    assert not client.visit(frontend, session).reused
    assert set(seen) <= {b"", data}
    assert frontend.shim.flush()
    assert frontend.shim.stats.puts == {"unresumable": 4}
    assert len([each for each in caplog.records if "ticket application data" in each.message]) == 1


def test_uninstall_leaves_the_id_context_of_the_application(
    store: RunningServer, keyring: resumed.Keyring, client: Client
) -> None:
    """Without one, OpenSSL fails the handshakes of returning clients with certificates."""
    client = with_certificate(client)
    for ignored in (False, True):
        frontend = Fleet("pyopenssl", store, keyring).frontend(CA, ignore_id_context=ignored)
        frontend.shim.uninstall()
        session = client.visit(frontend).session
        assert client.visit(frontend, session).reused
