"""Sets the ticket callbacks of one SSL_CTX, which call the policy of tickets.

OpenSSL's rules are in SSL_CTX_set_session_ticket_cb(3) and SSL_CTX_set_tlsext_ticket_key_evp_cb(3). For a new ticket,
OpenSSL calls the generate callback, then the key callback; for one that a client offers, the key callback, then the
decrypt callback, in one thread. No exception leaves a callback, and no failure ends a handshake: the worst is a full
handshake without a ticket.
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import os
import threading
from ctypes import c_char_p, c_size_t, c_uint, c_void_p, memmove, string_at
from functools import cached_property
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from resumed._crypto.ticket_secret import NAME_BYTES
from resumed._crypto.ticket_state import TicketState
from resumed._exceptions import UnsealError, UnsupportedContext
from resumed._openssl.client_hello import TLS1_3_VERSION, is_tls13, offered_identities, offered_tickets
from resumed._openssl.context_settings import OP_NO_TICKET
from resumed._openssl.contexts import VERIFY_PEER
from resumed._openssl.library import DECRYPT_TICKET_CALLBACK, GENERATE_TICKET_CALLBACK, TICKET_KEY_CALLBACK
from resumed._openssl.offer import Offer
from resumed._openssl.session_codec import ID_BYTES, Memory
from resumed._policy.lookups import result_or_late
from resumed._policy.tickets import HEAD_BYTES, MAX_SESSION_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed._async.suspendable_handshake import SuspendableHandshake
    from resumed._crypto.ticket_secret import TicketSecret
    from resumed._openssl.callbacks import CallbackBinding
    from resumed._openssl.library import Library
    from resumed._openssl.session_checks import SessionChecks
    from resumed._policy.tickets import Tickets

# Results of the key callback.
_NO_TICKET = 0
_USE_KEY = 1
_USE_KEY_AND_RENEW = 2
# SSL_TICKET_STATUS and SSL_TICKET_RETURN, <openssl/ssl.h>
_STATUS_EMPTY, _STATUS_NO_DECRYPT, _STATUS_SUCCESS = 3, 4, 5
_IGNORE_AND_RENEW = 2
_USE, _USE_AND_RENEW = 3, 4

_IV_BYTES = 16
_MAC_BYTES = 32
_MAC_KEY = slice(NAME_BYTES, NAME_BYTES + 32)
_AES_KEY = slice(NAME_BYTES + 32, NAME_BYTES + 64)


class TicketCallbacks:
    """The ticket callbacks of a context.

    Args:
        connections: The binding that they belong to.
        checks: The checks of the context.
        tickets: Decides about each ticket.

    Raises:
        UnsupportedContext: The libssl of the context lacks the functions.
    """

    def __init__(self, connections: CallbackBinding, checks: SessionChecks, tickets: Tickets) -> None:
        self._connections, self._checks, self._tickets = connections, checks, tickets
        self._library, self._codec = connections.library, checks.codec
        if not self._library.has_tickets:
            raise UnsupportedContext("tickets of a fleet need OpenSSL 3.0 or newer")
        self._keys = _TicketKeys(self._library)
        self._current = _CurrentTicket()
        self._trampolines = (
            TICKET_KEY_CALLBACK(self._on_key),
            GENERATE_TICKET_CALLBACK(self._on_generate),
            DECRYPT_TICKET_CALLBACK(self._on_decrypt),
        )

    def install(self, pointer: int) -> None:
        """Set the callbacks of a context."""
        key, generate, decrypt = (ctypes.cast(trampoline, c_void_p).value for trampoline in self._trampolines)
        self._library.SSL_CTX_set_tlsext_ticket_key_evp_cb(pointer, key)
        self._library.SSL_CTX_set_session_ticket_cb(pointer, generate, decrypt, None)

    def uninstall(self, pointer: int) -> None:
        """Unset the callbacks of a context: it makes tickets of its own again."""
        self._library.SSL_CTX_set_tlsext_ticket_key_evp_cb(pointer, None)
        self._library.SSL_CTX_set_session_ticket_cb(pointer, None, None, None)

    def choose_kind(self, ssl: int) -> bool:
        """Return whether a connection resumes by a ticket, not by a stored session; in the client hello callback."""
        library, current = self._library, self._current
        current.begin(ssl)
        if not self._tickets.for_tls12 and not is_tls13(library, ssl):
            stateless = False
        else:
            # A fleet that moves to tickets has clients with stored sessions, which look like short tickets.
            offered = offered_identities(library, ssl)
            stateless = not offered or len(offered[0]) != ID_BYTES
        if not stateless:
            library.SSL_set_options(ssl, OP_NO_TICKET)
            library.SSL_set_generate_session_id(ssl, self._connections.id_callback)
        return stateless

    def start_claim(self, ssl: int, handshake: SuspendableHandshake) -> None:
        """Claim the ticket that a connection is going to resume with, if it is good for one use, without blocking."""
        handshake.suspended = False
        if not self._tickets.single_use:
            return
        for ticket in offered_tickets(self._library, ssl)[:1]:
            state = self._opened(ssl, ticket)
            if state:
                claim = self._tickets.claim(ticket[:HEAD_BYTES], state, handshake, may_suspend=True)
                handshake.suspended = not claim.done()

    def _opened(self, ssl: int, ticket: bytes) -> TicketState | None:
        """Return the state in a ticket that may resume on a connection; None for any other."""
        secret = self._tickets.held_secret(ticket[:NAME_BYTES])
        content = _decrypted(secret.openssl, ticket) if secret else None
        if content is None:
            return None
        try:
            session = self._codec.decoded(content)
        except UnsealError:
            return None
        try:
            state = self._codec.ticket_state(session)
            return state if state and not self._refusal(ssl, session, state) else None
        finally:
            self._library.SSL_SESSION_free(session)

    def _on_generate(self, ssl: int, _data: int) -> int:
        """Write the state into the session of a ticket. Returning 0 would end the handshake."""
        current = self._current
        current.secret = None
        try:
            current.secret = self._prepare(ssl)
        except BaseException as error:  # noqa: BLE001  # nothing may cross C
            self._connections.handle_callback_error(error)
        return 1

    def _prepare(self, ssl: int) -> TicketSecret | None:
        """Return the secret to encrypt the next ticket of a connection with; None if it gets none, or a stored one."""
        library, tickets, current = self._library, self._tickets, self._current
        session = library.SSL_get_session(ssl)
        if current.connection == ssl and current.more:
            # The session is a copy of that of the ticket before, with its state.
            current.more -= 1
        else:
            secret = tickets.secret_for_issue()
            if secret is None:
                self._store_instead(ssl, session)
                return None
            state = self._limited_state(ssl, session, secret)
            if state is None:
                return None
            current.lineage, current.issued_with = state.lineage, secret
            end = state.end - library.SSL_SESSION_get_time(session)
            library.SSL_SESSION_set_timeout(session, max(int(end), 1))
            if id_context := self._checks.id_context:
                library.SSL_SESSION_set1_id_context(session, id_context, len(id_context))
        library.SSL_SESSION_set1_id(session, b"", 0)  # or it would be part of the ticket
        current.session = 0 if current.more else session
        tickets.count_issue()
        return current.issued_with

    def is_ticket(self, session: int) -> bool:
        """Return whether a new session is the one of the ticket that was issued last in this thread."""
        return session == self._current.session

    def _limited_state(self, ssl: int, session: int, secret: TicketSecret) -> TicketState | None:
        """Write the state of the next ticket of a connection into a session, and return it; None if it gets none."""
        library, codec, current = self._library, self._codec, self._current
        is_first = current.connection == ssl and current.fresh
        current.connection, current.fresh, current.more = ssl, False, 0
        mode, peer = library.SSL_get_verify_mode(ssl), library.SSL_SESSION_get0_peer(session)
        library.SSL_clear_options(ssl, OP_NO_TICKET)  # if a stored session was offered, or a ticket withheld
        if mode & VERIFY_PEER:
            self._checks.warn_of_missing_id_context(ssl)
        if peer and library.i2d_SSL_SESSION(session, None) > MAX_SESSION_BYTES:
            self._store_instead(ssl, session)
            return None
        if library.SSL_session_reused(ssl):
            state = self._state_of_resumed(ssl, session, mode)
        else:
            state = self._state_of_negotiated(ssl, session, mode)
            if is_first and library.SSL_version(ssl) == TLS1_3_VERSION:
                current.more = max(library.SSL_get_num_tickets(ssl) - 1, 0)
        limited = state and self._tickets.limited(state, secret, codec.peer_seconds(session) if peer else None)
        if limited is None:
            self._tickets.count_withheld()
            self._withhold(ssl, session)
        elif limited is not current.written:
            codec.remember(session, limited)
        current.written = None
        return limited

    def _store_instead(self, ssl: int, session: int) -> None:
        """Have a session stored that no ticket can carry now; in TLS 1.2 it is too late for that."""
        if self._withhold(ssl, session):
            session_id = self._connections.issue_id(ssl)
            self._library.SSL_SESSION_set1_id(session, session_id, len(session_id))

    def _withhold(self, ssl: int, session: int) -> bool:
        """Have OpenSSL send the id of a session instead of a ticket in TLS 1.3; return whether it does.

        The id is random, so it resumes nowhere unless it is replaced. A key callback that returns 0 has the same effect
        in TLS 1.2 only: before OpenSSL 3.0.6 the message is malformed in TLS 1.3.
        """
        library, self._current.more = self._library, 0
        if library.SSL_version(ssl) != TLS1_3_VERSION:
            return False
        self._codec.remember(session, None)
        library.SSL_set_options(ssl, OP_NO_TICKET)
        return True

    def _state_of_negotiated(self, ssl: int, session: int, mode: int) -> TicketState | None:
        """Return the state for a ticket of a full handshake; None if its session must not be shared.

        Later tickets are issued as the connection is then: post-handshake authentication may have changed it.
        """
        checks = self._checks
        if not checks.may_share(ssl, session, mode):
            return None
        name, data = checks.server_name(ssl), self._codec.data_of(session)
        # The session of the ticket before is a stored one if there was no secret then.
        state = self._state_in(ssl, data) if data else None
        if data and state is None:
            checks.warn_of_foreign_data()
            return None
        if self._library.SSL_version(ssl) != TLS1_3_VERSION:
            # As for stored sessions: on a connection that resumes it, SSL_get_servername(3) returns this name.
            self._library.SSL_SESSION_set1_hostname(session, name or None)
        fingerprint = checks.learn(ssl, session, mode)
        return state._replace(fingerprint=fingerprint) if state else self._tickets.begin(fingerprint, name)

    def _state_of_resumed(self, ssl: int, session: int, mode: int) -> TicketState | None:
        """Return the state for a ticket that follows another ticket, or a stored session; None if it gets none."""
        written, checks = self._current.written, self._checks
        if written and not self._connections.context_may_change():
            return written
        if not checks.may_share(ssl, session, mode):
            return None
        state = self._state_in(ssl, self._codec.data_of(session))
        return state if state and checks.contexts.agrees(ssl, mode, state.fingerprint) else None

    def _state_in(self, ssl: int, data: bytes) -> TicketState | None:
        """Return the state in the data of a session; of a stored one, that of the first ticket that follows it."""
        state = TicketState.decode(data)
        memory = None if state else Memory.decode(data)
        if memory is None:
            return state
        return self._tickets.begin(memory.fingerprint, self._checks.server_name(ssl), memory.issued, memory.end or None)

    def _on_key(self, ssl: int, *arguments: int) -> int:
        *pointers, encrypt = arguments
        try:
            return self._encrypt(ssl, *pointers) if encrypt else self._decrypt(ssl, *pointers)
        except BaseException as error:  # noqa: BLE001  # nothing may cross C
            self._connections.handle_callback_error(error)
            return _NO_TICKET

    def _encrypt(self, ssl: int, name: int, iv: int, cipher: int, mac: int) -> int:
        current, library = self._current, self._library
        secret, current.secret = current.secret, None
        if secret is None:
            return _NO_TICKET
        if current.session:
            # OpenSSL calls the remove callback only for a session with an id, and the connection has the last session.
            library.SSL_SESSION_set1_id(current.session, current.lineage, len(current.lineage))
            library.SSL_SESSION_set_ex_data(current.session, library.session_index, ssl)
        random = os.urandom(_IV_BYTES)
        memmove(name, secret.name, NAME_BYTES)
        memmove(iv, random, _IV_BYTES)
        is_set = self._keys.set(library.EVP_EncryptInit_ex, secret, random, cipher, mac)
        return _USE_KEY if is_set else _NO_TICKET

    def _decrypt(self, ssl: int, name: int, iv: int, cipher: int, mac: int) -> int:
        tickets, current, library = self._tickets, self._current, self._library
        key_name = string_at(name, NAME_BYTES)
        current.secret = secret = tickets.secret_for_name(key_name)
        if secret is None or not self._keys.set(library.EVP_DecryptInit_ex, secret, iv, cipher, mac):
            return _NO_TICKET
        current.head = key_name + string_at(iv, _IV_BYTES)
        renew = library.SSL_version(ssl) == TLS1_3_VERSION or not tickets.is_current(secret)
        return _USE_KEY_AND_RENEW if renew else _USE_KEY

    def _on_decrypt(self, ssl: int, session: int, _name: int, _length: int, status: int, _data: int) -> int:
        current = self._current
        secret, current.secret = current.secret, None
        try:
            if status == _STATUS_EMPTY or secret is None:
                return _IGNORE_AND_RENEW
            if status == _STATUS_NO_DECRYPT:
                self._tickets.count_refusal("not-authentic")
                return _IGNORE_AND_RENEW
            state = self._codec.ticket_state(session)
            reason = state and (self._refusal(ssl, session, state) or self._claim(ssl, current.head, state))
            if state is None or reason:
                self._tickets.count_refusal(reason or "malformed")
                return _IGNORE_AND_RENEW
            self._accept(ssl, session, state)
            self._tickets.count_use(secret)
        except BaseException as error:  # noqa: BLE001  # nothing may cross C
            self._connections.handle_callback_error(error)
            return _IGNORE_AND_RENEW
        return _USE if status == _STATUS_SUCCESS else _USE_AND_RENEW

    def _claim(self, ssl: int, head: bytes, state: TicketState) -> str | None:
        """Claim a ticket that is good for one use; return why it cannot be, or None."""
        if not self._tickets.single_use:
            return None
        claim = self._tickets.claim(head, state, self._connections.handshake(ssl), may_suspend=False)
        value, reason = result_or_late(claim, 0)
        return reason if value is None else None

    def _refusal(self, ssl: int, session: int, state: TicketState) -> str | None:
        offer = Offer(self._library, self._checks, ssl)
        return self._tickets.refusal(state, offer) or self._checks.unfit(offer, state.fingerprint, session) or None

    def _accept(self, ssl: int, session: int, state: TicketState) -> None:
        if self._library.SSL_version(ssl) == TLS1_3_VERSION:  # in TLS 1.2 it has the id by which its client knows it
            self._library.SSL_SESSION_set1_id(session, state.lineage, len(state.lineage))
        self._library.SSL_SESSION_set_ex_data(session, self._library.session_index, ssl)
        if id_context := self._checks.id_context:
            self._library.SSL_set_session_id_context(ssl, id_context, len(id_context))
        self._current.written = state
        self._connections.confirm_later(ssl)


class _CurrentTicket(threading.local):
    """The handshake of this thread, and the ticket that OpenSSL opens or makes in it, from one callback to the next."""

    connection = 0
    fresh = False
    """Whether no ticket has been issued on the connection."""
    more = 0
    """How many tickets of the same handshake follow the last one."""
    written: TicketState | None = None
    """The state of a ticket that was accepted and that has no successor yet: it stands in the session."""
    lineage = b""
    issued_with: TicketSecret | None = None
    session = 0
    """The session of the last ticket of a handshake."""
    secret: TicketSecret | None = None
    """The secret that the key callback has found or needs."""
    head = b""
    """The first bytes of the ticket that is opened."""

    def begin(self, connection: int) -> None:
        """Begin with the handshake of a connection."""
        self.connection, self.fresh, self.more, self.written, self.session = connection, True, 0, None, 0


class _Param(ctypes.Structure):
    """OSSL_PARAM(3)."""

    _fields_ = (
        ("key", c_char_p),
        ("data_type", c_uint),
        ("data", c_void_p),
        ("data_size", c_size_t),
        ("return_size", c_size_t),
    )


_OSSL_PARAM_UTF8_STRING, _OSSL_PARAM_OCTET_STRING = 4, 5


class _TicketKeys:
    """Gives OpenSSL the keys of a ticket."""

    def __init__(self, library: Library) -> None:
        self._library = library

    @cached_property
    def _cipher(self) -> int:
        cipher: int = self._library.EVP_CIPHER_fetch(None, b"AES-256-CBC", None)
        return cipher

    def set(self, initialize: Callable[..., int], secret: TicketSecret, iv: bytes | int, cipher: int, mac: int) -> bool:
        """Set the keys of a secret; `initialize` is EVP_EncryptInit_ex or EVP_DecryptInit_ex."""
        library = self._library
        prepared: _Prepared | None = secret.prepared.get(library)
        if prepared is None:
            prepared = secret.prepared[library] = _Prepared(secret)
        return bool(
            library.EVP_MAC_CTX_set_params(mac, prepared.address)
            and initialize(cipher, self._cipher, None, prepared.aes, iv)
        )


class _Prepared:
    """The keys of a secret in the form that OpenSSL takes. Has no repr of its own."""

    def __init__(self, secret: TicketSecret) -> None:
        self.aes = secret.openssl[_AES_KEY]
        self._mac = ctypes.create_string_buffer(secret.openssl[_MAC_KEY], 32)
        self._digest = ctypes.create_string_buffer(b"SHA256")
        self._params = (_Param * 3)(
            _Param(b"key", _OSSL_PARAM_OCTET_STRING, ctypes.addressof(self._mac), 32, 0),
            _Param(b"digest", _OSSL_PARAM_UTF8_STRING, ctypes.addressof(self._digest), 6, 0),
            _Param(None, 0, None, 0, 0),
        )
        self.address = ctypes.addressof(self._params)


def _decrypted(keys: bytes, ticket: bytes) -> bytes | None:
    """Return the session in a ticket; None if it is not authentic (RFC 5077 section 4)."""
    signed, mac = ticket[:-_MAC_BYTES], ticket[-_MAC_BYTES:]
    content = signed[HEAD_BYTES:]
    if (
        not content
        or len(content) % 16
        or not hmac.compare_digest(hmac.digest(keys[_MAC_KEY], signed, hashlib.sha256), mac)
    ):
        return None
    decryptor = Cipher(algorithms.AES(keys[_AES_KEY]), modes.CBC(signed[NAME_BYTES:HEAD_BYTES])).decryptor()
    padded = decryptor.update(content) + decryptor.finalize()
    return padded[: -padded[-1]]
