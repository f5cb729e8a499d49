"""State machine that compares any history of calls of an engine with a dictionary."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from resumed_server.storage.engine import (
    UNKNOWN_TOMBSTONE_SECONDS,
    AlreadyExists,
    Get,
    NamespacePurged,
    Put,
    Remove,
    StoredSession,
    Take,
)
from resumed_server.storage.testing.fixtures import FakeClock, read_removals

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from resumed_server.storage.engine import Engine, Operation

# Few of each, so that operations collide.
ADDRESSES = st.sampled_from([("a", b"k"), ("a", b"\0k"), ("a.a", b"k"), ("b", b"k"), ("b", b"k" * 64)])
VALUES = st.sampled_from([b"one", b"two", b"2" * 5_000])
# Times are multiples of 20 s, so that an engine with a clock of its own, which does not stop, has the same results.
UNIT = 20.0
SECONDS = st.one_of(st.sampled_from([UNIT, UNKNOWN_TOMBSTONE_SECONDS]), st.integers(1, 90).map(lambda n: n * UNIT))
OPERATIONS = st.one_of(
    st.tuples(ADDRESSES, VALUES, SECONDS, st.booleans()).map(
        lambda drawn: Put(*drawn[0], *drawn[1:3], None, pinned=drawn[3])
    ),
    *(st.builds(lambda kind, address: kind(*address), st.just(kind), ADDRESSES) for kind in (Get, Take)),
    st.tuples(ADDRESSES, st.one_of(st.none(), SECONDS)).map(lambda drawn: Remove(*drawn[0], drawn[1])),
)


@dataclass
class Entry:
    """An entry of the dictionary: a live session with its issue time, or a tombstone (no value)."""

    value: bytes | None
    expiry: float
    issued_at: float
    lasting: bool = False


class EngineMachine(RuleBasedStateMachine):
    """Applies the same operations to an engine and a dictionary, and compares the results."""

    def __init__(self, clock: FakeClock, engine: Engine, sweeps: bool, tick: float) -> None:
        super().__init__()
        self.clock, self.engine, self.sweeps, self.tick = clock, engine, sweeps, tick
        self.entries: dict[tuple[str, bytes], Entry] = {}
        self.mirror: dict[tuple[str, bytes], Entry] = {}
        self.removals: dict[tuple[str, bytes], float] = {}
        self.followed, self.followed_all = engine.position(), True
        self.deleting = False

    def teardown(self) -> None:
        """Close the engine."""
        self.engine.close()

    @rule(operation=OPERATIONS)
    def carry_out_one(self, operation: Operation) -> None:
        """Call the method of an operation."""
        expected = self._expect(operation)
        try:
            match operation:
                case Put(namespace, key, value, ttl, _, pinned):
                    outcome: Any = self.engine.put(namespace, key, value, ttl, pinned=pinned)
                case Get(namespace, key):
                    outcome = self.engine.get(namespace, key)
                case Take(namespace, key):
                    outcome = self.engine.take(namespace, key)
                case Remove(namespace, key, removal_ttl):
                    outcome = self.engine.remove(namespace, key, ttl=removal_ttl)
        except AlreadyExists as error:
            outcome = error
        assert self._comparable(outcome) == self._approximate(expected)

    @rule(operations=st.lists(OPERATIONS, max_size=12))
    def carry_out_batch(self, operations: list[Operation]) -> None:
        """Call batch() with several operations, some on the same key."""
        expected = [self._expect(operation) for operation in operations]
        outcomes = map(self._comparable, self.engine.batch(operations))
        assert list(outcomes) == list(map(self._approximate, expected))

    @rule(seconds=SECONDS)
    def advance_clock(self, seconds: float) -> None:
        """Move the clock forward."""
        self.clock.advance(seconds)

    @rule(address=ADDRESSES, age=st.one_of(st.none(), SECONDS))
    def purge(self, address: tuple[str, bytes], age: float | None) -> None:
        """Purge the sessions of a namespace, those of an age or all, and move the clock forward."""
        # Halfway between the issue times of sessions. An engine that expires keys itself has its own clock, which does
        # not follow this one.
        before = None if age is None or not self.sweeps else self.clock() - age + UNIT / 2
        self.engine.purge(address[0], before)
        self.clock.advance(UNIT)
        self.deleting = True
        self.entries = {
            each: entry
            for each, entry in self.entries.items()
            if each[0] != address[0] or not entry.value or (before and entry.issued_at >= before)
        }

    @rule(limit=st.integers(1, 8))
    def sweep(self, limit: int) -> None:
        """Sweep exactly the expired and the purged entries, in steps up to the limit."""
        expired = [address for address, entry in self.entries.items() if entry.expiry <= self.clock()]
        left = len(expired) if self.sweeps else 0
        while self.deleting and self.engine.sweep(limit if self.sweeps else 1_000) > 0:
            left = 0
        self.deleting = False
        while left >= 0:
            assert self.engine.sweep(limit) == min(limit, left)
            left -= limit
        for address in expired:
            del self.entries[address]

    @rule(limit=st.integers(1, 8))
    def follow(self, limit: int) -> None:
        """Update a mirror from the log; it then has exactly the live sessions, and the removals in force."""
        until = self.engine.position()
        while self.followed != until:
            read = self.engine.changes(self.followed, until, limit)
            if read is None:  # begin anew
                self.mirror.clear()
                for namespace in {each[0] for each in self.entries}:
                    for key, ttl in read_removals(self.engine, namespace).items():
                        self._follow_removal((namespace, key), ttl)
                read, self.followed_all = ([], until), False
            for change in read[0]:
                if isinstance(change, NamespacePurged):
                    before = change.issued_before
                    self.mirror = {
                        each: entry
                        for each, entry in self.mirror.items()
                        if each[0] != change.namespace or (before is not None and entry.issued_at >= before)
                    }
                    continue
                address, session = (change.namespace, change.key), change.session
                self.mirror.pop(address, None)
                if change.ttl is not None:
                    self._follow_removal(address, change.ttl)
                if session:
                    assert session.issued_at is not None
                    self.mirror[address] = Entry(session.value, self.clock() + session.ttl, session.issued_at)
            self.followed = read[1]
        mirrored, there = self._live(self.mirror), self._live(self.entries)
        assert mirrored == (there if self.followed_all else there & mirrored)
        # An engine without sweep reads the end of a removal from the tombstone of its key. That can be a later one, if
        # the removal is over.
        later = {} if self.sweeps else {each: entry.expiry for each, entry in self.entries.items() if not entry.value}
        self._compare_removals(self.removals, self._lasting(), later)

    @rule(address=ADDRESSES)
    def read_removals(self, address: tuple[str, bytes]) -> None:
        """Read exactly the lasting removals in force."""
        now, namespace = self.clock(), address[0]
        read = {(namespace, key): now + ttl for key, ttl in read_removals(self.engine, namespace).items()}
        self._compare_removals(read, {each: end for each, end in self._lasting().items() if each[0] == namespace})

    @invariant()
    def nothing_expired_removed_taken_or_purged_returns(self) -> None:
        """Every live session is found."""
        for address, entry in self.entries.items():
            found = self.engine.get(*address)
            assert (found and found.value) == (entry.value if entry.expiry > self.clock() else None)

    def _follow_removal(self, address: tuple[str, bytes], ttl: float) -> None:
        self.removals[address] = max(self.removals.get(address, 0.0), self.clock() + ttl)

    def _lasting(self) -> dict[tuple[str, bytes], float]:
        """Return the expiries of the lasting removals."""
        return {address: entry.expiry for address, entry in self.entries.items() if entry.lasting}

    def _compare_removals(
        self,
        found: dict[tuple[str, bytes], float],
        expected: dict[tuple[str, bytes], float],
        later: Mapping[tuple[str, bytes], float] = MappingProxyType({}),
    ) -> None:
        """Check that lasting removals end when expected, or up to `later`; one that is over may be missing."""
        now, tolerance = self.clock(), self.tick + 0.001
        for address in found | expected:
            end, expectation = (max(ends.get(address, now), now) for ends in (found, expected))
            assert expectation - tolerance <= end <= max(expectation, later.get(address, now)) + tolerance, address

    def _live(self, entries: dict[tuple[str, bytes], Entry]) -> set[tuple[tuple[str, bytes], bytes]]:
        now = self.clock()
        return {(address, entry.value) for address, entry in entries.items() if entry.value and entry.expiry > now}

    def _expect(self, operation: Operation) -> object:
        """Apply `operation` to the dictionary, and return the expected outcome."""
        address, now = (operation.namespace, operation.key), self.clock()
        entry = self.entries.get(address)
        if entry and entry.expiry <= now:
            entry = None
        value = entry.value if entry else None
        match operation:
            case Put():
                if entry and operation.value != value:
                    return AlreadyExists
                if not entry:
                    entry = self.entries[address] = Entry(operation.value, now + operation.ttl, now)
                return entry.expiry - now
            case Remove():
                if not entry:
                    expiry = now + max(UNKNOWN_TOMBSTONE_SECONDS, operation.ttl or 0.0)
                    self.entries[address] = Entry(None, expiry, now, operation.ttl is not None)
                    return False
                entry.value = None
                if operation.ttl is not None:
                    entry.expiry, entry.lasting = max(entry.expiry, now + operation.ttl), True
                return True if value else None
            case Take() if entry and value:
                entry.value = None
        return (value, entry.expiry - now) if entry and value else None

    def _approximate(self, expected: object) -> object:
        """Return `expected` with times that may differ by a tick."""
        if isinstance(expected, tuple):
            return (expected[0], self._approximate(expected[1]))
        return pytest.approx(expected, abs=self.tick) if isinstance(expected, float) else expected

    @staticmethod
    def _comparable(outcome: object) -> object:
        """Return an outcome in a form that can be compared."""
        if isinstance(outcome, AlreadyExists):
            return AlreadyExists
        return (outcome.value, outcome.ttl) if isinstance(outcome, StoredSession) else outcome


def check_histories(
    open_engine: Callable[[FakeClock], Engine],
    clock: Callable[[], FakeClock] = FakeClock,
    *,
    sweeps: bool = True,
    tick: float = 0.0,
    examples: int = 100,
) -> None:
    """Try `examples` histories on engines from `open_engine`; raise AssertionError with the shortest that differs.

    Times may differ by `tick` seconds, at most 10. `sweeps` is False if the storage expires entries itself.
    """

    def machine() -> EngineMachine:
        time = clock()
        return EngineMachine(time, open_engine(time), sweeps, tick)

    run_state_machine_as_test(
        cast("type[EngineMachine]", machine),
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
