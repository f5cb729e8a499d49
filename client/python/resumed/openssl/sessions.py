"""SSL_SESSIONs of one libssl: to bytes and back, and what a session remembers of the connection that negotiated it.

TLS 1.3 issues several tickets on a connection, and OpenSSL tells of the last one only when the connection fails. So the
session itself remembers the others, as ticket application data: each ticket's session is a copy of the one before. The
tickets of a resumed connection so also know when the first of their line was negotiated, and when it ends.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_size_t, c_uint, c_void_p, string_at
from typing import TYPE_CHECKING, NamedTuple

from resumed.errors import Unsealable

if TYPE_CHECKING:
    from resumed.openssl.library import Library

ID_BYTES = 32
_TIME_BYTES = 8
_MOST_SIBLINGS = 16


class Remembered(NamedTuple):
    """What a session remembers."""

    issued: float | None = None
    """When the full handshake of its line was, in Unix seconds; None if nobody knows."""
    end: int = 0
    """When the session that was resumed ends, in Unix seconds; 0 if none was."""
    siblings: bytes = b""
    """The ids of the sessions of the same connection, one behind the other."""

    @property
    def ids(self) -> set[bytes]:
        """The siblings' ids."""
        return {self.siblings[start : start + ID_BYTES] for start in range(0, len(self.siblings), ID_BYTES)}


class Sessions:
    """What is done with pointers to SSL_SESSION of one library."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def id_of(self, session: int) -> bytes:
        """Return its id; empty if it has none."""
        length = c_uint()
        data = self._library.SSL_SESSION_get_id(session, byref(length))
        return string_at(data, length.value) if length.value else b""

    def serialized(self, session: int) -> bytes:
        """Return its bytes: i2d_SSL_SESSION(3)."""
        length = self._library.i2d_SSL_SESSION(session, None)
        buffer = ctypes.create_string_buffer(length)
        self._library.i2d_SSL_SESSION(session, byref(c_void_p(ctypes.addressof(buffer))))
        return buffer.raw

    def decoded(self, serialized: bytes, session_id: bytes) -> int:
        """Return a new session, which is the caller's to free.

        Raises:
            Unsealable: The bytes are none, or those of a session with another id.
        """
        library = self._library
        start = c_char_p(serialized)
        cursor = c_void_p.from_buffer(start)
        begin = cursor.value or 0
        # A failure must not stay in the thread's error queue, where the connection would find it.
        library.ERR_set_mark()
        session: int | None = library.d2i_SSL_SESSION(None, byref(cursor), len(serialized))
        library.ERR_pop_to_mark()
        if session is None:
            raise Unsealable("undecodable")
        if (cursor.value or 0) - begin != len(serialized) or self.id_of(session) != session_id:
            library.SSL_SESSION_free(session)
            raise Unsealable("undecodable")
        return session

    def remembered(self, session: int) -> Remembered:
        """Return what it remembers; the defaults if it is nothing of ours."""
        data, length = c_void_p(), c_size_t()
        self._library.SSL_SESSION_get0_ticket_appdata(session, byref(data), byref(length))
        if not data.value or length.value < 2 * _TIME_BYTES:
            return Remembered()
        remembered = string_at(data.value, length.value)
        issued, end = (int.from_bytes(remembered[at : at + _TIME_BYTES], "big") for at in (0, _TIME_BYTES))
        return Remembered(issued / 1e6, end, remembered[2 * _TIME_BYTES :])

    def remember(self, session: int, issued: float, end: int = 0, siblings: bytes = b"") -> None:
        """Have it remember that, and the last few of the siblings only; see Remembered."""
        times = (each.to_bytes(_TIME_BYTES, "big") for each in (int(issued * 1e6), end))
        remembered = b"".join((*times, siblings[-_MOST_SIBLINGS * ID_BYTES :]))
        self._library.SSL_SESSION_set1_ticket_appdata(session, remembered, len(remembered))
