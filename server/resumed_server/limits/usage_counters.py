"""Counters of sessions and bytes, for namespaces whose sessions or bytes are limited.

A tombstone counts as the session that it replaces: it occupies its space for as long, and nothing else bounds it.

One process of a server recounts the entries of the engine periodically. Between two counts, all processes add the
entries that they admit, in shared memory. So a counter is never below the number of entries, except for Puts at the
same moment, and the next count subtracts the entries that were removed or have expired.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING

from resumed_server.limits.shared_slots import SharedSlots
from resumed_server.periodic import PeriodicTask

if TYPE_CHECKING:
    from resumed_server.limits.enforcer import LimitEnforcer
    from resumed_server.storage.engine import Engine

RECOUNT_SECONDS = 10.0
"""Seconds from one count to the next."""
MIN_PAUSE_FACTOR = 20
"""Minimum pause between counts, as a multiple of the duration of the last one."""
ENTRY_BYTES = 256
"""Bytes that each session and tombstone counts in addition to its value: about the overhead in an engine."""


class UsageCounters:
    """The counters of all names, in memory that forked processes share."""

    def __init__(self) -> None:
        self._slots = SharedSlots("qq")
        self._entries, self._bytes = self._slots.columns

    def hash_name(self, name: str) -> int:
        """Return the hash by which the other methods identify a name."""
        return self._slots.hash_name(name)

    def read(self, name: int) -> tuple[int, int]:
        """Return the entries and bytes of a name."""
        slot = self._slots.find(name)
        return (0, 0) if slot is None else (self._entries[slot], self._bytes[slot])

    def add(self, name: int, entries: int, size: int) -> None:
        """Add to the entries and bytes of a name."""
        slot = self._claim(name)
        self._entries[slot] += entries
        self._bytes[slot] += size

    def snapshot(self) -> dict[int, tuple[int, int]]:
        """Return the entries and bytes of each name."""
        names = enumerate(self._slots.names)
        return {name: (self._entries[slot], self._bytes[slot]) for slot, name in names if name}

    def replace(self, counted: dict[int, tuple[int, int]], before: dict[int, tuple[int, int]]) -> None:
        """Replace the counters by a count, plus the entries added since `before`, a snapshot from its beginning.

        A name without entries loses its slot.
        """
        for name in counted:
            self._claim(name)
        names = self._slots.names
        for slot, name in enumerate(names):
            if name:
                entries, size = counted.get(name, (0, 0))
                entries_before, size_before = before.get(name, (0, 0))
                self._entries[slot] += entries - entries_before
                self._bytes[slot] += size - size_before
                if not self._entries[slot] and name in before:
                    names[slot] = self._bytes[slot] = 0

    def _claim(self, name: int) -> int:
        return self._slots.claim(name, lambda slot: not self._slots.names[slot])


class UsageCounter:
    """The entries and bytes of the namespaces that a limit, called `name`, counts together."""

    def __init__(self, counters: UsageCounters, name: str) -> None:
        self._counters = counters
        self.name = counters.hash_name(name)

    @property
    def entries(self) -> int:
        """Number of sessions and tombstones."""
        return self._counters.read(self.name)[0]

    @property
    def bytes(self) -> int:
        """Bytes of their values, plus ENTRY_BYTES each."""
        return self._counters.read(self.name)[1]

    def add(self, size: int) -> None:
        """Add an entry whose value has `size` bytes."""
        self._counters.add(self.name, 1, size + ENTRY_BYTES)

    def subtract(self, size: int) -> None:
        """Subtract an entry whose value has `size` bytes."""
        self._counters.add(self.name, -1, -size - ENTRY_BYTES)


class UsageRecounter(PeriodicTask):
    """Recounts the entries of the engine in a thread, while any limit is one of sessions or bytes."""

    def __init__(self, engine: Engine, enforcer: LimitEnforcer, counters: UsageCounters) -> None:
        super().__init__("quotas", self._step, "cannot count sessions for their limits", retry=RECOUNT_SECONDS)
        self._engine, self._enforcer, self._counters = engine, enforcer, counters

    def count(self) -> None:
        """Count once, if any limit needs it."""
        if not self._enforcer.limits_sizes:
            return
        before = self._counters.snapshot()
        counted: defaultdict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for namespace, stored in self._engine.usage(None).items():
            state = self._enforcer.for_namespace(namespace)
            if state and state.usage:
                entries, size = counted[state.usage.name]
                more = stored.sessions + stored.tombstones
                counted[state.usage.name] = entries + more, size + stored.value_bytes + more * ENTRY_BYTES
        self._counters.replace(counted, before)

    def _step(self) -> float:
        started = time.monotonic()
        self.count()
        return max(RECOUNT_SECONDS, MIN_PAUSE_FACTOR * (time.monotonic() - started))
