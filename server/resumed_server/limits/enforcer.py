"""Budgets: what is left of the limits, and whose they are.

Rates are counted for all processes of a server together, in memory that they share from the fork on. No lock guards it:
two that count at the same moment may count one operation instead of two, which lets a little more through, never less.
"""

from __future__ import annotations

import mmap
import os
import random
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from resumed_server.limits.config import Limit
from resumed_server.limits.usage_counters import ENTRY_BYTES, Tallies, Tally, hashed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


BURST_SECONDS = 1.0
"""How much of a rate may be spent at once. A call that begins within it is carried out whole."""
LEAST_REFUSALS_PER_SECOND = 100
"""How often a budget may be refused at once; or as often as it may be spent, if that is more. Further refusals wait.

Frontends must hear of a refusal within the deadline of a handshake, or it is an outage to them.
"""
LONGEST_HOLD = 20.0
"""Seconds that a refusal is held back, at most."""

_SLOTS = 1 << 13
_TRIED = 8
_MOST_REMEMBERED = 4_096


class LimitExceeded(Exception):
    """A limit is used up.

    Attributes:
        of: Whose limit: an identity, or the namespaces that it is for.
        rule: For whom the limit was made: a pattern of the grants file, or nothing for each namespace.
        limit: Which one, as the grants file calls it.
        retry: Seconds after which another call may succeed; None if time alone does not help.
        hold: Seconds for which the answer should be held back, so that whoever does not heed it gains nothing.
    """

    def __init__(self, of: str, rule: Limit, limit: str, *, retry: float | None = None, hold: float = 0.0) -> None:
        super().__init__(f"{of} is at its limit of {getattr(rule, limit)} {limit.replace('_', ' ')}")
        self.of = of
        self.rule = rule.identity or ", ".join(rule.namespaces)
        self.limit = limit
        self.retry = retry
        self.hold = hold


