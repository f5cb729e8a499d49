"""Fleet keys, from which all other keys are derived."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from resumed._crypto.session_id import SessionIds

KEY_BYTES = 32
"""Length of a fleet key."""


class Secret(bytes):
    """A key that does not show, not even in a traceback that has the values of variables."""

    def __repr__(self) -> str:
        """Hide the key."""
        return "<secret>"


@dataclass(frozen=True, slots=True, repr=False)
class FleetKey:
    """One key of a keyring. Has no repr of its own: a key never shows in a log or a traceback."""

    secret: Secret
    id: bytes
    """The first 4 bytes of its SHA-256; part of every value that it seals."""
    ids: SessionIds
    """Seals and opens session ids with it."""

    @classmethod
    def of(cls, secret: Secret) -> FleetKey:
        """Return the key with these 32 bytes."""
        return cls(secret, hashlib.sha256(secret).digest()[:4], SessionIds(secret))
