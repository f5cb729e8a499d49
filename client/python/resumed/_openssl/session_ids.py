"""The ids of all sessions of a connection, which an application names by one of its own objects."""

from __future__ import annotations

import ssl
import sys
from ctypes import c_void_p
from typing import Any

from resumed._openssl.library import cryptography_library, ssl_library
from resumed._openssl.session_codec import SessionCodec


def session_ids(source: object) -> frozenset[bytes]:
    """Return the ids of all sessions that a server's connection has negotiated or resumed, or of its tickets' lineage.

    Args:
        source: The connection (`ssl.SSLSocket`, `ssl.SSLObject`, `OpenSSL.SSL.Connection`), or its session
            (`ssl.SSLSession`, `OpenSSL.SSL.Session`).

    Raises:
        TypeError: It is nothing of that kind.
        ValueError: The connection has no session: its handshake is not over, or it is closed.
    """
    codec, session = session_of(source)
    state = codec.ticket_state(session)
    return frozenset({state.lineage}) if state else codec.ids_of(session)


def session_of(source: object) -> tuple[SessionCodec, int]:
    """Return the pointer to a connection's session, good as long as `source`, and the codec of its library.

    Args:
        source: As for session_ids().

    Raises:
        TypeError: It is nothing of that kind.
        UnsupportedContext: Its libssl cannot be reached.
        ValueError: The connection has no session: its handshake is not over, or it is closed.
    """
    pyopenssl: Any = sys.modules.get("OpenSSL.SSL")
    if pyopenssl and isinstance(source, (pyopenssl.Connection, pyopenssl.Session)):
        session = source if isinstance(source, pyopenssl.Session) else source.get_session()
        from cryptography.hazmat.bindings.openssl.binding import Binding  # noqa: PLC0415  # pyOpenSSL has imported it

        library = cryptography_library()
        pointer = session and int(Binding().ffi.cast("uintptr_t", session._session))  # noqa: SLF001
    else:
        session = source if isinstance(source, ssl.SSLSession) else getattr(source, "session", False)
        if not isinstance(session, ssl.SSLSession | None):
            raise TypeError(
                f"need a connection or session of ssl or OpenSSL.SSL, or ids as bytes, not {type(source).__qualname__}"
            )
        library = ssl_library()
        # PySSLSession begins with the SSL_SESSION pointer, right behind the object header (CPython 3.10 to 3.14).
        pointer = session and c_void_p.from_address(id(session) + object.__basicsize__).value
    if not pointer:
        raise ValueError("the connection has no session: its handshake is not over, or it is closed")
    return SessionCodec(library), pointer
