"""The settings of an SSL_CTX that an installation changes, and puts back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from resumed._openssl.library import Library

# <openssl/ssl.h>
_CTRL_SET_SESS_CACHE_MODE = 44
_CTRL_GET_SESS_CACHE_MODE = 45
_SESS_CACHE_SERVER = 0x2
_SESS_CACHE_NO_INTERNAL = 0x300
OP_NO_TICKET = 1 << 14
OP_CIPHER_SERVER_PREFERENCE = 1 << 22
_OPTIONS = OP_NO_TICKET | OP_CIPHER_SERVER_PREFERENCE

TLS13_CIPHERS = 0x13
"""The first byte of the numbers of TLS 1.3's ciphers (RFC 8446, appendix B.4)."""
_TLS13_CIPHERS = {
    0x1302: "TLS_AES_256_GCM_SHA384",
    0x1303: "TLS_CHACHA20_POLY1305_SHA256",
    0x1301: "TLS_AES_128_GCM_SHA256",
}
"""OpenSSL's default for TLS 1.3, in its order."""

NO_CALLBACKS = (0, 0, 0)


class ContextSettings(NamedTuple):
    """The settings of a context: the callbacks for new sessions, look-ups and removals, and what goes with them."""

    callbacks: tuple[int, ...]
    id_callback: int
    """The id generator, 0 for OpenSSL's own: OpenSSL has no getter for it."""
    cache_mode: int
    options: int
    """The options of _OPTIONS that are set."""
    timeout: int

    @classmethod
    def of(cls, library: Library, pointer: int, id_callback: int) -> ContextSettings:
        """Return the present settings of a context."""
        return cls(
            session_callbacks(library, pointer),
            id_callback,
            library.SSL_CTX_ctrl(pointer, _CTRL_GET_SESS_CACHE_MODE, 0, None),
            library.SSL_CTX_get_options(pointer) & _OPTIONS,
            library.SSL_CTX_get_timeout(pointer),
        )

    def shared(
        self, callbacks: tuple[int, ...], id_callback: int, lifetime: int, *, stateless: bool, mixed: bool
    ) -> ContextSettings:
        """Return the settings of a context with these settings whose sessions are shared.

        There is no internal cache: in it a session would outlive its removal from the fleet, and its eviction would
        remove it there.

        Args:
            callbacks: The callbacks for new sessions, look-ups and removals.
            id_callback: The id generator.
            lifetime: Seconds that a session lives.
            stateless: Whether tickets carry their sessions.
            mixed: Whether frontends of unlike stacks share them. A session of TLS 1.3 resumes only with a cipher of its
                hash, so all have to choose the same one for a client: by the server's order, as `ssl`, Node and HAProxy
                do by default.
        """
        options = self.options & ~OP_NO_TICKET | (0 if stateless else OP_NO_TICKET)
        options |= OP_CIPHER_SERVER_PREFERENCE if mixed else 0
        return ContextSettings(callbacks, id_callback, _SESS_CACHE_SERVER | _SESS_CACHE_NO_INTERNAL, options, lifetime)

    def apply(self, library: Library, pointer: int) -> None:
        """Give a context these settings."""
        set_session_callbacks(library, pointer, self.callbacks, self.id_callback)
        library.SSL_CTX_ctrl(pointer, _CTRL_SET_SESS_CACHE_MODE, self.cache_mode, None)
        library.SSL_CTX_set_timeout(pointer, self.timeout)
        library.SSL_CTX_set_options(pointer, self.options)
        library.SSL_CTX_clear_options(pointer, _OPTIONS & ~self.options)


def unusual_cipher(library: Library, pointer: int) -> str | None:
    """Return the first cipher of TLS 1.3 of a context if it is not the first of OpenSSL's default."""
    ciphers = library.SSL_CTX_get_ciphers(pointer)
    numbers = (
        library.SSL_CIPHER_get_protocol_id(library.OPENSSL_sk_value(ciphers, place))
        for place in range(library.OPENSSL_sk_num(ciphers))
    )
    first = next((number for number in numbers if number >> 8 == TLS13_CIPHERS), None)
    if first in {None, next(iter(_TLS13_CIPHERS))}:
        return None
    return _TLS13_CIPHERS.get(first, f"0x{first:04x}")


def session_callbacks(library: Library, pointer: int) -> tuple[int, ...]:
    """Return the addresses of a context's callbacks for new sessions, look-ups and removals."""
    return (
        library.SSL_CTX_sess_get_new_cb(pointer) or 0,
        library.SSL_CTX_sess_get_get_cb(pointer) or 0,
        library.SSL_CTX_sess_get_remove_cb(pointer) or 0,
    )


def set_session_callbacks(library: Library, pointer: int, callbacks: tuple[int, ...], id_callback: int) -> None:
    """Set the callbacks of a context, and the id generator; 0 unsets one."""
    new, get, remove = callbacks
    library.SSL_CTX_sess_set_new_cb(pointer, new)
    library.SSL_CTX_sess_set_get_cb(pointer, get)
    library.SSL_CTX_sess_set_remove_cb(pointer, remove)
    library.SSL_CTX_set_generate_session_id(pointer, id_callback)
