"""A session or ticket that a client offers on a connection, while a callback runs."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from resumed._openssl.client_hello import TLS1_3_VERSION, chosen_digest, requested_name
from resumed._openssl.contexts import VERIFY_PEER

if TYPE_CHECKING:
    from resumed._crypto.envelope import Envelope
    from resumed._openssl.callbacks import CallbackBinding
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
        self, library: Library, checks: SessionChecks, ssl: int, session_id: bytes, decoder: CallbackBinding
    ) -> None:
        super().__init__(library, checks, ssl)
        self.session_id, self._decoder = session_id, decoder

    def check(self, envelope: Envelope) -> None:
        """Raise UnsealError if the session may not resume; from any thread, once `expected` was read."""
        self._decoder.check(self, envelope)

    def decode(self, envelope: Envelope, remaining: float) -> int:
        """Return the session, with that many seconds of its life left; raise UnsealError if it may not resume."""
        return self._decoder.decode(self, envelope, remaining)
