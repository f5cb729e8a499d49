"""Store keys, keyrings, sealed values and sealed ids: what makes the store unable to learn or forge anything.

The format, the same in every language (protos/README.md, protos/vectors/):

- store key = SHA-256("resumed/v1" 00 format 00 namespace 00 session id). The id holds 256 random bits, so it cannot be
  inverted.
- sealed value = 02 | key id (4) | not_after (8, Unix seconds, big endian) | nonce (12) | AES-256-GCM(envelope), under
  the key HKDF-SHA256(fleet key, salt = store key, info = "resumed/v1 seal"), with the first 13 bytes and the store key
  as associated data. envelope.py says what is in the envelope.
- plaintext value (only with Keyring.plaintext()) = 03 | not_after (8) | envelope.
- sealed id = nonce (12) | AES-SIV(issue time: Unix seconds, 4, big endian), RFC 5297, under the 64-byte key
  HKDF-SHA256(fleet key, salt = "", info = "resumed/v1 id"), with the one associated string namespace 00 nonce.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from resumed._exceptions import KeyringError, UnsealError
from resumed._reload import Followed, Unreadable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resumed._reload import File

ID_BYTES = 32
"""Length of a sealed id: what OpenSSL allows at most for a session id (TLS 1.2, RFC 5246 section 7.4.1.2)."""
KEY_BYTES = 32
"""Length of a fleet key."""

_SEALED = b"\x02"
_PLAIN = b"\x03"
_NONCE_BYTES = 12
_HEADER_BYTES = 13  # version, key id, not_after
_TAG_BYTES = 16

_log = logging.getLogger("resumed")


class StoreKeys:
    """Turns the session ids of one namespace and serialization format into store keys.

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


class _Secret(bytes):
    """A key that does not show, not even in a traceback that has the values of variables."""

    def __repr__(self) -> str:
        """Say what it is only."""
        return "<secret>"


def _derive(fleet_key: bytes, length: int, salt: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), length, salt, info).derive(fleet_key)


@dataclass(frozen=True, slots=True, repr=False)
class _FleetKey:
    """One line of a keyring. Has no repr of its own: a key never shows in a log or a traceback."""

    secret: _Secret
    id: bytes
    ids: AESSIV

    @classmethod
    def of(cls, secret: _Secret) -> _FleetKey:
        return cls(secret, hashlib.sha256(secret).digest()[:4], AESSIV(_derive(secret, 64, b"", b"resumed/v1 id")))

    def seal(self, store_key: bytes, plaintext: bytes, not_after: int, nonce: bytes) -> bytes:
        header = _SEALED + self.id + not_after.to_bytes(8, "big")
        return header + nonce + self._aead(store_key).encrypt(nonce, plaintext, header + store_key)

    def open(self, store_key: bytes, sealed: bytes) -> bytes:
        nonce, ciphertext = sealed[_HEADER_BYTES : _HEADER_BYTES + _NONCE_BYTES], sealed[_HEADER_BYTES + _NONCE_BYTES :]
        return self._aead(store_key).decrypt(nonce, ciphertext, sealed[:_HEADER_BYTES] + store_key)

    def issue_id(self, namespace: bytes, issued: int, nonce: bytes) -> bytes:
        return nonce + self.ids.encrypt(issued.to_bytes(4, "big"), [namespace + b"\0" + nonce])

    def open_id(self, namespace: bytes, session_id: bytes) -> int | None:
        nonce = session_id[:_NONCE_BYTES]
        try:
            issued = self.ids.decrypt(session_id[_NONCE_BYTES:], [namespace + b"\0" + nonce])
        except InvalidTag:
            return None
        return int.from_bytes(issued, "big")

    def _aead(self, store_key: bytes) -> AESGCM:
        # A key of its own for every session: the nonce limit of GCM never binds.
        return AESGCM(_derive(self.secret, 32, store_key, b"resumed/v1 seal"))


