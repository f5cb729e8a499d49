"""Store keys: the keys under which sessions are stored, derived from their ids (protos/README.md).

store key = SHA-256("resumed/v1" 00 format 00 namespace 00 session id). The id holds 256 random bits, so the store
cannot compute it from the key.
"""

from __future__ import annotations

import hashlib


class StoreKeys:
    """Derives store keys from the session ids of one namespace and serialization format.

    Args:
        namespace: The namespace of the sessions.
        serialization: The format of the stored sessions: `openssl`, `go` or `rustls`.
    """

    def __init__(self, namespace: str, serialization: str = "openssl") -> None:
        self._prefix = hashlib.sha256(b"\0".join((b"resumed/v1", serialization.encode(), namespace.encode(), b"")))

    def key(self, session_id: bytes) -> bytes:
        """Return the 32-byte store key of `session_id`."""
        digest = self._prefix.copy()
        digest.update(session_id)
        return digest.digest()
