"""Checks of a running frontend for `resumed doctor`: its sessions, its clock, resumption, and removal.

With the keyring a session id or a ticket of the fleet can be recognised, and shows the time of its issue.
"""

from __future__ import annotations

import ssl
import time
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

from cryptography import x509

import resumed
from resumed_server.cli.diagnose.checks import CheckWarning
from resumed_server.cli.diagnose.frontend_client import SslClient, Tls13Client, Unavailable
from resumed_server.cli.diagnose.issued_session import STORED_SECONDS, SessionReader, explain_difference
from resumed_server.cli.diagnose.validity import validity
from resumed_server.cli.diagnosis import Failure
from resumed_server.cli.options import parse_option
from resumed_server.config.types import Address
from resumed_server.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed_server.cli.diagnose.check import RoundTrip
    from resumed_server.cli.diagnose.frontend_client import Connection, FrontendClient
    from resumed_server.cli.diagnose.issued_session import IssuedSession

OFF_SECONDS = 5.0
"""A clock that differs by more seconds causes a warning."""
REMOVAL_SECONDS = 6.0
"""Seconds in which a removal must take effect: a mirror may be 4 s behind."""
_PAUSE = 0.05
ORDERS = {
    "OpenSSL": "TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256",
    "browsers and Go": "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256",
}
"""Orders in which clients offer the ciphers of TLS 1.3. A session resumes only with the hash of its first handshake,
and some servers choose the cipher by the client's order, others by their own."""


class _Offer(NamedTuple):
    """A session of a frontend that has not been offered yet: with single use it resumes once."""

    frontend: str
    connection: Connection
    issued: IssuedSession


class FrontendChecks:
    """Connects to frontends in turn, and offers each of them sessions of the previous one.

    Args:
        namespace: The namespace of the frontends.
        round_trip: The checks of the store, with the keyring and the store of the frontends.
        server_name: The server name that the fleet's clients send; None for the host of the first frontend.
    """

    def __init__(self, namespace: str, round_trip: RoundTrip, server_name: str | None = None) -> None:
        self.round_trip = round_trip
        self.reader = SessionReader(round_trip.store, round_trip.keyring, namespace)
        self.offers: dict[FrontendClient, _Offer] = {}
        self._server_name = server_name

    def checks_of(self, frontend: str) -> dict[str, Callable[[], str]]:
        """Return the checks of a frontend.

        Raises:
            UserError: `frontend` is not host:port.
        """
        address = parse_option("--frontend", frontend, Address.parse)
        if address.path:
            raise UserError(f"--frontend: {frontend} is a socket; give host:port")
        # A session resumes for the same server name only, so all frontends are visited with that of the first.
        self._server_name = self._server_name or address.host
        return _Frontend(self, frontend, address).checks()

    @cached_property
    def tls12(self) -> SslClient:
        """The client for TLS 1.2."""
        return SslClient(self._server_name or "")

    @cached_property
    def tls13(self) -> list[FrontendClient]:
        """The clients for TLS 1.3, one for each order of ciphers."""
        return [Tls13Client(self._server_name or "", *order) for order in ORDERS.items()]

    def certificate13(self, address: Address) -> bytes:
        """Connect with TLS 1.3, and return the frontend's certificate; raises Unavailable."""
        client = SslClient(self._server_name or "", ssl.TLSVersion.TLSv1_3)
        client.connect(address)
        return client.certificate


