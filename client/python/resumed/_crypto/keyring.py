"""Keyrings: the keys of a fleet, their file, and the values and ids that they seal and open."""

from __future__ import annotations

import base64
import binascii
import logging
import os
import stat
from typing import TYPE_CHECKING

from resumed._crypto.fleet_key import KEY_BYTES, FleetKey, Secret
from resumed._crypto.sealed_value import seal, unseal
from resumed._crypto.session_id import ID_BYTES, ID_NONCE_BYTES
from resumed._exceptions import KeyringError
from resumed._reload import Followed, Unreadable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resumed._reload import File

_log = logging.getLogger("resumed")


class Keyring:
    """The fleet's keys: the first one seals and issues ids, every one opens.

    Make one with load(), from_keys() or plaintext(). Thread-safe.
    """

    def __init__(self, keys: Sequence[FleetKey], file: Followed[tuple[FleetKey, ...]] | None = None) -> None:
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
        return cls([FleetKey.of(Secret(key)) for key in keys])

    @classmethod
    def plaintext(cls) -> Keyring:
        """Make a keyring that seals nothing: the store, and everything that can read it, sees every session's secrets.

        For experiments only. Ids are not sealed either, so every look-up reaches the store.
        """
        return cls([])

    @staticmethod
    def generate() -> str:
        """Return a fresh key as a line of a keyring file."""
        return base64.b64encode(os.urandom(KEY_BYTES)).decode()

    def __repr__(self) -> str:
        """Show the ids of the keys, never the keys."""
        ids = ", ".join(key.id.hex() for key in self.fleet_keys)
        return f"Keyring({ids or 'plaintext'})"

    @property
    def seals(self) -> bool:
        """Whether values and ids are sealed: True for every keyring but plaintext()."""
        return bool(self._keys)

    @property
    def fleet_keys(self) -> tuple[FleetKey, ...]:
        """The keys in the order of the file; none in plaintext()."""
        return self._file.latest() if self._file else self._keys

    @property
    def key_ids(self) -> list[str]:
        """The ids of the keys in the order of the file, as 8 hex digits: safe to show."""
        return [key.id.hex() for key in self.fleet_keys]

    @property
    def last_reload(self) -> tuple[bool, float] | None:
        """Whether the file can be used as it is now, and when it last could, in Unix seconds; None without a file."""
        if self._file is None:
            return None
        self._file.latest()
        return self._file.reload_succeeded, self._file.reloaded_at

    def seal(self, store_key: bytes, plaintext: bytes, not_after: int) -> bytes:
        """Seal a serialized session for the store.

        Args:
            store_key: The key under which it will be stored.
            plaintext: The serialized session.
            not_after: The end of its lifetime, in Unix seconds.
        """
        return seal(self.fleet_keys, store_key, plaintext, not_after)

    def open(self, store_key: bytes, sealed: bytes, now: float) -> tuple[bytes, int]:
        """Open the value that the store returned for `store_key`; return the serialized session and its not_after.

        Args:
            store_key: The key under which the value is stored.
            sealed: The value from the store: any bytes at all.
            now: The present, in Unix seconds.

        Raises:
            UnsealError: It is malformed, sealed with an unknown key, past its not_after, or not authentic.
        """
        return unseal(self.fleet_keys, store_key, sealed, now)

    def issue_id(self, namespace: str, now: float, nonce: bytes | None = None) -> bytes:
        """Return a new session id of 32 bytes; with plaintext() a random one.

        Args:
            namespace: The namespace it is issued for.
            now: The present, in Unix seconds.
            nonce: The 12 bytes that it begins with, never the same twice; random ones if they are not given.
        """
        keys = self.fleet_keys
        if not keys:
            return os.urandom(ID_BYTES)
        return keys[0].ids.seal(namespace.encode(), int(now), nonce or os.urandom(ID_NONCE_BYTES))

    def open_id(self, namespace: str, session_id: bytes) -> int | None:
        """Return when the fleet issued `session_id` for `namespace`, in Unix seconds, or None if it did not.

        Args:
            namespace: The namespace that the id must have been issued for.
            session_id: Any bytes at all.
        """
        if len(session_id) != ID_BYTES:
            return None
        name = namespace.encode()
        for key in self.fleet_keys:
            issued = key.ids.open(name, session_id)
            if issued is not None:
                return issued
        return None


def _log_change(keys: Sequence[FleetKey]) -> None:
    _log.info("keyring read again: %s", ", ".join(key.id.hex() for key in keys))


def _log_error(error: Exception) -> None:
    _log.error("keyring not read again, the keys read before stay: %s", error)


def _read_keys(file: File) -> tuple[FleetKey, ...]:
    secrets, problem = _parsed(file)  # whose variables, keys as text among them, are gone when something is raised
    if problem:
        raise KeyringError(f"keyring {file.path}{problem}")
    return tuple(map(FleetKey.of, secrets))


def _parsed(file: File) -> tuple[list[Secret], str]:
    """Return the keys of a file, or a description of its defect."""
    if file.mode & (stat.S_IRWXO | stat.S_IWGRP):
        return [], (
            f": others may read or change it (mode {file.mode:04o}); run `chmod 600 {file.path}`, or give a Kubernetes "
            "Secret `defaultMode: 0400` (0440 with an fsGroup)"
        )
    if file.owner not in {0, os.geteuid()} and os.geteuid():
        return [], f": another user owns it and may change it; run `chown {os.geteuid()} {file.path}`"
    secrets: list[Secret] = []
    for number, line in enumerate(file.content.splitlines(), 1):
        encoded = line.partition(b"#")[0].strip()
        if not encoded:
            continue
        try:
            secret = Secret(base64.b64decode(encoded, validate=True))
        except binascii.Error:
            secret = Secret()
        if len(secret) != KEY_BYTES:  # the line itself is not shown: it may be a key with one wrong character
            return [], f", line {number}: not a key (base64 of {KEY_BYTES} bytes)"
        secrets.append(secret)
    return secrets, "" if secrets else ": holds no key; make one with `resumed keygen`"
