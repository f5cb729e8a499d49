"""SSL_SESSIONs of one libssl: to bytes and back, and the memory that a session has of its connection.

TLS 1.3 issues several tickets on a connection, and OpenSSL names only the last one when the connection fails. So the
session itself remembers the others, as ticket application data: each ticket's session is a copy of the one before. The
tickets of a resumed connection so also know which context and which full handshake they stem from, and when they end.
That memory is never part of a stored session. An application may keep ticket application data of its own: a mark tells
ours.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p, string_at
from typing import TYPE_CHECKING, NamedTuple

from resumed._crypto.ticket_state import TicketState
from resumed._exceptions import UnsealError
from resumed._policy.fingerprint import FINGERPRINT_BYTES

if TYPE_CHECKING:
    from resumed._openssl.library import Library

ID_BYTES = 32
_MARK = b"resumed\x02"
_TIME_BYTES = 8
_MOST_SIBLINGS = 255
_SECONDS_PER_DAY = 86_400


class Memory(NamedTuple):
    """The memory that a session has of its connection."""

    fingerprint: bytes
    """The fingerprint of the context that negotiated its lineage."""
    issued: float
    """When the full handshake of its lineage was, in Unix seconds."""
    end: int
    """When the session that was resumed ends, in Unix seconds; 0 if none was."""
    siblings: bytes
    """The ids of the sessions of the same connection, concatenated."""

    @property
    def ids(self) -> set[bytes]:
        """The siblings' ids."""
        return {self.siblings[start : start + ID_BYTES] for start in range(0, len(self.siblings), ID_BYTES)}

    def encode(self) -> bytes:
        """Return its bytes, with the last few of the siblings only."""
        times = (each.to_bytes(_TIME_BYTES, "big") for each in (int(self.issued * 1e6), self.end))
        return b"".join((_MARK, self.fingerprint, *times, self.siblings[-_MOST_SIBLINGS * ID_BYTES :]))

    @classmethod
    def decode(cls, data: bytes) -> Memory | None:
        """Return the memory in ticket application data; None if it is the application's own."""
        times_at = len(_MARK) + FINGERPRINT_BYTES
        if not data.startswith(_MARK) or len(data) < times_at + 2 * _TIME_BYTES:
            return None
        issued, end = (int.from_bytes(data[at : at + _TIME_BYTES], "big") for at in (times_at, times_at + _TIME_BYTES))
        return cls(data[len(_MARK) : times_at], issued / 1e6, end, data[times_at + 2 * _TIME_BYTES :])


class SessionCodec:
    """Encodes, decodes and reads the SSL_SESSIONs of one library."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def id_of(self, session: int) -> bytes:
        """Return its id; empty if it has none."""
        length = c_uint()
        data = self._library.SSL_SESSION_get_id(session, byref(length))
        return string_at(data, length.value) if length.value else b""

    def ticket_of(self, session: int) -> bytes:
        """Return the ticket that a client received with it; empty if it has none."""
        ticket, length = c_void_p(), c_size_t()
        self._library.SSL_SESSION_get0_ticket(session, byref(ticket), byref(length))
        return string_at(ticket.value, length.value) if ticket.value else b""

    def serialized(self, session: int) -> bytes:
        """Return its bytes: i2d_SSL_SESSION(3)."""
        length = self._library.i2d_SSL_SESSION(session, None)
        buffer = ctypes.create_string_buffer(length)
        self._library.i2d_SSL_SESSION(session, byref(c_void_p(ctypes.addressof(buffer))))
        return buffer.raw

    def decoded(self, serialized: bytes, session_id: bytes | None = None) -> int:
        """Return a new session, which is the caller's to free.

        Args:
            serialized: Its bytes.
            session_id: The id that it must have; None for any.

        Raises:
            UnsealError: The bytes are none, or those of a session with another id.
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
            raise UnsealError("undecodable")
        if (cursor.value or 0) - begin != len(serialized) or session_id not in {None, self.id_of(session)}:
            library.SSL_SESSION_free(session)
            raise UnsealError("undecodable")
        return session

    def ids_of(self, session: int) -> frozenset[bytes]:
        """Return the ids of all sessions of its connection that it knows of, its own included."""
        memory = Memory.decode(self.data_of(session))
        return frozenset({self.id_of(session), *(memory.ids if memory else ())} - {b""})

    def ticket_state(self, session: int) -> TicketState | None:
        """Return the state in a ticket's session; None if it has none."""
        return TicketState.decode(self.data_of(session))

    def fingerprint(self, session: int) -> bytes | None:
        """Return the fingerprint of the context that negotiated a session; None if it has none."""
        data = self.data_of(session)
        known = TicketState.decode(data) or Memory.decode(data)
        return known.fingerprint if known else None

    def remember(self, session: int, memory: Memory | TicketState | None) -> None:
        """Give it that memory or state, or none, instead of the one that it had."""
        encoded = memory.encode() if memory else b""
        self._library.SSL_SESSION_set1_ticket_appdata(session, encoded or None, len(encoded))

    def data_of(self, session: int) -> bytes:
        """Return its ticket application data; empty if it has none."""
        data, length = c_void_p(), c_size_t()
        self._library.SSL_SESSION_get0_ticket_appdata(session, byref(data), byref(length))
        return string_at(data.value, length.value) if data.value and length.value else b""

    def id_context_of(self, session: int) -> bytes:
        """Return its session id context; empty if it has none."""
        length = c_uint()
        data = self._library.SSL_SESSION_get0_id_context(session, byref(length))
        return string_at(data, length.value) if length.value else b""

    def peer_seconds(self, session: int) -> float | None:
        """Return for how many seconds its peer's certificate is valid yet; None if it has none."""
        library = self._library
        peer = library.SSL_SESSION_get0_peer(session)
        if not peer:
            return None
        days, seconds = c_int(), c_int()
        if not library.ASN1_TIME_diff(byref(days), byref(seconds), None, library.X509_get0_notAfter(peer)):
            return 0.0
        return days.value * _SECONDS_PER_DAY + seconds.value
