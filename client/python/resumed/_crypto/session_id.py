"""Sealed session ids: only the fleet can issue them, and only the fleet can read their issue time (protos/README.md).

sealed id = nonce (12) | AES-SIV(issue time: Unix seconds, 4, big endian), RFC 5297, under the 64-byte key
HKDF-SHA256(fleet key, salt = "", info = "resumed/v1 id"), with the one associated string namespace 00 nonce.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from resumed._crypto.derivation import derive

ID_BYTES = 32
"""Length of a sealed id: what OpenSSL allows at most for a session id (TLS 1.2, RFC 5246 section 7.4.1.2)."""
ID_NONCE_BYTES = 12


class SessionIds:
    """Seals and opens the session ids of one fleet key."""

    def __init__(self, fleet_key: bytes) -> None:
        self._siv = AESSIV(derive(fleet_key, 64, b"", b"resumed/v1 id"))

    def seal(self, namespace: bytes, issued: int, nonce: bytes) -> bytes:
        """Return the id of a session of `namespace` that is issued at `issued` (Unix seconds)."""
        return nonce + self._siv.encrypt(issued.to_bytes(4, "big"), [namespace + b"\0" + nonce])

    def open(self, namespace: bytes, session_id: bytes) -> int | None:
        """Return the issue time of an id in Unix seconds; None if this key did not seal it for `namespace`."""
        nonce = session_id[:ID_NONCE_BYTES]
        try:
            issued = self._siv.decrypt(session_id[ID_NONCE_BYTES:], [namespace + b"\0" + nonce])
        except InvalidTag:
            return None
        return int.from_bytes(issued, "big")
