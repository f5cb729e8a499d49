"""Serialized sessions of OpenSSL (i2d_SSL_SESSION(3)): the client's view of one, and forgeries."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_void_p
from typing import TYPE_CHECKING, NamedTuple

from resumed._openssl.library import ssl_library

if TYPE_CHECKING:
    import ssl

_SESSION_ID, _MASTER_KEY = 3, 4  # places in the SEQUENCE (ssl/ssl_asn1.c)
_TICKET = 0xAA  # [10] EXPLICIT


class Known(NamedTuple):
    """A client's view of a session."""

    offered: bytes
    """The session id in TLS 1.2, the ticket in TLS 1.3; the fleet calls both id."""
    secret: bytes
    """The master secret, or in TLS 1.3 the resumption key."""
    serialized: bytes


def known(session: ssl.SSLSession) -> Known:
    """Return the view of a client of the `ssl` module."""
    library, pointer = ssl_library(), _pointer(session)
    buffer = ctypes.create_string_buffer(library.i2d_SSL_SESSION(pointer, None))
    library.i2d_SSL_SESSION(pointer, byref(c_void_p(ctypes.addressof(buffer))))
    fields = _elements(_content(buffer.raw)[1])
    ticket = next((_content(content)[1] for tag, content in fields if tag == _TICKET), b"")
    return Known(ticket or fields[_SESSION_ID][1], fields[_MASTER_KEY][1], buffer.raw)


def forge(session: ssl.SSLSession, serialized: bytes) -> ssl.SSLSession:
    """Make `session`, one of a client's, what `serialized` says, and return it."""
    library = ssl_library()
    forged = library.d2i_SSL_SESSION(None, byref(c_void_p.from_buffer(c_char_p(serialized))), len(serialized))
    assert forged, "OpenSSL does not understand the forged session"
    library.SSL_SESSION_free(_pointer(session))
    _place(session).value = forged
    return session


def _place(session: ssl.SSLSession) -> c_void_p:
    # PySSLSession begins with the SSL_SESSION pointer, right behind the object header (CPython 3.10 to 3.14).
    return c_void_p.from_address(id(session) + object.__basicsize__)


def _pointer(session: ssl.SSLSession) -> int:
    return _place(session).value or 0


def _content(encoded: bytes) -> tuple[int, bytes, bytes]:
    """Return the tag and content of the first DER element, and the bytes after it."""
    tag, length, start = encoded[0], encoded[1], 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(encoded[2:start], "big")
    return tag, encoded[start : start + length], encoded[start + length :]


def _elements(encoded: bytes) -> list[tuple[int, bytes]]:
    found = []
    while encoded:
        tag, content, encoded = _content(encoded)
        found.append((tag, content))
    return found
