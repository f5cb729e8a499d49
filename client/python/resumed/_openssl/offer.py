"""A session or ticket that a client offers on a connection, while a callback runs."""

from __future__ import annotations

import math
import time
from functools import cached_property
from typing import TYPE_CHECKING

from resumed._exceptions import UnsealError
from resumed._openssl.client_hello import TLS1_3_VERSION, chosen_digest, requested_name
from resumed._openssl.contexts import VERIFY_PEER
from resumed._openssl.session_codec import Memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed._crypto.envelope import Envelope
    from resumed._openssl.library import Library
    from resumed._openssl.session_checks import SessionChecks
    from resumed._policy.served_names import Expected


class Offer:
    """A session or ticket that a client offers.

    Nothing is read of the connection before it is needed: most ids that are none of the fleet's cost nothing.
    """

    def __init__(self, library: Library, checks: SessionChecks, ssl: int) -> None:
        self._library, self._checks, self.ssl = library, checks, ssl

    @cached_property
    def name(self) -> bytes:
        """The server name that the client asks for, in lower case."""
        return requested_name(self._library, self.ssl)

    @cached_property
    def expected(self) -> Expected:
        """The context that the connection is expected to be served by."""
        self.asks, self.digest  # noqa: B018  # like the name, for check() in another thread
        return self._checks.expected(self.ssl, self.name)

    @cached_property
    def asks(self) -> bool:
        """Whether the connection asks for a client certificate, as far as it is set up."""
        return bool(self._library.SSL_get_verify_mode(self.ssl) & VERIFY_PEER)

    @cached_property
    def digest(self) -> int | None:
        """The hash that a TLS 1.3 session must have to resume; None in TLS 1.2."""
        library = self._library
        if library.SSL_version(self.ssl) != TLS1_3_VERSION:
            return None
        cipher = library.SSL_get_pending_cipher(self.ssl)
        # OpenSSL has not chosen one yet in the client hello callback.
        return library.SSL_CIPHER_get_handshake_digest(cipher) if cipher else chosen_digest(library, self.ssl)


class StoredOffer(Offer):
    """A stored session that a client offers, by its id."""

    def __init__(
        self, library: Library, checks: SessionChecks, ssl: int, session_id: bytes, now: Callable[[], float]
    ) -> None:
        super().__init__(library, checks, ssl)
        self.session_id, self._now = session_id, now

    def check(self, envelope: Envelope) -> None:
        """Raise UnsealError if the session may not resume; from any thread, once `expected` was read."""
        self._library.SSL_SESSION_free(self._decoded(envelope))

    def decode(self, envelope: Envelope, remaining: float) -> int:
        """Return the session, with that many seconds of its life left; raise UnsealError if it may not resume."""
        library, checks, session = self._library, self._checks, self._decoded(envelope)
        library.SSL_SESSION_set_time(session, int(time.time()))
        library.SSL_SESSION_set_timeout(session, math.ceil(remaining))
        # Tickets issued on the resumed connection end when the negotiated session does, which is at a whole second.
        end = int(self._now() + remaining)
        checks.codec.remember(session, Memory(envelope.fingerprint, envelope.issued, end, self.session_id))
        library.SSL_SESSION_set_ex_data(session, library.session_index, self.ssl)
        if id_context := checks.id_context:
            # OpenSSL compares it with the session's next, which was set when the session was stored.
            library.SSL_set_session_id_context(self.ssl, id_context, len(id_context))
        return session

    def _decoded(self, envelope: Envelope) -> int:
        session = self._checks.codec.decoded(envelope.session, self.session_id)
        reason = self._unfit(envelope, session)
        if reason:
            self._library.SSL_SESSION_free(session)
            raise UnsealError(reason)
        return session

    def _unfit(self, envelope: Envelope, session: int) -> str:
        """Return the reason of the miss if a session of the right context may not resume."""
        if (self._library.SSL_SESSION_get0_hostname(session) or b"") != self.name:  # RFC 6066 section 3
            return "server-name-mismatch"
        reason = self._checks.unfit(self, envelope.fingerprint, session)
        # A stored session has neither a memory nor data of an application.
        return reason or ("undecodable" if self._checks.codec.data_of(session) else "")
