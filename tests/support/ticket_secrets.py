"""Ticket secrets of a fleet, without a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resumed._crypto.fleet_key import FleetKey, Secret
from resumed._crypto.ticket_secret import Epoch, TicketSecret

if TYPE_CHECKING:
    from collections.abc import Sequence

ROTATION, LIFETIME = 100, 200
FLEET_KEY = FleetKey.of(Secret(b"k" * 32))


def secret_of(epoch: int, *, generation: int = 0, seed: int = 0) -> TicketSecret:
    """Return a secret of the epoch with a number, which begins at `epoch` times ROTATION."""
    at = Epoch(epoch * ROTATION, ROTATION, generation)
    return TicketSecret(
        "shop", FLEET_KEY, at, Secret(bytes([epoch, generation, seed] + [7] * 29)), at.start, at.not_after(LIFETIME)
    )


class Secrets:
    """The agreement of a fleet whose store always answers, unless `epochs` ends."""

    def __init__(self, epochs: Sequence[TicketSecret] = ()) -> None:
        self.epochs = list(epochs)
        self.steps = 0

    def step(self) -> float:
        """Count a step."""
        self.steps += 1
        return float(ROTATION)

    def held(self, now: float) -> list[TicketSecret]:
        """Return the secrets that have not ended."""
        return [each for each in self.epochs if now < each.not_after]

    def current(self, now: float) -> tuple[TicketSecret, bool] | None:
        """Return the secret that encrypts, and whether its epoch has ended."""
        begun = [each for each in self.held(now) if each.epoch.start <= now]
        latest = max(begun, key=lambda each: each.epoch, default=None)
        return (latest, latest.epoch.start + ROTATION <= now) if latest else None
