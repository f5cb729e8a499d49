"""Checks of a running frontend for `resumed doctor`: its session ids, its clock, and resumption.

With the keyring, a session id of the fleet can be recognised, and shows the time of its issue.
"""

from __future__ import annotations

import socket
import ssl
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from cryptography import x509

import resumed
from resumed_server.cli.diagnose.checks import CheckWarning
from resumed_server.cli.diagnose.validity import validity
from resumed_server.cli.diagnosis import Failure
from resumed_server.config.types import Address
from resumed_server.errors import ExitStatus, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed_server.cli.diagnose.check import RoundTrip
    from resumed_server.cli.tls_client import Client, Handshake

PATIENCE = 5.0
"""Time limit of a handshake with a frontend, in seconds."""
OFF_SECONDS = 5.0
"""A clock that differs by more seconds causes a warning."""
_STORED_SECONDS = 2.0
_PAUSE = 0.05
ORDERS = {
    "OpenSSL": "TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256",
    "browsers and Go": "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256",
}
"""Orders in which clients offer the ciphers of TLS 1.3. A session resumes only with the hash of its first handshake,
and some servers choose the cipher by the client's order, others by their own."""


class _Connection(NamedTuple):
    session: ssl.SSLSession | None
    reused: bool
    certificate: bytes
    version: str