class _Frontend:
    """The checks of one frontend, each of which raises Failure or Unavailable."""

    def __init__(self, fleet: FrontendChecks, name: str, address: Address) -> None:
        self._fleet, self._name, self._address = fleet, name, address
        self._certificate = b""
        self._clients: list[FrontendClient] = []
        """The client of the detailed checks: that of TLS 1.2 where the frontend accepts it."""
        self._shown = b""
        self._issued: IssuedSession | None = None

    def checks(self) -> dict[str, Callable[[], str]]:
        """Return the checks in their order."""
        return {
            name: partial(_note_unavailable, check)
            for name, check in {
                "handshake": self._shake_hands,
                "certificate": self._check_certificate,
                "session": self._check_session,
                "stored": self._check_stored,
                "clock": self._check_clock,
                "resumption": lambda: self._check_resumption(self._clients),
                "another frontend's session": lambda: self._check_sharing(self._clients),
                "removal": lambda: self._check_removal(self._clients),
                "TLS 1.3": lambda: self._check_resumption(self._fleet.tls13),
                "another's TLS 1.3 sessions": lambda: self._check_sharing(self._fleet.tls13),
                "removal in TLS 1.3": lambda: self._check_removal(self._fleet.tls13[:1]),
            }.items()
        }

    def _shake_hands(self) -> str:
        try:
            version = self._fleet.tls12.connect(self._address).version
            self._certificate, self._clients = self._fleet.tls12.certificate, [self._fleet.tls12]
        except Unavailable as reason:
            try:
                self._certificate, self._clients = self._fleet.certificate13(self._address), self._fleet.tls13[:1]
            except Unavailable:
                raise Failure(f"no handshake ({reason})", "is it a TLS server?") from None
            return "TLS 1.3 only"
        return version

    def _check_certificate(self) -> str:
        return validity(x509.load_der_x509_certificate(self._certificate))

    def _check_session(self) -> str:
        self._shown = self._clients[0].connect(self._address).shown
        return self._fleet.reader.recognise(self._shown, self._fleet.round_trip.namespaces)

    def _check_stored(self) -> str:
        self._issued = self._fleet.reader.read(self._shown)
        kept = "the secret of its tickets, for" if self._issued.is_ticket else "for"
        return f"{kept} {self._issued.seconds:.0f} s"

    def _check_clock(self) -> str:
        issued = self._issued and self._issued.issued
        return "not tried: its tickets contain no time" if issued is None else compare_clocks(issued, time.time())

    def _check_resumption(self, clients: list[FrontendClient]) -> str:
        ciphers = []
        for client in clients:
            offer = self._issue(client)
            if not self._does_resume(client, offer.connection):
                raise Failure(f"it does not resume its own session{_describe(client)}", _advise(offer.issued))
            ciphers.append(f"{offer.connection.cipher}{client.label and ' for '}{client.label}")
        return f"its own session resumes: {', '.join(ciphers)}"

    def _check_sharing(self, clients: list[FrontendClient]) -> str:
        theirs = {client: self._fleet.offers.get(client) for client in clients}
        self._fleet.offers |= {client: self._issue(client) for client in clients}
        note = "no session to offer: give another --frontend before it"
        for client, offer in theirs.items():
            if offer is None:
                return note
            note = self._check_offer(client, offer, self._fleet.offers[client])
        return note

    def _check_offer(self, client: FrontendClient, theirs: _Offer, ours: _Offer) -> str:
        ours_cipher, theirs_cipher = ours.connection.cipher, theirs.connection.cipher
        if client.label and ours_cipher.rpartition("_")[2] != theirs_cipher.rpartition("_")[2]:
            raise Failure(
                f"for {client.label} it chooses {ours_cipher}, and {theirs.frontend} chooses {theirs_cipher}: their "
                "sessions of TLS 1.3 cannot be shared, since the hashes differ",
                "make all frontends of the namespace choose alike: all by the server's order (the default of ssl; "
                "ssl_prefer_server_ciphers on; SSL_OP_CIPHER_SERVER_PREFERENCE), or all by the client's",
            )
        difference = explain_difference(ours.issued, theirs.issued, theirs.frontend)
        if not self._does_resume(client, theirs.connection):
            cause, remedy = difference or ("", _advise(theirs.issued))
            raise Failure(
                f"it does not resume a session of {theirs.frontend}{_describe(client)}{cause and ': '}{cause}", remedy
            )
        if difference and ours.issued.is_ticket != theirs.issued.is_ticket:
            raise CheckWarning(*difference)
        return f"a session of {theirs.frontend} resumes"

    def _check_removal(self, clients: list[FrontendClient]) -> str:
        for client in clients:
            offer = self._issue(client)
            if offer.issued.removal is None:
                return "not tried: it has ticket keys only, and obeys no removals"
            (result,) = self._fleet.round_trip.store.batch([offer.issued.removal])
            if isinstance(result, resumed.StoreError):
                raise result
            started = time.monotonic()
            while client.connect(self._address, offer.connection.session).resumed:
                if time.monotonic() > started + REMOVAL_SECONDS:
                    raise Failure(
                        f"it resumes a session {REMOVAL_SECONDS:.0f} s after its removal{_describe(client)}",
                        "see its log and removals_live (installation.stats): its stream from the store is interrupted, "
                        "or without a grant for watch; or it uses another store",
                    )
                time.sleep(_PAUSE)
        return "a session that was removed does not resume"

    def _issue(self, client: FrontendClient) -> _Offer:
        """Return a new session of the frontend."""
        connection = client.connect(self._address)
        self._fleet.reader.recognise(connection.shown, self._fleet.round_trip.namespaces)
        return _Offer(self._name, connection, self._fleet.reader.read(connection.shown))

    def _does_resume(self, client: FrontendClient, connection: Connection) -> bool:
        """Return whether a session resumes; a removal or a secret may still be on its way to the frontend."""
        end = time.monotonic() + STORED_SECONDS
        while True:
            try:
                if client.connect(self._address, connection.session).resumed:
                    return True
            except Unavailable:
                return False
            if time.monotonic() > end:
                return False
            time.sleep(_PAUSE)


def compare_clocks(theirs: float, ours: float) -> str:
    """Describe the difference of two clocks, in Unix seconds.

    Raises:
        CheckWarning: They differ by more than OFF_SECONDS.
    """
    off = theirs - ours
    if -1 < off < 1:
        return "the same as this machine's"
    text = f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} this machine's"
    if abs(off) > OFF_SECONDS:
        raise CheckWarning(text, "synchronise both clocks (NTP): the lifetime of sessions is wrong by the difference")
    return text


def _note_unavailable(check: Callable[[], str]) -> str:
    try:
        return check()
    except Unavailable as reason:
        return f"not tried: {reason}"


def _describe(client: FrontendClient) -> str:
    return f", with a client's ciphers in the order of {client.label}" if client.label else ""


def _advise(session: IssuedSession) -> str:
    if session.is_ticket:
        return (
            "see its tickets_refused by reason (installation.stats): removals-unknown if its stream of removals is "
            "interrupted, unknown-secret if it uses another store, context-mismatch if TLS settings differ"
        )
    return (
        "see its misses by reason (installation.stats), above all timeout, unavailable, breaker-open, context-mismatch "
        "and server-name-mismatch"
    )
