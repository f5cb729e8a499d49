"""Sessions as frontends issue them, stored ones and tickets of the fleet, read with the fleet's keyring."""

from __future__ import annotations

import hashlib
import hmac
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC

import resumed
from resumed._client.store import Remove
from resumed._crypto.derivation import derive
from resumed._crypto.envelope import Envelope
from resumed._crypto.sealed_value import unseal
from resumed._crypto.session_id import ID_BYTES
from resumed._crypto.store_key import StoreKeys
from resumed._crypto.ticket_secret import MAX_ROTATION, NAME_BYTES, Epoch, TicketSecret, address_of, epoch_of_name
from resumed._crypto.ticket_state import TicketState
from resumed_server.cli.diagnosis import Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from resumed._crypto.fleet_key import FleetKey

STORED_SECONDS = 2.0
"""Seconds that a frontend may take to store a session."""
_PAUSE = 0.05
_FORMATS = ("openssl", "go", "rustls")
_HALF = 16
_MARK, _STATE_BYTES = b"resumed\x03", 88
_HEAD_BYTES, _MAC_BYTES = 32, 32
_COMPARE_KEYRINGS = "compare `resumed keyring show` there and here"
_COMPARE = "compare `resumed keyring show` and the namespace there and here"
_INSTALL = "call resumed.install() on the context that serves this name, before the first connection"


class IssuedSession(NamedTuple):
    """A session that a frontend of the fleet issued."""

    is_ticket: bool
    """Whether the client keeps it, in a ticket; otherwise the store keeps it."""
    serialization: str
    """The format of its TLS session: `openssl`, `go`, `rustls` or `go or rustls`; `` if the ticket shows none."""
    seconds: float
    """Seconds for which the store keeps the session, or the secret of the ticket."""
    issued: float | None = None
    """When the full handshake was, in Unix seconds; None if the ticket does not contain it."""
    fingerprint: bytes = b""
    """The fingerprint of the context that negotiated it; empty if the ticket does not contain it."""
    removal: Remove | None = None
    """The operation that ends it in the whole fleet; None if its frontend obeys no removals."""


class _Found(NamedTuple):
    serialization: str
    key: bytes
    stored: resumed.StoredSession


class SessionReader:
    """Reads the sessions of a namespace.

    Args:
        store: The store of the frontends.
        keyring: Their keyring.
        namespace: Their namespace.
    """

    def __init__(self, store: resumed.StoreClient, keyring: resumed.Keyring, namespace: str) -> None:
        self._store, self._keyring, self._namespace = store, keyring, namespace

    def recognise(self, shown: bytes, namespaces: Callable[[], Iterable[str]]) -> str:
        """Describe a session of the fleet.

        Args:
            shown: Its ticket, or its id if it has none.
            namespaces: Returns other namespaces, of which a foreign session may be.

        Raises:
            Failure: It is not one of this keyring and namespace.
        """
        if self._keyring.open_id(self._namespace, shown) is not None:
            return "stored sessions of this keyring and namespace"
        if self._epoch(shown, self._namespace):
            return "tickets of this keyring and namespace"
        found = self._await_stored(shown)
        if found:
            self._open(shown, found)
            return "stored sessions of this namespace, whose ids its stack chooses"
        for namespace in namespaces():
            if self._keyring.open_id(namespace, shown) is not None or self._epoch(shown, namespace):
                raise Failure(
                    f"its sessions are of the namespace {namespace}, not {self._namespace}",
                    "correct the namespace there, or --namespace here",
                )
        raise _explain_foreign(shown)

    def read(self, shown: bytes) -> IssuedSession:
        """Read a session that recognise() accepts; wait for a stored one if it has not arrived yet.

        Raises:
            Failure: The store does not have it or its secret, or that cannot be opened.
        """
        named = self._epoch(shown, self._namespace)
        if named:
            return self._read_ticket(shown, *named)
        found = self._await_stored(shown)
        if not found:
            raise Failure(
                "its sessions do not arrive in this store",
                "see its log and its puts by outcome: another target, a grant without put, or a network problem",
            )
        return self._open(shown, found)

    def _open(self, session_id: bytes, found: _Found) -> IssuedSession:
        # The time of its issue, so that a clock that is off does not appear as another fault.
        now = self._keyring.open_id(self._namespace, session_id)
        try:
            plaintext, _ = self._keyring.open(found.key, found.stored.value, time.time() if now is None else now)
            envelope = Envelope.decode(plaintext)
        except resumed.UnsealError as error:
            raise Failure(f"its stored session cannot be opened ({error.reason})", _COMPARE_KEYRINGS) from None
        seconds = found.stored.ttl
        removal = Remove(found.key, seconds)
        return IssuedSession(False, found.serialization, seconds, envelope.issued, envelope.fingerprint, removal)

    def _await_stored(self, session_id: bytes) -> _Found | None:
        """Return a stored session, which may still be on its way; None if it does not arrive."""
        end = time.monotonic() + STORED_SECONDS
        while len(session_id) == ID_BYTES:
            for serialization in _FORMATS:
                key = StoreKeys(self._namespace, serialization).key(session_id)
                stored = self._store.get(key)
                if stored:
                    return _Found(serialization, key, stored)
            if time.monotonic() > end:
                break
            time.sleep(_PAUSE)
        return None

    def _read_ticket(self, ticket: bytes, fleet_key: FleetKey, epoch: Epoch) -> IssuedSession:
        secret, seconds = self._load_secret(ticket, fleet_key, epoch)
        for serialization, decrypt in (("openssl", _decrypt_openssl), ("go or rustls", _decrypt_aead)):
            plaintext = decrypt(secret, ticket)
            begin = plaintext.find(_MARK)
            state = TicketState.decode(plaintext[begin : begin + _STATE_BYTES]) if begin >= 0 else None
            if state:
                key = StoreKeys(self._namespace, "ticket-lineage").key(state.lineage)
                removal = Remove(key, max(state.end - time.time(), 1) + epoch.rotation)
                return IssuedSession(True, serialization, seconds, state.negotiated, state.fingerprint, removal)
        return IssuedSession(True, "", seconds)

    def _load_secret(self, ticket: bytes, fleet_key: FleetKey, epoch: Epoch) -> tuple[TicketSecret, float]:
        key = address_of(self._namespace, fleet_key, epoch)
        stored = self._store.get(key)
        if not stored:
            raise Failure(
                "the secret of its tickets is not in this store",
                "compare the targets of the frontends; if the store has lost its storage, frontends agree on another "
                "secret within an hour",
            )
        try:
            plaintext, not_after = unseal([fleet_key], key, stored.value, epoch.start)
            secret = TicketSecret.decode(self._namespace, fleet_key, epoch, plaintext, not_after)
        except resumed.UnsealError as error:
            raise Failure(
                f"the secret of its tickets cannot be opened ({error.reason})",
                "see the store's log; frontends agree on another secret",
            ) from None
        if secret.name != ticket[:NAME_BYTES]:
            raise Failure(
                "it uses another ticket secret than the store has for the same epoch",
                "compare the targets of the frontends; after a failover of the store frontends correct this within an "
                "hour",
            )
        return secret, stored.ttl

    def _epoch(self, ticket: bytes, namespace: str) -> tuple[FleetKey, Epoch] | None:
        """Return the fleet key and the epoch that a ticket's key is named with."""
        for fleet_key in self._keyring.fleet_keys:
            epoch = epoch_of_name(namespace, fleet_key, ticket[:NAME_BYTES])
            if epoch:
                return fleet_key, epoch
        return None


