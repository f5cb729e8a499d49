"""Sealed values: the formats in which the store keeps sessions, by their first byte (protos/README.md).

- sealed = 02 | key id (4) | not_after (8, Unix seconds, big endian) | nonce (12) | AES-256-GCM(envelope), under the key
  HKDF-SHA256(fleet key, salt = store key, info = "resumed/v1 seal"), with the first 13 bytes and the store key as
  associated data. envelope.py describes the envelope.
- plaintext (only with Keyring.plaintext()) = 03 | not_after (8) | envelope.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from resumed._crypto.derivation import derive
from resumed._exceptions import UnsealError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resumed._crypto.fleet_key import FleetKey

_SEALED, _PLAINTEXT = b"\x02", b"\x03"
_NONCE_BYTES = 12
_TAG_BYTES = 16
_TIME_BYTES = 8
_KEY_ID = slice(1, 5)
_NOT_AFTER = slice(_KEY_ID.stop, _KEY_ID.stop + _TIME_BYTES)
_NONCE = slice(_NOT_AFTER.stop, _NOT_AFTER.stop + _NONCE_BYTES)


def seal(
    keys: Sequence[FleetKey], store_key: bytes, envelope: bytes, not_after: int, nonce: bytes | None = None
) -> bytes:
    """Return the value of an envelope, sealed with the first key; not sealed if there is no key.

    Args:
        keys: The keys of the fleet.
        store_key: The key under which the value will be stored.
        envelope: The encoded envelope.
        not_after: The end of the session's lifetime, in Unix seconds.
        nonce: 12 bytes for the vectors in protos/; random ones by default.
    """
    end = not_after.to_bytes(_TIME_BYTES, "big")
    if not keys:
        return _PLAINTEXT + end + envelope
    header, nonce = _SEALED + keys[0].id + end, nonce or os.urandom(_NONCE_BYTES)
    return header + nonce + _aead(keys[0], store_key).encrypt(nonce, envelope, header + store_key)


def unseal(keys: Sequence[FleetKey], store_key: bytes, sealed: bytes, now: float) -> tuple[bytes, int]:
    """Return the envelope of a value and its not_after.

    Raises:
        UnsealError: The value is malformed, sealed with an unknown key, past its not_after, or not authentic.
    """
    envelope, not_after = _decrypted(keys, store_key, sealed) if keys else _split_plaintext(sealed)
    if now >= not_after:
        del envelope  # or a traceback that has the values of variables shows it
        raise UnsealError("expired")
    return envelope, not_after


def _decrypted(keys: Sequence[FleetKey], store_key: bytes, sealed: bytes) -> tuple[bytes, int]:
    if not sealed.startswith(_SEALED) or len(sealed) < _NONCE.stop + _TAG_BYTES:
        raise UnsealError("malformed")
    key = next((key for key in keys if key.id == sealed[_KEY_ID]), None)
    if key is None:
        raise UnsealError("unknown-key")
    nonce, ciphertext, header = sealed[_NONCE], sealed[_NONCE.stop :], sealed[: _NONCE.start]
    try:
        envelope = _aead(key, store_key).decrypt(nonce, ciphertext, header + store_key)
    except InvalidTag:
        raise UnsealError("not-authentic") from None
    return envelope, int.from_bytes(sealed[_NOT_AFTER], "big")


def _split_plaintext(value: bytes) -> tuple[bytes, int]:
    envelope_at = 1 + _TIME_BYTES
    if not value.startswith(_PLAINTEXT) or len(value) < envelope_at:
        raise UnsealError("malformed")
    return value[envelope_at:], int.from_bytes(value[1:envelope_at], "big")


def _aead(key: FleetKey, store_key: bytes) -> AESGCM:
    # A key of its own for every session: the limit of GCM on the number of nonces is never reached.
    return AESGCM(derive(key.secret, 32, store_key, b"resumed/v1 seal"))
