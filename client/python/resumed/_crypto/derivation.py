"""Derivation of the fleet's working keys from a fleet key: HKDF with SHA-256 (RFC 5869)."""

from __future__ import annotations

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


def derive(fleet_key: bytes, length: int, salt: bytes, info: bytes) -> bytes:
    """Return a key of `length` bytes."""
    return HKDF(SHA256(), length, salt, info).derive(fleet_key)
