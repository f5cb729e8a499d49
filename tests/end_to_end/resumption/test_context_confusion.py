"""A valid session gives no access to another protocol version, another session id context or another client policy.

The server is honest here; clients claim another state or connect to another place. test_virtual_hosts.py covers virtual
hosts with and without client certificates.
"""

from __future__ import annotations

import contextlib
import hashlib
import ssl
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from OpenSSL import SSL

from support.session import forge, known
from support.tls import VERSIONS, Client, Frontend

if TYPE_CHECKING:
    import resumed
    from resumed._crypto.envelope import Envelope
    from support.server import RunningServer
    from support.tls import Stack, Visit

MUTUAL = SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT
SHA384 = {ssl.TLSVersion.TLSv1_2: "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384"}


# --- Another protocol -----------------------------------------------------------------------------------------------


def test_a_session_cannot_be_claimed_for_another_version_of_tls(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    """The client has the secret and uses it as the key of a TLS 1.3 ticket or as a TLS 1.2 master secret.

    Both are 48 bytes here and belong to SHA-384, so only the version differs.
    """
    frontend = Frontend(stack, store.target, keyring, deadline=5.0)
    (other,) = (Client(version) for version in VERSIONS if version != client.version)
    for each in (client, other):
        if ciphers := SHA384.get(each.version):
            each.context.set_ciphers(ciphers)
    ours, theirs = (client.visit(frontend).session for client in (client, other))
    assert ours
    assert theirs
    (had, secret, _), (offered, replaced, serialized) = known(ours), known(theirs)
    assert (len(had), len(secret)) == (len(offered), len(replaced)) == (32, 48)
    claimed = forge(theirs, serialized.replace(offered, had).replace(replaced, secret))
    assert known(claimed)[:2] == (had, secret)
    found = sum(frontend.shim.stats.hits.values())
    assert not other.visit(frontend, claimed).reused
    assert sum(frontend.shim.stats.hits.values()) == found + 1, "the store has it, it opens, and OpenSSL refuses it"
    assert client.visit(frontend, ours).reused, "where it belongs it resumes"


# --- Another session id context -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [False, True], ids=["", "with client certificates"])
def test_a_session_of_another_id_context_makes_a_full_handshake(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client, verify: bool
) -> None:
    frontend = Frontend(stack, store.target, keyring, deadline=5.0)
    if verify:
        demand(frontend, CLIENTS)
        CLIENTS.issue_cert("client.example").configure_cert(client.context)
    session = client.visit(frontend).session
    assert client.visit(frontend, session).reused
    shim = frontend.shim._policy
    negotiated, shop, bank = shim.on_new_session, *(hashlib.sha256(name).digest() for name in (b"shop", b"bank"))

    def confused(session_id: bytes, envelope: Envelope, remaining: float, *, last: bool) -> None:
        assert shop in envelope.session
        envelope = envelope._replace(session=envelope.session.replace(shop, bank))
        negotiated(session_id, envelope, remaining, last=last)

    shim.on_new_session = confused
    session = client.visit(frontend).session
    assert not client.visit(frontend, session).reused


# --- Past other client certificates ---------------------------------------------------------------------------------

CLIENTS, OTHERS = trustme.CA(), trustme.CA()


def demand(frontend: Frontend, authority: trustme.CA) -> None:
    """Let a frontend serve only clients with a certificate of `authority`."""
    authority.configure_trust(frontend.context)
    if frontend.stack == "ssl":
        frontend.context.verify_mode = ssl.CERT_REQUIRED
    else:
        frontend.context.set_verify(MUTUAL, lambda *arguments: bool(arguments[-1]))


def served(client: Client, frontend: Frontend, session: ssl.SSLSession | None, host: str) -> Visit | None:
    """Return the bytes that a client reads; TLS 1.3 reports a rejected certificate only after the handshake."""
    with contextlib.suppress(OSError, AssertionError):
        return client.visit(frontend, session, host)
    return None


@pytest.mark.parametrize("namespaces", [("one", "other"), ("shop", "shop")], ids=["two namespaces", "one namespace"])
def test_a_session_is_no_way_to_a_host_that_trusts_other_clients(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client, namespaces: tuple[str, str]
) -> None:
    """CVE-2025-23048: each of two hosts on one port trusts the clients of its own authority."""
    one, other = (Frontend(stack, store.target, keyring, namespace=name, deadline=5.0) for name in namespaces)
    demand(one, CLIENTS)
    demand(other, OTHERS)

    def choose(connection: Any, *named: Any) -> None:
        name = named[0] if named else (connection.get_servername() or b"").decode()
        if name == "private.example":
            if stack == "ssl":
                connection.context = other.context
            else:
                connection.set_context(other.context)

    if stack == "ssl":
        one.context.sni_callback = choose
    else:
        one.context.set_tlsext_servername_callback(choose)
    CLIENTS.issue_cert("client.example").configure_cert(client.context)
    session = client.visit(one, host="public.example").session
    assert client.visit(one, session, "public.example").reused
    session = client.visit(one, host="public.example").session
    assert served(client, one, session, "private.example") is None
    assert served(client, one, None, "private.example") is None, "as without it"
    assert one.shim.stats.misses["context-unknown"] == 1


def test_a_session_is_no_way_to_a_frontend_that_trusts_other_clients(
    store: RunningServer, keyring: resumed.Keyring, stack: Stack, client: Client
) -> None:
    one, other = (Frontend(stack, store.target, keyring, namespace=name, deadline=5.0) for name in ("one", "other"))
    demand(one, CLIENTS)
    demand(other, OTHERS)
    CLIENTS.issue_cert("client.example").configure_cert(client.context)
    session = client.visit(one).session
    assert served(client, other, session, "localhost") is None
    assert other.shim.stats.misses["foreign-id"] == 1
    assert client.visit(one, session).reused
