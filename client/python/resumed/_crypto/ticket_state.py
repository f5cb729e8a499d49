"""The state in a ticket: the part of it that the fleet's rules need, beside the TLS session (protos/README.md).

OpenSSL keeps it as ticket application data: SSL_SESSION_set1_ticket_appdata(3).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NamedTuple

from resumed._policy.fingerprint import FINGERPRINT_BYTES

LINEAGE_BYTES = 16
"""Length of a lineage id: random, the same in all tickets that stem from one full handshake."""

_MARK = b"resumed\x03"
_TIME_BYTES = 8
_NAME_BYTES = 16
_STATE_BYTES = len(_MARK) + FINGERPRINT_BYTES + LINEAGE_BYTES + 2 * _TIME_BYTES + _NAME_BYTES


class TicketState(NamedTuple):
    """The state in a ticket."""

    fingerprint: bytes
    """The fingerprint of the context that negotiated its lineage: 32 bytes."""
    lineage: bytes
    """The id of its lineage: 16 bytes."""
    negotiated: float
    """When the full handshake of its lineage was, in Unix seconds."""
    end: int
    """When the lineage ends, in Unix seconds."""
    server_name: bytes
    """The hash_name() of the server name that the client asked for: 16 bytes."""

    def encode(self) -> bytes:
        """Return its 88 bytes."""
        times = (each.to_bytes(_TIME_BYTES, "big") for each in (int(self.negotiated * 1e6), self.end))
        return b"".join((_MARK, self.fingerprint, self.lineage, *times, self.server_name))

    @classmethod
    def decode(cls, data: bytes) -> TicketState | None:
        """Return the state in ticket application data; None if they are not ours."""
        if len(data) != _STATE_BYTES or not data.startswith(_MARK):
            return None
        lineage_at = len(_MARK) + FINGERPRINT_BYTES
        times_at = lineage_at + LINEAGE_BYTES
        name_at = times_at + 2 * _TIME_BYTES
        negotiated, end = (
            int.from_bytes(data[at : at + _TIME_BYTES], "big") for at in (times_at, times_at + _TIME_BYTES)
        )
        return cls(data[len(_MARK) : lineage_at], data[lineage_at:times_at], negotiated / 1e6, end, data[name_at:])


@lru_cache(1024)
def hash_name(name: bytes) -> bytes:
    """Return the hash of a server name in lower case; an empty name is that of a client that sent none."""
    return hashlib.sha256(b"resumed/v1 server name\0" + name).digest()[:_NAME_BYTES]
