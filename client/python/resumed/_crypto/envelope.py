"""The envelope: the plaintext of a sealed value, a session with its context fingerprint and issue time.

envelope = context fingerprint (32) | issue time (8, microseconds after the Unix epoch, big endian) | session. See
protos/README.md.
"""

from __future__ import annotations

from typing import NamedTuple

from resumed._exceptions import UnsealError
from resumed._policy.fingerprint import FINGERPRINT_BYTES

_SESSION_AT = FINGERPRINT_BYTES + 8


class Envelope(NamedTuple):
    """A session as it is sealed."""

    fingerprint: bytes
    """The fingerprint of the context that negotiated it: 32 bytes."""
    issued: float
    """When the full handshake was, in Unix seconds."""
    session: bytes
    """The serialized session."""

    def encode(self) -> bytes:
        """Return its bytes."""
        return self.fingerprint + int(self.issued * 1e6).to_bytes(8, "big") + self.session

    @classmethod
    def decode(cls, encoded: bytes) -> Envelope:
        """Return the envelope of bytes that were authentic.

        Raises:
            UnsealError: They are too short.
        """
        if len(encoded) < _SESSION_AT:
            raise UnsealError("malformed")
        issued = int.from_bytes(encoded[FINGERPRINT_BYTES:_SESSION_AT], "big") / 1e6
        return cls(encoded[:FINGERPRINT_BYTES], issued, encoded[_SESSION_AT:])
