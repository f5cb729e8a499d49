"""Frontends that share tickets, inside the test's process."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from support.tls import Frontend
from support.waiting import until

if TYPE_CHECKING:
    from collections import Counter

    import resumed
    from support.tls import Stack


class TicketFrontend(Frontend):
    """A frontend that has the fleet's secrets and follows its removals; all its clients get tickets."""

    def __init__(self, stack: Stack, target: str, keyring: resumed.Keyring, **options: Any) -> None:
        super().__init__(stack, target, keyring, **{"sessions": "tickets", "tickets_tls12": True, **options})
        self.tickets = self.shim._policy.tickets
        self.await_ready()

    def await_ready(self) -> None:
        """Wait until tickets resume."""
        until(lambda: self.shim.removals_live and self.shim.ticket_secrets_held)

    @property
    def resumed(self) -> int:
        """How many tickets resumed."""
        count: int = self.shim.stats.tickets_resumed.total()
        return count

    @property
    def refused(self) -> Counter[str]:
        """Why tickets did not resume."""
        refused: Counter[str] = self.shim.stats.tickets_refused
        return refused

    def advance(self, seconds: float) -> None:
        """Set the clock of the policy forward."""
        policy = self.shim._policy
        for owner in (policy, policy.tickets, policy.tickets._secrets):
            owner._clock = lambda: time.time() + seconds
