"""Which ticket keys a TLS stack has, and which of them encrypts.

A key opens tickets everywhere before it encrypts anywhere. Instances switch to a new key at different moments, because
each reloads at its own, and an instance that lacks the key of a ticket makes a full handshake.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resumed._crypto.fleet_key import FleetKey, Secret
from resumed._crypto.ticket_secret import SECRET_BYTES, Epoch, TicketSecret

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class KeySet:
    """The keys of a namespace at one time.

    Attributes:
        encrypting: Encrypts new tickets, and opens tickets.
        openers: The others, newest first. They only open tickets; one of a later epoch encrypts next.
        temporary: Whether the only key is this agent's own, so that servers can start while the store does not answer.
    """

    encrypting: TicketSecret
    openers: tuple[TicketSecret, ...] = ()
    temporary: bool = False

    @property
    def all(self) -> tuple[TicketSecret, ...]:
        """All keys; the first encrypts."""
        return (self.encrypting, *self.openers)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all keys, in hexadecimal digits. A name is no secret: each ticket begins with one."""
        return tuple(key.name.hex() for key in self.all)

    @property
    def previous(self) -> TicketSecret:
        """The newest of the keys that encrypted before; the encrypting key if there is none."""
        return next((key for key in self.openers if _age(key) < _age(self.encrypting)), self.encrypting)

    @property
    def next(self) -> TicketSecret:
        """The key that encrypts next; the encrypting key while the fleet has not agreed on one."""
        later = [key for key in self.openers if _age(key) > _age(self.encrypting)]
        return later[-1] if later else self.encrypting


class KeySchedule:
    """Chooses the key that encrypts.

    Args:
        lead: Seconds for which a key opens tickets before it encrypts, from its publication and from the beginning of
            its epoch. By then the instances of other agents have it as well.
    """

    def __init__(self, lead: float) -> None:
        self._lead = lead
        self._published: dict[bytes, float] | None = None

    def choose(self, held: Sequence[TicketSecret], current: TicketSecret | None, now: float) -> KeySet | None:
        """Return the keys to publish, of the secrets of a fleet; None if there is none to encrypt with.

        Args:
            held: All secrets that have not ended.
            current: The secret with which frontends encrypt that need no lead.
            now: The time in Unix seconds.
        """
        if current is None:
            return None
        newest_first = sorted(held, key=_age, reverse=True)
        candidates = [current, *(key for key in newest_first if key.epoch.start <= current.epoch.start)]
        encrypting = next((key for key in candidates if self._ready_at(key) <= now), current)
        return KeySet(encrypting, tuple(key for key in newest_first if key.name != encrypting.name))

    def record(self, keys: KeySet, now: float) -> None:
        """Record that keys are published at a time, in Unix seconds."""
        # The keys of the first publication may have been published before, by an agent that this one replaces.
        since = now if self._published is not None else float("-inf")
        published = self._published or {}
        self._published = {key.name: published.get(key.name, since) for key in keys.all}

    def next_change(self, keys: KeySet, now: float) -> float:
        """Return the seconds until choose() may return other keys, without a change of the secrets."""
        moments = [moment for key in keys.all for moment in (self._ready_at(key), key.not_after) if moment > now]
        return min(moments, default=float("inf")) - now

    def _ready_at(self, key: TicketSecret) -> float:
        """Return when a key may encrypt: in Unix seconds, infinity before its first publication."""
        if self._published is None:
            return key.epoch.start + self._lead
        return max(key.epoch.start, self._published.get(key.name, float("inf"))) + self._lead


def create_temporary(namespace: str, now: float, rotation: int, lifetime: int) -> KeySet:
    """Return a key set of one random key that no other agent has."""
    epoch = Epoch.at(now, rotation)
    secret, fleet_key = Secret(os.urandom(SECRET_BYTES)), FleetKey.of(Secret(os.urandom(32)))
    return KeySet(TicketSecret(namespace, fleet_key, epoch, secret, now, epoch.not_after(lifetime)), temporary=True)


def _age(key: TicketSecret) -> tuple[int, int, float, bytes]:
    return (key.epoch.start, key.epoch.generation, key.created, key.name)