def explain_difference(ours: IssuedSession, theirs: IssuedSession, other: str) -> tuple[str, str] | None:
    """Return the problem for which a frontend does not resume the session of another one, and the remedy; or None."""
    if ours.is_ticket != theirs.is_ticket:
        return (
            f"it {_name_mode(ours)}, and {other} {_name_mode(theirs)}",
            "configure `sessions`, and for TLS 1.2 `tickets_tls12`, alike at all frontends of the namespace",
        )
    if ours.serialization and theirs.serialization and ours.serialization != theirs.serialization:
        return (
            f"its sessions are of the format {ours.serialization}, and those of {other} of {theirs.serialization}",
            "nothing: stacks of different formats share the store, not their sessions; send each client to one kind",
        )
    if bool(ours.fingerprint) != bool(theirs.fingerprint):
        return (
            f"one of it and {other} has only ticket keys, as Node and users of `resumed ticket-keys` have",
            "use the library at both, or at neither: its rules need the state that only its own tickets contain",
        )
    if ours.fingerprint[:_HALF] != theirs.fingerprint[:_HALF]:
        return (
            f"its certificates have other names than those of {other}",
            "give both certificates with the same names, or different namespaces",
        )
    if ours.fingerprint[_HALF:] != theirs.fingerprint[_HALF:]:
        return (
            f"it verifies client certificates in another way than {other}",
            "request and verify client certificates alike at both, or use different namespaces",
        )
    return None


def _name_mode(session: IssuedSession) -> str:
    return "issues tickets" if session.is_ticket else "stores its sessions"


def _explain_foreign(shown: bytes) -> Failure:
    if not shown:
        return Failure(
            "it issues no session: install() was not called on its context, or it has no ticket secret yet",
            f"{_INSTALL}; with tickets, see its log: it issues none until it has reached the store",
        )
    epoch = Epoch.decode(shown[:NAME_BYTES])
    # A ticket of a fleet begins with its epoch, which shows without a key.
    if 1 <= epoch.rotation <= MAX_ROTATION and epoch.start % epoch.rotation == 0 and len(shown) > ID_BYTES:
        return Failure("its tickets are of another keyring or namespace", _COMPARE)
    if len(shown) > ID_BYTES:
        return Failure("it issues stateless tickets of its own: install() was not called on its context", _INSTALL)
    return Failure("its session ids are of another keyring or namespace", f"{_COMPARE}; or its context lacks install()")


def _decrypt_openssl(secret: TicketSecret, ticket: bytes) -> bytes:
    """Return the plaintext of a ticket of OpenSSL's form; empty if it is none."""
    mac_key, cipher_key = secret.openssl[NAME_BYTES:-32], secret.openssl[-32:]
    body, mac = ticket[:-_MAC_BYTES], ticket[-_MAC_BYTES:]
    if not hmac.compare_digest(hmac.digest(mac_key, body, hashlib.sha256), mac):
        return b""
    cipher = Cipher(AES(bytes(cipher_key)), CBC(body[NAME_BYTES:_HEAD_BYTES])).decryptor()
    return cipher.update(body[_HEAD_BYTES:]) + cipher.finalize()


def _decrypt_aead(secret: TicketSecret, ticket: bytes) -> bytes:
    """Return the plaintext of a ticket of Go or rustls; empty if it is none."""
    head = ticket[:_HEAD_BYTES]
    key = derive(secret.aead, 32, head[NAME_BYTES:], b"resumed/v1 ticket")
    with suppress(InvalidTag):
        return AESGCM(key).decrypt(bytes(12), ticket[_HEAD_BYTES:], head)
    return b""
