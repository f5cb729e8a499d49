"""A namespace above its operation limit resumes in proportion, and opens no circuit breaker.

Frontends and clients are modelled, in a time of their own; breaker and state are the real ones.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from resumed._client.limits import BATCH_OPERATIONS
from resumed._policy.circuit_breaker import Breaker
from resumed._policy.write_queue import LONGEST_RETRY_SECONDS, RETRY_SECONDS
from resumed_server.limits.config import Limit
from resumed_server.limits.enforcer import LimitExceeded, LimitState, SharedCounters
from support.clock import Clock

CLIENTS, SECONDS = 200, 60
NEED = 80
"""Operations a second that resume every visit."""


@dataclass
class Session:
    """A session that a client offers: `issued` for lookups by the fleet, and possibly stored."""

    issued: bool
    stored: bool = False


@dataclass
class Frontend:
    """The parts of a frontend that call the server: SessionPolicy, Lookups and WriteQueue."""

    clock: Clock
    state: LimitState
    breaker: Breaker
    queue: deque[Session] = field(default_factory=deque)
    paused_until: float = 0.0
    retry: float = RETRY_SECONDS
    opened: int = 0

    def visit(self, offered: Session | None, *, tickets: bool) -> tuple[bool, Session]:
        """Return whether a client resumes, and its next session: with `tickets`, a new one each time."""
        resumed = False
        if offered and offered.issued and not self.breaker.rate_limited:
            resumed = self._look_up() and offered.stored
            if resumed and not tickets:
                return True, offered
        session = Session(issued=resumed or not self.breaker.scarce)
        if session.issued:
            self.queue.append(session)
        return resumed, session

    def send(self) -> None:
        if not self.queue or self.clock.now < self.paused_until:
            return
        batch = [self.queue[number] for number in range(min(len(self.queue), BATCH_OPERATIONS))]
        try:
            self.state.acquire(len(batch))
        except LimitExceeded:
            self.breaker.record_rate_limited()
            self.paused_until = self.clock.now + self.retry
            self.retry = min(2 * self.retry, LONGEST_RETRY_SECONDS)
            return
        self.retry = RETRY_SECONDS
        for session in batch:
            session.stored = True
            self.queue.popleft()

    def _look_up(self) -> bool:
        try:
            self.state.acquire(1)
        except LimitExceeded as error:
            if error.delay:  # until after the frontend's deadline
                self.breaker.failed(self.clock.now, late=True)
                self.opened += not self.breaker.closed
            else:
                self.breaker.record_rate_limited()
            return False
        self.breaker.succeeded()
        return True


@pytest.mark.parametrize("share", [0.4, 0.75, 0.9, 1.5])
@pytest.mark.parametrize("tickets", [False, True], ids=["TLS 1.2", "TLS 1.3"])
@pytest.mark.parametrize("frontends", [1, 4, 40])
def test_resumptions_are_in_proportion_to_the_limit(frontends: int, tickets: bool, share: float) -> None:
    """The simulation begins with a cold cache."""
    clock, chance = Clock(), random.Random(7)
    limit = Limit(namespaces=("shop",), operations_per_second=int(share * NEED))
    state = LimitState("shop", limit, SharedCounters.create(clock))
    fleet = [Frontend(clock, state, Breaker(clock=clock)) for _ in range(frontends)]
    clients: list[Session | None] = [None] * CLIENTS
    visits = NEED * SECONDS // (2 if tickets else 1)
    resumed = 0
    for visit in range(visits):
        clock.now += SECONDS / visits
        frontend, client = chance.choice(fleet), visit % CLIENTS
        hit, clients[client] = frontend.visit(clients[client], tickets=tickets)
        resumed += hit and visit > visits // 2
        for each in fleet:
            each.send()
    assert resumed / (visits / 2) > min(share, 1.0) - 0.15
    assert not any(each.opened for each in fleet)
