"""Sealed values: the formats in which the store keeps sessions, by their first byte (protos/README.md).

- sealed = 02 | key id (4) | not_after (8, Unix seconds, big endian) | nonce (12) | AES-256-GCM(envelope), under the key
  HKDF-SHA256(fleet key, salt = store key, info = "resumed/v1 seal"), with the first 13 bytes and the store key as
  associated data. envelope.py describes the envelope.
- plaintext (only with Keyring.plaintext()) = 03 | not_after (8) | envelope.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from resumed._crypto.derivation import derive
from resumed._exceptions import UnsealError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resumed._crypto.fleet_key import FleetKey

_KEY_ID = slice(1, 5)
_NONCE_BYTES = 12
_TAG_BYTES = 16
_TIME_BYTES = 8


class ValueFormat(Protocol):
    """A version of sealed values."""

    needs_keys: bool
    """Whether it is opened with keys of the fleet; a keyring opens no other format."""

    def open(self, keys: Sequence[FleetKey], store_key: bytes, sealed: bytes) -> tuple[bytes, int]:
        """Return the envelope and its not_after; raise UnsealError for bytes that the fleet did not seal."""


class _Sealed:
    version = b"\x02"
    needs_keys = True
    _not_after = slice(_KEY_ID.stop, _KEY_ID.stop + _TIME_BYTES)
    _nonce = slice(_not_after.stop, _not_after.stop + _NONCE_BYTES)

    def seal(self, key: FleetKey, store_key: bytes, envelope: bytes, not_after: int, nonce: bytes) -> bytes:
        header = self.version + key.id + not_after.to_bytes(_TIME_BYTES, "big")
        return header + nonce + self._aead(key, store_key).encrypt(nonce, envelope, header + store_key)

    def open(self, keys: Sequence[FleetKey], store_key: bytes, sealed: bytes) -> tuple[bytes, int]:
        if len(sealed) < self._nonce.stop + _TAG_BYTES:
            raise UnsealError("malformed")
        key = next((key for key in keys if key.id == sealed[_KEY_ID]), None)
        if key is None:
            raise UnsealError("unknown-key")
        nonce, ciphertext = sealed[self._nonce], sealed[self._nonce.stop :]
        header = sealed[: self._nonce.start]
        try:
            envelope = self._aead(key, store_key).decrypt(nonce, ciphertext, header + store_key)
        except InvalidTag:
            raise UnsealError("not-authentic") from None
        return envelope, int.from_bytes(sealed[self._not_after], "big")

    @staticmethod
    def _aead(key: FleetKey, store_key: bytes) -> AESGCM:
        # A key of its own for every session: the limit of GCM on the number of nonces is never reached.
        return AESGCM(derive(key.secret, 32, store_key, b"resumed/v1 seal"))


class _Plaintext:
    version = b"\x03"
    needs_keys = False
    _not_after = slice(1, 1 + _TIME_BYTES)

    def seal(self, envelope: bytes, not_after: int) -> bytes:
        return self.version + not_after.to_bytes(_TIME_BYTES, "big") + envelope

    def open(self, _keys: Sequence[FleetKey], _store_key: bytes, sealed: bytes) -> tuple[bytes, int]:
        if len(sealed) < self._not_after.stop:
            raise UnsealError("malformed")
        return sealed[self._not_after.stop :], int.from_bytes(sealed[self._not_after], "big")


_sealed, _plaintext = _Sealed(), _Plaintext()
FORMATS: dict[bytes, ValueFormat] = {_Sealed.version: _sealed, _Plaintext.version: _plaintext}
"""The formats that can be opened, by their first byte."""


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
    if not keys:
        return _plaintext.seal(envelope, not_after)
    return _sealed.seal(keys[0], store_key, envelope, not_after, nonce or os.urandom(_NONCE_BYTES))


def unseal(keys: Sequence[FleetKey], store_key: bytes, sealed: bytes, now: float) -> tuple[bytes, int]:
    """Return the envelope of a value and its not_after.

    Raises:
        UnsealError: The value is malformed, sealed with an unknown key, past its not_after, or not authentic.
    """
    version = FORMATS.get(sealed[:1])
    if version is None or version.needs_keys != bool(keys):
        raise UnsealError("malformed")
    envelope, not_after = version.open(keys, store_key, sealed)
    if now >= not_after:
        del envelope  # or a traceback that has the values of variables shows it
        raise UnsealError("expired")
    return envelope, not_after