class Rates:
    """The memory in which rates are counted: for each name, when all that was spent is earned again.

    It has more slots than there will be names that spend at the same time. The slot of a name that has earned
    everything again says nothing any more, and is given to another.

    Args:
        clock: Seconds that only go forward, the same for all processes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._key = os.urandom(16)
        memory = memoryview(mmap.mmap(-1, 16 * _SLOTS))  # anonymous, and shared with whatever is forked
        self.names, self.earned_at = memory[: 8 * _SLOTS].cast("Q"), memory[8 * _SLOTS :].cast("d")

    def number(self, name: str) -> int:
        """Return what a name is called here."""
        return hashed(name, self._key)

    def slot(self, name: int) -> int:
        """Return the slot of a name; find one if it has none."""
        slots = [(name + step) % _SLOTS for step in range(_TRIED)]
        now = self.clock()
        for slot in slots:
            if self.names[slot] == name:
                return slot
        for slot in slots:
            if self.earned_at[slot] <= now:
                self.names[slot] = name
                return slot
        return slots[0]  # and spends together with another; but thousands would have to be busy


class Shared(NamedTuple):
    """The memory in which the processes of a server count together; to be made before the fork."""

    rates: Rates
    tallies: Tallies

    @classmethod
    def fresh(cls, clock: Callable[[], float] = time.monotonic) -> Shared:
        """Return memory in which nothing is counted; `clock` counts seconds that only go forward."""
        return cls(Rates(clock), Tallies())


class Rate:
    """So much a second, for whoever has `name`."""

    def __init__(self, rates: Rates, name: str, per_second: float) -> None:
        self._rates, self._interval = rates, 1 / per_second
        self._name = rates.number(name)
        self._slot = 0

    def spend(self, amount: int) -> float:
        """Spend `amount` and return 0, or spend nothing and return the seconds until there is something to spend."""
        rates, slot = self._rates, self._slot
        if rates.names[slot] != self._name:
            slot = self._slot = rates.slot(self._name)
        now, earned_at = rates.clock(), rates.earned_at[slot]
        if earned_at < now:
            earned_at = now
        elif earned_at - now > BURST_SECONDS:
            return earned_at - now - BURST_SECONDS
        rates.earned_at[slot] = earned_at + amount * self._interval
        return 0.0

    def reserve(self, longest: float) -> float:
        """Spend 1 even if there is nothing, and return in how many seconds there is; at most `longest`."""
        wait = self.spend(1)
        if not wait:
            return 0.0
        latest = self._rates.clock() + BURST_SECONDS + longest
        slot = self._slot
        self._rates.earned_at[slot] = min(self._rates.earned_at[slot] + self._interval, latest)
        return min(wait, longest)


class Budget:
    """What is left of one limit.

    Args:
        name: Whose it is.
        limit: The limit.
        shared: Where it is counted.
    """

    def __init__(self, name: str, limit: Limit, shared: Shared) -> None:
        rates = shared.rates
        self.name, self.limit = name, limit
        kind = "identity" if limit.identity else "namespaces"
        per_second = limit.operations_per_second
        self._rate = Rate(rates, f"{kind} {name}", per_second) if per_second else None
        refusals = max(LEAST_REFUSALS_PER_SECOND, per_second or 0)
        self._refusals = Rate(rates, f"refused {kind} {name}", refusals)
        self.tally = Tally(shared.tallies, name) if limit.limits_sizes else None
        """What there is; None if that has no limit."""

    def spend(self, operations: int) -> None:
        """Count operations that a call asks for.

        Raises:
            LimitExceeded: There were too many of late; none was counted.
        """
        if self._rate and (wait := self._rate.spend(operations)):
            raise self._exceeded("operations_per_second", retry=wait)

    def admit_entry(self, size: int) -> None:
        """Count a session with a value of so many bytes, or (0) a tombstone.

        Raises:
            LimitExceeded: There is no room for it; it was not counted.
        """
        tally, limit = self.tally, self.limit
        if not tally:
            return
        if limit.sessions is not None and tally.sessions >= limit.sessions:
            raise LimitExceeded(self.name, limit, "sessions")
        if limit.bytes is not None and tally.bytes + size + ENTRY_BYTES > limit.bytes:
            raise LimitExceeded(self.name, limit, "bytes")
        tally.add(size)

    def return_entry(self, size: int) -> None:
        """Count an entry no more that was admitted, but not made."""
        if self.tally:
            self.tally.subtract(size)

    def admit_watcher(self, present: int) -> None:
        """Return if there may be one more watcher than are `present`.

        Raises:
            LimitExceeded: There may not.
        """
        if self.limit.watchers is not None and present >= self.limit.watchers:
            raise self._exceeded("watchers")

    def _exceeded(self, name: str, retry: float | None = None) -> LimitExceeded:
        # Spread, or all that are held back would come back at the same moment, and others would wait behind them.
        hold = self._refusals.reserve(LONGEST_HOLD) * random.uniform(0.5, 1.0)  # noqa: S311 - nobody gains by a guess
        return LimitExceeded(self.name, self.limit, name, retry=retry, hold=hold)


class Limits(Protocol):
    """The content of a file that has limits."""

    @property
    def limits(self) -> Sequence[Limit]:
        """The limits, in their order: the first that applies counts."""


class LimitsFile(Protocol):
    """A file that is read again when it changes."""

    @property
    def value(self) -> Limits:
        """Its content: the same object as long as the file stays as it is."""


class Budgets:
    """All budgets of a server.

    Args:
        defaults: The limits of each namespace for which the grants have none.
        grants: The grants, with their limits, if there are any.
        shared: Where they are counted.
    """

    def __init__(
        self, defaults: Limit | None = None, grants: LimitsFile | None = None, shared: Shared | None = None
    ) -> None:
        self._defaults = defaults if defaults and defaults != Limit() else None
        self._followed, self._shared = grants, shared or Shared.fresh()
        self._known: tuple[Limits | None, dict[str, Budget | None]] = (None, {})

    @property
    def limit_sizes(self) -> bool:
        """Whether there is any limit on what there may be."""
        limits = self._followed.value.limits if self._followed else ()
        return any(limit.limits_sizes for limit in (*limits, self._defaults) if limit)

    def of_identities(self, identities: Sequence[str]) -> Budget | None:
        """Return the budget of who has these identities, if they have a limit."""
        for limit in self._followed.value.limits if self._followed else ():
            for identity in identities:
                if limit.names(identity):
                    return Budget(identity, limit, self._shared)
        return None

    def of_namespace(self, namespace: str) -> Budget | None:
        """Return the budget that a namespace has, by itself or together with others; None if it has no limit."""
        grants = self._followed.value if self._followed else None
        if not self._defaults and not (grants and grants.limits):
            return None
        known = self._known
        if known[0] is not grants:
            known = self._known = (grants, {})
        budgets = known[1]
        if namespace not in budgets:
            if len(budgets) >= _MOST_REMEMBERED:
                budgets.clear()
            budgets[namespace] = self._found(namespace, grants.limits if grants else ())
        return budgets[namespace]

    def _found(self, namespace: str, limits: Sequence[Limit]) -> Budget | None:
        for limit in limits:
            if limit.covers(namespace):
                return Budget(", ".join(limit.namespaces), limit, self._shared)
        return Budget(namespace, self._defaults, self._shared) if self._defaults else None
