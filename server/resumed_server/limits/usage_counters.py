"""Quotas: how much there is in namespaces whose sessions or bytes are limited.

A tombstone counts as the session whose place it takes: it takes room as long as that would, and nothing else bounds it.

One process of a server counts what the engine holds, now and then, and all add what they let in meanwhile, in memory
that they share from the fork on. So a count is never less than what there is but for Puts at the very same moment, and
what expires or is removed is noticed by the next one.
"""

from __future__ import annotations

import mmap
import os
import time
from collections import defaultdict
from hashlib import blake2b
from typing import TYPE_CHECKING

from resumed_server.periodic import Periodic

if TYPE_CHECKING:
    from resumed_server.limits.enforcer import Budgets
    from resumed_server.storage.engine import Engine

COUNT_SECONDS = 10.0
"""Seconds from one count to the next."""
COUNT_SHARE = 20
"""How many times as long as a count took, at least, it is not repeated."""
ENTRY_BYTES = 256
"""What each session and each tombstone counts for beside its value: about what an engine keeps there (engines.md)."""

_SLOTS = 1 << 13
_TRIED = 8
_KEY_BYTES = 16


def hashed(name: str, key: bytes) -> int:
    """Return a number for a name that nobody without the key can choose names by: they would share a victim's slots."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8, key=key).digest(), "big")


class Tallies:
    """The memory in which sessions and bytes are counted, by name."""

    def __init__(self) -> None:
        self._key = os.urandom(_KEY_BYTES)
        memory = memoryview(mmap.mmap(-1, 24 * _SLOTS))  # anonymous, and shared with whatever is forked
        third = 8 * _SLOTS
        self.names = memory[:third].cast("Q")
        self.sessions, self.bytes = memory[third : 2 * third].cast("q"), memory[2 * third :].cast("q")

    def number(self, name: str) -> int:
        """Return what a name is called here."""
        return hashed(name, self._key)

    def slot(self, name: int) -> int | None:
        """Return the slot of a name, if it has one."""
        return next((slot for slot in self._slots(name) if self.names[slot] == name), None)

    def new_slot(self, name: int) -> int:
        """Return the slot of a name; give it one if it has none."""
        slots = self._slots(name)
        for wanted in (name, 0):
            for slot in slots:
                if self.names[slot] == wanted:
                    self.names[slot] = name
                    return slot
        return slots[0]  # and is counted together with another; but thousands would have to be limited

    def replace(self, counted: dict[int, tuple[int, int]], before: dict[int, tuple[int, int]]) -> None:
        """Take over a count: what was added since `before`, a snapshot from when it began, is added to it.

        Names of which nothing is left lose their slots.
        """
        for name in counted:
            self.new_slot(name)
        for slot, name in enumerate(self.names):
            if name:
                sessions, size = counted.get(name, (0, 0))
                sessions_before, size_before = before.get(name, (0, 0))
                self.sessions[slot] = sessions + self.sessions[slot] - sessions_before
                self.bytes[slot] = size + self.bytes[slot] - size_before
                if not self.sessions[slot] and name in before:
                    self.names[slot] = self.bytes[slot] = 0

    def snapshot(self) -> dict[int, tuple[int, int]]:
        """Return all that is counted at present."""
        return {name: (self.sessions[slot], self.bytes[slot]) for slot, name in enumerate(self.names) if name}

    @staticmethod
    def _slots(name: int) -> list[int]:
        return [(name + step) % _SLOTS for step in range(_TRIED)]


class Tally:
    """What there is of the namespaces of `name`."""

    def __init__(self, tallies: Tallies, name: str) -> None:
        self._tallies = tallies
        self.name = tallies.number(name)

    @property
    def sessions(self) -> int:
        """Sessions and tombstones that there are."""
        slot = self._tallies.slot(self.name)
        return 0 if slot is None else self._tallies.sessions[slot]

    @property
    def bytes(self) -> int:
        """What they count for: their values, and ENTRY_BYTES each."""
        slot = self._tallies.slot(self.name)
        return 0 if slot is None else self._tallies.bytes[slot]

    def add(self, size: int) -> None:
        """Count an entry with a value of so many bytes."""
        slot = self._tallies.new_slot(self.name)
        self._tallies.sessions[slot] += 1
        self._tallies.bytes[slot] += size + ENTRY_BYTES

    def subtract(self, size: int) -> None:
        """Count such an entry no more."""
        slot = self._tallies.new_slot(self.name)
        self._tallies.sessions[slot] -= 1
        self._tallies.bytes[slot] -= size + ENTRY_BYTES


class Counting(Periodic):
    """Counts what the engine holds, in a thread, as long as anything is limited by what there is."""

    def __init__(self, engine: Engine, budgets: Budgets, tallies: Tallies) -> None:
        super().__init__("quotas", self._step, "sessions cannot be counted", retry=COUNT_SECONDS)
        self._engine, self._budgets, self._tallies = engine, budgets, tallies

    def count(self) -> None:
        """Count once, if anything is limited."""
        if not self._budgets.limit_sizes:
            return
        before = self._tallies.snapshot()
        counted: defaultdict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for namespace, usage in self._engine.usage(None).items():
            budget = self._budgets.of_namespace(namespace)
            if budget and budget.tally:
                entries, size = counted[budget.tally.name]
                more = usage.sessions + usage.tombstones
                counted[budget.tally.name] = entries + more, size + usage.value_bytes + more * ENTRY_BYTES
        self._tallies.replace(counted, before)

    def _step(self) -> float:
        started = time.monotonic()
        self.count()
        return max(COUNT_SECONDS, COUNT_SHARE * (time.monotonic() - started))
