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

NO_CALLBACKS = (0, 0, 0)


class ContextSettings(NamedTuple):
    """The settings of a context: the callbacks for new sessions, look-ups and removals, and what goes with them."""

    callbacks: tuple[int, ...]
    id_callback: int
    """The id generator, 0 for OpenSSL's own: OpenSSL has no getter for it."""
    cache_mode: int
    no_ticket: int
    timeout: int

    @classmethod
    def of(cls, library: Library, pointer: int, id_callback: int) -> ContextSettings:
        """Return the present settings of a context."""
        return cls(
            session_callbacks(library, pointer),
            id_callback,
            library.SSL_CTX_ctrl(pointer, _CTRL_GET_SESS_CACHE_MODE, 0, None),
            library.SSL_CTX_get_options(pointer) & OP_NO_TICKET,
            library.SSL_CTX_get_timeout(pointer),
        )

    @classmethod
    def shared(cls, callbacks: tuple[int, ...], id_callback: int, lifetime: int, *, stateless: bool) -> ContextSettings:
        """Return the settings of a context whose sessions are shared.

        There is no internal cache: in it a session would outlive its removal from the fleet, and its eviction would
        remove it there.
        """
        mode = _SESS_CACHE_SERVER | _SESS_CACHE_NO_INTERNAL
        return cls(callbacks, id_callback, mode, 0 if stateless else OP_NO_TICKET, lifetime)

    def apply(self, library: Library, pointer: int) -> None:
        """Give a context these settings."""
        set_session_callbacks(library, pointer, self.callbacks, self.id_callback)
        library.SSL_CTX_ctrl(pointer, _CTRL_SET_SESS_CACHE_MODE, self.cache_mode, None)
        library.SSL_CTX_set_timeout(pointer, self.timeout)
        change = library.SSL_CTX_set_options if self.no_ticket else library.SSL_CTX_clear_options
        change(pointer, OP_NO_TICKET)


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