class FrontendChecks:
    """Connects to frontends in turn, and offers each of them the session of the previous one.

    Args:
        namespace: The namespace of the frontends.
        round_trip: The checks of the store, with the keyring and the store of the frontends.
    """

    def __init__(self, namespace: str, round_trip: RoundTrip) -> None:
        self._namespace, self._round_trip = namespace, round_trip
        self._before: tuple[str, ssl.SSLSession] | None = None
        self._before13: tuple[str, dict[str, Handshake]] | None = None
        self._clients: dict[str, Client] = {}
        # Only sessions are checked here; an untrusted certificate does not prevent resumption.
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname, self._context.verify_mode = False, ssl.CERT_NONE
        # A client sees the session id in TLS 1.2 only.
        self._context.maximum_version = ssl.TLSVersion.TLSv1_2

    def checks_of(self, frontend: str) -> dict[str, Callable[[], str]]:
        """Return the checks of a frontend.

        Raises:
            UserError: `frontend` is not host:port.
        """
        try:
            address = Address.parse(frontend)
        except ValueError as error:
            raise UserError(f"--frontend: {error}") from None
        if address.path:
            raise UserError(f"--frontend: {frontend} is a socket; give host:port")
        visits: list[_Connection] = []
        visits13: dict[str, Handshake] = {}
        return {
            "handshake": partial(self._shake_hands, address, visits),
            "certificate": partial(self._check_certificate, visits),
            "ids": partial(self._check_ids, visits),
            "clock": partial(self._check_clock, visits),
            "stored": partial(self._check_stored, visits),
            "resumption": partial(self._check_resumption, address, visits),
            "another frontend's session": partial(self._check_sharing, frontend, address, visits),
            "TLS 1.3": partial(self._check_resumption13, address, visits13),
            "another's TLS 1.3 sessions": partial(self._check_sharing13, frontend, address, visits13),
        }

    def _shake_hands(self, address: Address, visits: list[_Connection]) -> str:
        visits.append(self._visit(address))
        return visits[0].version

    def _check_certificate(self, visits: list[_Connection]) -> str:
        return validity(x509.load_der_x509_certificate(visits[0].certificate))

    def _check_ids(self, visits: list[_Connection]) -> str:
        if not self._session_id(visits):
            raise Failure(
                "it issues stateless tickets or no session at all: install() was not called on its context",
                "call resumed.install() on the context that serves this name, before the first connection",
            )
        if self._issue_time(visits) is None:
            raise Failure(
                "its session ids are of another keyring or namespace",
                "compare `resumed keyring show` and the namespace there and here; or its context lacks install()",
            )
        return "of this keyring and namespace"

    def _check_clock(self, visits: list[_Connection]) -> str:
        off = (self._issue_time(visits) or 0) - time.time()
        if -1 < off < 1:  # ids have whole seconds
            return "the same as this machine's"
        text = f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} this machine's"
        if abs(off) > OFF_SECONDS:
            raise CheckWarning(
                text,
                "synchronise both clocks (NTP): the lifetime of sessions is wrong by the difference",
            )
        return text

    def _check_stored(self, visits: list[_Connection]) -> str:
        key = resumed.StoreKeys(self._namespace).key(self._session_id(visits))
        end = time.monotonic() + _STORED_SECONDS
        while (found := self._round_trip.store.get(key)) is None:
            if time.monotonic() > end:
                raise Failure(
                    "its sessions do not arrive in this store",
                    "see its log and its puts by outcome: another target, a grant without put, or a network problem",
                )
            time.sleep(_PAUSE)
        try:
            self._round_trip.keyring.open(key, found.value, time.time())
        except resumed.UnsealError as error:
            raise Failure(f"its stored session cannot be opened ({error.reason})", "compare the keyrings") from None
        return f"{found.ttl:.0f} s left"

    def _check_resumption(self, address: Address, visits: list[_Connection]) -> str:
        if not self._visit(address, visits[0].session).reused:
            raise Failure(
                "it does not resume its own session",
                "see its misses by reason (installation.stats), above all timeout, unavailable, breaker-open and "
                "server-name-mismatch",
            )
        return "its own session resumes"

    def _check_sharing(self, frontend: str, address: Address, visits: list[_Connection]) -> str:
        before, self._before = self._before, (frontend, visits[0].session) if visits[0].session else None
        if before is None:
            return "no session to offer: give another --frontend before it"
        other, session = before
        if not self._visit(address, session).reused:
            raise Failure(
                f"it does not resume a session of {other}",
                "compare their TLS settings, and whether they request client certificates",
            )
        return f"a session of {other} resumes"

    def _check_resumption13(self, address: Address, visits: dict[str, Handshake]) -> str:
        for order in ORDERS:
            visit = self._visit13(address, order)
            if isinstance(visit, str):
                return visit
            visits[order] = visit
            if not self._does_resume13(address, order, visit):
                raise Failure(
                    f"it does not resume its own TLS 1.3 session, with a client's ciphers in the order of {order}",
                    "see its misses by reason (installation.stats), and that its context issues tickets (num_tickets)",
                )
        return "resumes: " + ", ".join(f"{visit.cipher} for {order}" for order, visit in visits.items())

    def _check_sharing13(self, frontend: str, address: Address, visits: dict[str, Handshake]) -> str:
        before, self._before13 = self._before13, (frontend, visits) if visits else self._before13
        if before is None or not visits:
            return "no session to offer"
        other, sessions = before
        for order, theirs in sessions.items():
            ours = visits[order]
            if ours.cipher.rpartition("_")[2] != theirs.cipher.rpartition("_")[2]:
                raise Failure(
                    f"for {order} it chooses {ours.cipher}, and {other} chooses {theirs.cipher}: their sessions of "
                    "TLS 1.3 cannot be shared, since the hashes differ",
                    "make all frontends of the namespace choose alike: all by the server's order (the default of ssl; "
                    "ssl_prefer_server_ciphers on; SSL_OP_CIPHER_SERVER_PREFERENCE), or all by the client's",
                )
            if not self._does_resume13(address, order, theirs):
                raise Failure(
                    f"it does not resume a TLS 1.3 session of {other}, with a client's ciphers in the order of {order}",
                    "compare their TLS settings, and whether they request client certificates",
                )
        return f"the sessions of {other} resume, in either order of ciphers"

    def _does_resume13(self, address: Address, order: str, visit: Handshake) -> bool:
        """Return whether a session resumes; it may still be on its way into the store."""
        end = time.monotonic() + _STORED_SECONDS
        while True:
            again = self._visit13(address, order, visit.session)
            if isinstance(again, str) or again.resumed or time.monotonic() > end:
                return not isinstance(again, str) and again.resumed
            time.sleep(_PAUSE)

    def _visit13(self, address: Address, order: str, session: Any = None) -> Handshake | str:
        """Connect with TLS 1.3 and an order of ciphers; return the reason instead if that is impossible."""
        try:
            from resumed_server.cli import tls_client as visits  # noqa: PLC0415 - an extra
        except ImportError:
            return "not tried: pyOpenSSL is not installed"
        try:
            # One client for all frontends, with the server name of the first: otherwise no session could be shared.
            client = self._clients.get(order)
            if client is None:
                client = self._clients[order] = visits.Client(address.host, "1.3", ciphersuites=ORDERS[order])
            return client.visit(visits.Endpoint.resolve(address.host, address.port), session)
        except AttributeError:
            return "not tried: this pyOpenSSL cannot set an order of ciphers (25.2 can)"
        except (visits.HandshakeFailed, OSError) as error:
            return f"not available ({error})"

    def _visit(self, address: Address, session: ssl.SSLSession | None = None) -> _Connection:
        try:
            with (
                socket.create_connection((address.host, address.port), PATIENCE) as connection,
                self._context.wrap_socket(connection, server_hostname=address.host, session=session) as tls,
            ):
                certificate = tls.getpeercert(binary_form=True) or b""
                return _Connection(tls.session, bool(tls.session_reused), certificate, tls.version() or "")
        except ssl.SSLError as error:
            raise Failure(
                f"no handshake ({(error.reason or 'failed').lower().replace('_', ' ')})",
                "is it a TLS server, and does it speak TLS 1.2?",
            ) from None
        except OSError as error:
            raise Failure(
                f"it cannot be reached ({error.strerror or error})", "check address and firewall", ExitStatus.RETRY
            ) from None

    def _session_id(self, visits: list[_Connection]) -> bytes:
        session = visits[0].session
        return session.id if session and not session.has_ticket else b""

    def _issue_time(self, visits: list[_Connection]) -> int | None:
        return self._round_trip.keyring.open_id(self._namespace, self._session_id(visits))