class Keyring:
    """The fleet's keys: the first one seals and issues ids, every one opens.

    Make one with load(), from_keys() or plaintext(). Thread-safe.
    """

    def __init__(self, keys: Sequence[_FleetKey], file: Followed[tuple[_FleetKey, ...]] | None = None) -> None:
        self._keys, self._file = tuple(keys), file

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Keyring:
        """Read a keyring file: one key a line (base64 of 32 bytes), the first seals; # begins a comment.

        The file is read again when it changes, so that a key can be rotated while serving: a change is used once the
        file has looked the same in two looks, which are a second apart. A changed file that cannot be used is reported
        in the log and the keys read before stay.

        Raises:
            KeyringError: The file is missing or malformed, others than its owner and group may read it, or another user
                than this one and root owns it.
        """
        try:
            file = Followed([path], lambda files: _read_keys(files[0]), _log_change, _log_error)
        except Unreadable as error:
            raise KeyringError(f"keyring {path}: {error.reason}; make one with `resumed keygen {path}`") from None
        return cls(file.value, file)

    @classmethod
    def from_keys(cls, keys: Sequence[bytes]) -> Keyring:
        """Make a keyring of raw 32-byte keys, for those who keep their secrets elsewhere than in files.

        Raises:
            KeyringError: There is no key, or one does not have 32 bytes.
        """
        if not keys or any(len(key) != KEY_BYTES for key in keys):
            raise KeyringError(f"a keyring needs at least one key, each of {KEY_BYTES} bytes")
        return cls([_FleetKey.of(_Secret(key)) for key in keys])

    @classmethod
    def plaintext(cls) -> Keyring:
        """Make a keyring that seals nothing: the store, and whoever reads it, sees every session's secrets.

        For experiments only. Ids are not sealed either, so every look-up reaches the store.
        """
        return cls([])

    @staticmethod
    def generate() -> str:
        """Return a fresh key as a line of a keyring file."""
        return base64.b64encode(os.urandom(KEY_BYTES)).decode()

    def __repr__(self) -> str:
        """Show the ids of the keys, never the keys."""
        ids = ", ".join(key.id.hex() for key in self._current())
        return f"Keyring({ids or 'plaintext'})"

    @property
    def seals(self) -> bool:
        """Whether values and ids are sealed: True for every keyring but plaintext()."""
        return bool(self._keys)

    @property
    def key_ids(self) -> list[str]:
        """The ids of the keys in the order of the file, as 8 hex digits: safe to show."""
        return [key.id.hex() for key in self._current()]

    def seal(self, store_key: bytes, plaintext: bytes, not_after: int) -> bytes:
        """Seal a serialized session for the store.

        Args:
            store_key: The key under which it will be stored.
            plaintext: The serialized session.
            not_after: When its life ends, in Unix seconds.
        """
        keys = self._current()
        if not keys:
            return _PLAIN + not_after.to_bytes(8, "big") + plaintext
        return keys[0].seal(store_key, plaintext, not_after, os.urandom(_NONCE_BYTES))

    def open(self, store_key: bytes, sealed: bytes, now: float) -> tuple[bytes, int]:
        """Open what the store returned for `store_key`; return the serialized session and its not_after.

        Args:
            store_key: The key it was asked for.
            sealed: The value from the store: any bytes at all.
            now: The present, in Unix seconds.

        Raises:
            UnsealError: It is malformed, sealed with an unknown key, past its not_after, or not authentic.
        """
        keys = self._current()
        if not keys:
            if sealed[:1] != _PLAIN or len(sealed) < 9:  # noqa: PLR2004  # version and not_after
                raise UnsealError("malformed")
            plaintext, not_after = sealed[9:], int.from_bytes(sealed[1:9], "big")
        else:
            if sealed[:1] != _SEALED or len(sealed) < _HEADER_BYTES + _NONCE_BYTES + _TAG_BYTES:
                raise UnsealError("malformed")
            key = next((key for key in keys if key.id == sealed[1:5]), None)
            if key is None:
                raise UnsealError("unknown-key")
            try:
                plaintext = key.open(store_key, sealed)
            except InvalidTag:
                raise UnsealError("not-authentic") from None
            not_after = int.from_bytes(sealed[5:_HEADER_BYTES], "big")
        if now >= not_after:
            del plaintext  # or a traceback that has the values of variables shows it
            raise UnsealError("expired")
        return plaintext, not_after

    def issue_id(self, namespace: str, now: float, nonce: bytes | None = None) -> bytes:
        """Return a new session id of 32 bytes; with plaintext() a random one.

        Args:
            namespace: The namespace it is issued for.
            now: The present, in Unix seconds.
            nonce: The 12 bytes that it begins with, never the same twice; random ones if they are not given.
        """
        keys = self._current()
        if not keys:
            return os.urandom(ID_BYTES)
        return keys[0].issue_id(namespace.encode(), int(now), nonce or os.urandom(_NONCE_BYTES))

    def open_id(self, namespace: str, session_id: bytes) -> int | None:
        """Return when the fleet issued `session_id` for `namespace`, in Unix seconds, or None if it did not.

        Args:
            namespace: The namespace that the id must have been issued for.
            session_id: Any bytes at all.
        """
        if len(session_id) != ID_BYTES:
            return None
        name = namespace.encode()
        for key in self._current():
            issued = key.open_id(name, session_id)
            if issued is not None:
                return issued
        return None

    def _current(self) -> tuple[_FleetKey, ...]:
        return self._file.latest() if self._file else self._keys


def _log_change(keys: Sequence[_FleetKey]) -> None:
    _log.info("keyring read again: %s", ", ".join(key.id.hex() for key in keys))


def _log_error(error: Exception) -> None:
    _log.error("keyring not read again, the keys read before stay: %s", error)


def _read_keys(file: File) -> tuple[_FleetKey, ...]:
    secrets, problem = _parsed(file)  # whose variables, keys as text among them, are gone when something is raised
    if problem:
        raise KeyringError(f"keyring {file.path}{problem}")
    return tuple(map(_FleetKey.of, secrets))


def _parsed(file: File) -> tuple[list[_Secret], str]:
    """Return the keys of a file, or what is wrong with it."""
    if file.mode & (stat.S_IRWXO | stat.S_IWGRP):
        return [], (
            f": others may read or change it (mode {file.mode:04o}); run `chmod 600 {file.path}`, or give a Kubernetes "
            "Secret `defaultMode: 0400` (0440 with an fsGroup)"
        )
    if file.owner not in {0, os.geteuid()} and os.geteuid():
        return [], f": another user owns it, who may change it; run `chown {os.geteuid()} {file.path}`"
    secrets: list[_Secret] = []
    for number, line in enumerate(file.content.splitlines(), 1):
        encoded = line.partition(b"#")[0].strip()
        if not encoded:
            continue
        try:
            secret = _Secret(base64.b64decode(encoded, validate=True))
        except binascii.Error:
            secret = _Secret()
        if len(secret) != KEY_BYTES:  # the line itself is not shown: it may be a key with one wrong character
            return [], f", line {number}: not a key (base64 of {KEY_BYTES} bytes)"
        secrets.append(secret)
    return secrets, "" if secrets else ": holds no key; make one with `resumed keygen`"
