"""Ticket secrets, from which the frontends of a fleet derive their ticket keys: one for each epoch (protos/README.md).

Time is cut into epochs of equal length. The secret of an epoch is agreed on through the store, where it is a
sealed value at an address that follows from the epoch.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from resumed._crypto.derivation import derive
from resumed._crypto.fleet_key import Secret
from resumed._crypto.store_key import StoreKeys
from resumed._exceptions import UnsealError

if TYPE_CHECKING:
    from resumed._crypto.fleet_key import FleetKey

SECRET_BYTES = 32
"""Length of a ticket secret."""
NAME_BYTES = 16
"""Length of a key name, with which each ticket begins."""
MAX_GENERATION = 255
"""Last generation of the secret of one epoch."""
MAX_ROTATION = 7 * 24 * 3600
"""Maximum length of an epoch, in seconds."""

_VERSION = b"\x01"
_START_BYTES, _ROTATION_BYTES, _TAG_BYTES, _MAC_BYTES = 4, 3, 4, 4
_EPOCH_BYTES = _START_BYTES + _ROTATION_BYTES + 1
_MAC_AT = NAME_BYTES - _MAC_BYTES
_TIME_BYTES = 8
_ENCODED_BYTES = 1 + _TIME_BYTES + SECRET_BYTES
_KEY_INFO = b"resumed/v1 ticket key\0"
_NAME_INFO = b"resumed/v1 ticket name"


class Epoch(NamedTuple):
    """An epoch, and one attempt to agree on its secret."""

    start: int
    """Its beginning, in Unix seconds: a multiple of `rotation`."""
    rotation: int
    """Its length in seconds: 1 to MAX_ROTATION."""
    generation: int = 0
    """0 to MAX_GENERATION; above 0 where the secret of an earlier generation cannot be opened, or was removed."""

    @classmethod
    def at(cls, now: float, rotation: int) -> Epoch:
        """Return the epoch of a time, given in Unix seconds."""
        return cls(int(now) // rotation * rotation, rotation)

    def encode(self) -> bytes:
        """Return its 8 bytes."""
        start = self.start.to_bytes(_START_BYTES, "big")
        return start + self.rotation.to_bytes(_ROTATION_BYTES, "big") + bytes([self.generation])

    @classmethod
    def decode(cls, encoded: bytes) -> Epoch:
        """Return the epoch of 8 bytes."""
        rotation_end = _START_BYTES + _ROTATION_BYTES
        start = int.from_bytes(encoded[:_START_BYTES], "big")
        return cls(start, int.from_bytes(encoded[_START_BYTES:rotation_end], "big"), encoded[rotation_end])

    def not_after(self, lifetime: int) -> int:
        """Return the time at which the secret is erased, in Unix seconds.

        It allows tickets of the epoch to live for `lifetime` seconds. It also allows for one further epoch, in which
        frontends whose clocks are behind, or that cannot reach the store, still encrypt with the secret.
        """
        return self.start + 2 * self.rotation + lifetime


@dataclass(frozen=True, repr=False, eq=False)
class TicketSecret:
    """The secret of an epoch. Has no repr of its own: it never shows in a log or a traceback.

    Attributes:
        namespace: The namespace of the fleet.
        fleet_key: The key of the fleet that seals it in the store.
        epoch: Its epoch.
        secret: 32 random bytes.
        created: When a frontend proposed it, in Unix seconds.
        not_after: When it is erased, in Unix seconds.
        prepared: The keys as each TLS library takes them, which exist as long as the secret.
    """

    namespace: str
    fleet_key: FleetKey
    epoch: Epoch
    secret: Secret
    created: float
    not_after: int
    prepared: dict[object, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the plaintext of its sealed value."""
        return _VERSION + int(self.created * 1e6).to_bytes(_TIME_BYTES, "big") + self.secret

    @classmethod
    def decode(cls, namespace: str, fleet_key: FleetKey, epoch: Epoch, encoded: bytes, not_after: int) -> TicketSecret:
        """Return the secret with that plaintext and not_after.

        Raises:
            UnsealError: The plaintext is malformed.
        """
        if len(encoded) != _ENCODED_BYTES or encoded[:1] != _VERSION:
            raise UnsealError("malformed")
        created = int.from_bytes(encoded[1 : 1 + _TIME_BYTES], "big") / 1e6
        return cls(namespace, fleet_key, epoch, Secret(encoded[1 + _TIME_BYTES :]), created, not_after)

    @cached_property
    def address(self) -> bytes:
        """The store key of its sealed value."""
        return address_of(self.namespace, self.fleet_key, self.epoch)

    @cached_property
    def name(self) -> bytes:
        """The name of its keys: 16 bytes, with which each of its tickets begins."""
        head = self.epoch.encode() + self._derive(b"tag", _TAG_BYTES)
        return head + _mac(self.fleet_key, self.namespace, head)

    @cached_property
    def openssl(self) -> bytes:
        """The keys of OpenSSL's tickets: name (16), HMAC-SHA256 (32), AES-256-CBC (32)."""
        return Secret(self.name + self._derive(b"openssl", 64))

    @cached_property
    def raw48(self) -> bytes:
        """The keys of shorter tickets: name (16), HMAC-SHA256 (16), AES-128-CBC (16)."""
        return Secret(self.name + self._derive(b"raw48", 32))

    @cached_property
    def aead(self) -> bytes:
        """The key of which the AES-256-GCM keys of tickets of Go and rustls are derived: 32 bytes."""
        return self._derive(b"aead32", 32)

    def _derive(self, form: bytes, length: int) -> Secret:
        return Secret(derive(self.secret, length, b"", _KEY_INFO + form))


def address_of(namespace: str, fleet_key: FleetKey, epoch: Epoch) -> bytes:
    """Return the store key of the secret of an epoch, sealed with a key of the fleet."""
    return StoreKeys(namespace, "ticket-secret").key(fleet_key.id + epoch.encode())


def epoch_of_name(namespace: str, fleet_key: FleetKey, name: bytes) -> Epoch | None:
    """Return the epoch in the name of a ticket's key; None if it was not named with this key of the fleet."""
    if len(name) != NAME_BYTES or not hmac.compare_digest(name[_MAC_AT:], _mac(fleet_key, namespace, name[:_MAC_AT])):
        return None
    return Epoch.decode(name[:_EPOCH_BYTES])


def _mac(fleet_key: FleetKey, namespace: str, head: bytes) -> bytes:
    key = derive(fleet_key.secret, 32, b"", _NAME_INFO)
    return hmac.digest(key, namespace.encode() + b"\0" + head, hashlib.sha256)[:_MAC_BYTES]
