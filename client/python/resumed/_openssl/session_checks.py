"""Decides which sessions of a context may be shared, and which may resume on a connection (docs/contexts.md)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from resumed._openssl.contexts import VERIFY_PEER, contexts_of, has_peer_as_asked
from resumed._openssl.session_codec import SessionCodec
from resumed._policy.fingerprint import NO_CLIENT_AUTHENTICATION
from resumed._policy.served_names import Expected, ServedNames

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed._openssl.library import Library
    from resumed._openssl.offer import Offer

# <openssl/ssl.h>
_HOST_NAME = 0  # TLSEXT_NAMETYPE_host_name
BOTH_SHUTDOWN = 3
"""SSL_SENT_SHUTDOWN, SSL_RECEIVED_SHUTDOWN."""
_X509_V_OK = 0

_log = logging.getLogger("resumed")


class SessionChecks:
    """The checks of one context.

    Args:
        library: The libssl of the context.
        pointer: Its SSL_CTX.
        chooses_by_name: Returns whether it has a servername callback, which may choose another context.
        namespace: The namespace in which its sessions are shared.
        namespace_of: Returns the namespace in which another SSL_CTX shares its sessions; None if it shares none.
        id_context: The session id context that sessions get; None for that of the application, which OpenSSL compares.
    """

    def __init__(
        self,
        library: Library,
        pointer: int,
        chooses_by_name: Callable[[], bool],
        *,
        namespace: str,
        namespace_of: Callable[[int], str | None],
        id_context: bytes | None,
    ) -> None:
        self._library, self._pointer, self._chooses_by_name = library, pointer, chooses_by_name
        self._namespace, self._namespace_of, self.id_context = namespace, namespace_of, id_context
        self.codec, self.contexts, self._names = SessionCodec(library), contexts_of(library), ServedNames()
        self._known_id_context: bytes | None = None  # as the last full handshake showed it: OpenSSL has no getter
        self._warned: set[str] = set()

    def server_name(self, ssl: int) -> bytes:
        """Return the server name of a connection whose handshake is under way, in lower case."""
        name: bytes = self._library.SSL_get_servername(ssl, _HOST_NAME) or b""
        return name.lower()

    def expected(self, ssl: int, name: bytes) -> Expected:
        """Return the context that a connection, for which the client asks by name, is expected to be served by."""
        library, expected = self._library, self._names.expected(name)
        by_name = self._chooses_by_name() or library.SSL_get_SSL_CTX(ssl) != self._pointer
        # In a renegotiation of TLS 1.2 the context has been chosen already.
        by_name = by_name and not library.SSL_get_finished(ssl, None, 0)
        if by_name or expected.reason == "context-unstable":
            return expected
        return Expected(self.contexts.fingerprint(ssl, library.SSL_get_verify_mode(ssl)))

    def may_share(self, ssl: int, session: int, mode: int) -> bool:
        """Return whether a session of a connection, with its verify mode, proves enough to resume elsewhere."""
        library = self._library
        return (
            self._is_of_namespace(ssl)  # or a look-up would not find it: it happens before the context is chosen
            and has_peer_as_asked(mode, bool(library.SSL_SESSION_get0_peer(session)))
            and bool(library.SSL_get_verify_result(ssl) == _X509_V_OK)
            and bool(library.SSL_get_shutdown(ssl) != BOTH_SHUTDOWN)
        )

    def learn(self, ssl: int, session: int, mode: int) -> bytes:
        """Return the fingerprint of a connection after a full handshake, and note that it serves the name."""
        library = self._library
        if not self.id_context:
            self._known_id_context = self.codec.id_context_of(session)
        fingerprint = self.contexts.fingerprint(ssl, mode)
        if self._chooses_by_name() and not library.SSL_get_ex_data(ssl, library.taught_index):
            # Only once: a renegotiation or post-handshake authentication may change it later.
            library.SSL_set_ex_data(ssl, library.taught_index, 1)
            self._names.learn(self.server_name(ssl), fingerprint)
        return fingerprint

    def unfit(self, offer: Offer, fingerprint: bytes, session: int) -> str:
        """Return why a session of the expected context, negotiated for the same name, may not resume; empty if it may.

        Args:
            offer: The offer of the client.
            fingerprint: The fingerprint of the session's context.
            session: The session.
        """
        library = self._library
        cipher = library.SSL_SESSION_get0_cipher(session)
        if offer.digest and library.SSL_CIPHER_get_handshake_digest(cipher) != offer.digest:
            # OpenSSL would drop it, and then issue no ticket that fits (RFC 8446 section 4.2.11).
            return "other-cipher"
        asks = not fingerprint.endswith(NO_CLIENT_AUTHENTICATION)
        if library.SSL_SESSION_get0_peer(session) and not asks:
            return "context-mismatch"
        if not self.id_context:
            id_context = self.codec.id_context_of(session)
            # OpenSSL compares it as well, but only behind this callback. Without one it would end a handshake that asks
            # for a certificate.
            if self._known_id_context not in {None, id_context} or (offer.asks and not id_context):
                return "context-mismatch"
        return ""

    def is_confirmed(self, ssl: int) -> bool:
        """Return whether a resumed connection is served by the context that negotiated its session."""
        library = self._library
        session, mode = library.SSL_get_session(ssl), library.SSL_get_verify_mode(ssl)
        fingerprint = self.codec.fingerprint(session)
        return (
            fingerprint is not None
            and has_peer_as_asked(mode, bool(library.SSL_SESSION_get0_peer(session)))
            and bool(library.SSL_get_verify_result(ssl) == _X509_V_OK)
            and self.contexts.agrees(ssl, mode, fingerprint)
            and self._is_of_namespace(ssl)
        )

    def distrust(self, name: bytes) -> None:
        """Let no session for a name resume any more: the name alone does not decide which context serves."""
        if self._names.distrust(name):
            _log.warning(
                "namespace %s: a resumed connection for %r was ended: the context that served it is not the one that "
                "negotiated its session; sessions for this name do not resume in this process any more",
                self._namespace,
                name.decode("ascii", "replace"),
            )

    def warn_of_missing_id_context(self, ssl: int) -> None:
        """Warn of a session that OpenSSL will not cache: the new callback is not called for it (ssl_update_cache()).

        In TLS 1.2 the session is not there yet.
        """
        library = self._library
        if library.SSL_get_verify_mode(ssl) & VERIFY_PEER:
            session = library.SSL_get_session(ssl)
            if session and not self.codec.id_context_of(session):
                self.warn(
                    "this context verifies clients and has no session id context, so OpenSSL resumes none of its "
                    "sessions; set one (Context.set_session_id), or pass ignore_id_context=True to resumed.install()"
                )

    def warn(self, message: str) -> None:
        """Log a warning once, not for each session."""
        if message not in self._warned:
            self._warned.add(message)
            _log.warning("namespace %s: %s", self._namespace, message)

    def warn_of_foreign_data(self) -> None:
        """Warn that sessions are not shared since the application keeps data in them."""
        self.warn("the application keeps ticket application data in its sessions; they are not shared")

    def _is_of_namespace(self, ssl: int) -> bool:
        """Return whether the context that serves a connection shares its sessions in this namespace, or in none."""
        pointer = self._library.SSL_get_SSL_CTX(ssl)
        return pointer == self._pointer or self._namespace_of(pointer) in {None, self._namespace}
