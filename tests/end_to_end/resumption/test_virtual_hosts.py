"""A session of one virtual host never resumes at another (CVE-2025-23048, CVE-2025-23419).

OpenSSL accepts a session before the servername callback chooses a context, so the callbacks of the first context run.
"""

from __future__ import annotations

import contextlib
import ssl
from typing import TYPE_CHECKING, Any

import pytest
from OpenSSL import SSL

from support.tls import CA, Client, Frontend

if TYPE_CHECKING:
    import resumed
    from support.server import RunningServer
    from support.tls import Stack

PUBLIC, PRIVATE = "public.example", "private.example"
MUTUAL = SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT


def virtual_hosts(
    stack: Stack, store: RunningServer, keyring: resumed.Keyring, namespaces: tuple[str, str]
) -> Frontend:
    """Return a frontend with two hosts, of which the private one wants client certificates."""
    public, private = (Frontend(stack, store.target, keyring, namespace=name) for name in namespaces)
    CA.configure_trust(private.context)
    if stack == "ssl":
        private.context.verify_mode = ssl.CERT_REQUIRED

        def choose(connection: Any, name: str | None, _context: ssl.SSLContext) -> None:
            if name == PRIVATE:
                connection.context = private.context

        public.context.sni_callback = choose
    else:
        private.context.set_verify(MUTUAL, lambda *arguments: bool(arguments[-1]))

        def choose_too(connection: SSL.Connection) -> None:
            if connection.get_servername() == PRIVATE.encode():
                connection.set_context(private.context)
                connection.set_verify(MUTUAL, lambda *arguments: bool(arguments[-1]))

        public.context.set_tlsext_servername_callback(choose_too)
    return public


@pytest.fixture(params=[("public", "private"), ("shop", "shop")], ids=["two namespaces", "one namespace"])
def frontend(request: pytest.FixtureRequest, stack: Stack, store: RunningServer, keyring: resumed.Keyring) -> Frontend:
    return virtual_hosts(stack, store, keyring, request.param)


def test_a_session_of_a_public_host_is_no_way_into_a_private_one(frontend: Frontend, client: Client) -> None:
    """The private host rejects clients without a certificate, with and without the other host's session.

    This holds for pyOpenSSL. In `ssl` a connection keeps the verify_mode of its first context.
    """
    session = client.visit(frontend, host=PUBLIC).session
    assert client.visit(frontend, session, PUBLIC).reused
    session = client.visit(frontend, host=PUBLIC).session
    for offered in (session, None):
        visit = None
        with contextlib.suppress(OSError, AssertionError):  # an alert, or in TLS 1.3 the end behind the handshake
            visit = client.visit(frontend, offered, PRIVATE)
        assert visit is None if frontend.stack == "pyopenssl" else visit is not None and not visit.reused
    assert frontend.shim.stats.misses["context-unknown"] == 1


def test_a_session_of_a_private_host_resumes_there_and_nowhere_else(frontend: Frontend, client: Client) -> None:
    CA.issue_cert("client.example").configure_cert(client.context)
    session = client.visit(frontend, host=PRIVATE).session
    # OpenSSL looks sessions up in the namespace of the context that the connection began with.
    assert client.visit(frontend, session, PRIVATE).reused is (frontend.shim.namespace == "shop")
    session = client.visit(frontend, host=PRIVATE).session
    assert not client.visit(frontend, session, PUBLIC).reused


def test_names_are_compared_as_dns_compares_them(
    stack: Stack, store: RunningServer, keyring: resumed.Keyring, client: Client
) -> None:
    frontend = Frontend(stack, store.target, keyring)
    session = client.visit(frontend, host=PUBLIC.upper()).session
    assert client.visit(frontend, session, PUBLIC).reused


def test_clients_that_ask_for_no_name_resume(
    stack: Stack, store: RunningServer, keyring: resumed.Keyring, client: Client
) -> None:
    client.context.check_hostname = False
    frontend = Frontend(stack, store.target, keyring)
    session = client.visit(frontend, host="").session
    assert client.visit(frontend, session, "").reused
    session = client.visit(frontend, host="").session
    assert not client.visit(frontend, session, PUBLIC).reused
