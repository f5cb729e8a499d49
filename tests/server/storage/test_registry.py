"""The registry of engines: an engine of another kind needs an entry, and nothing else of the server knows its name."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import pytest

from resumed_server.storage import registry
from resumed_server.storage.call_gate import CLOSED, CallGate
from resumed_server.storage.engine import (
    LONGEST_TTL_SECONDS,
    UNKNOWN_TOMBSTONE_SECONDS,
    AlreadyExists,
    Change,
    Engine,
    EngineError,
    Get,
    Kept,
    NamespacePurged,
    NamespaceUsage,
    NoTombstone,
    Put,
    StoredSession,
    StoreTotals,
    Take,
)
from resumed_server.storage.registry import ENGINES, EngineSpec, extras_for, find_engine, open_engine, shared_url
from resumed_server.storage.testing.contract import EngineContract
from resumed_server.storage.testing.state_machine import check_histories

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from resumed_server.storage.engine import Clock, Operation, Outcome
    from resumed_server.storage.testing.fixtures import FakeClock

LOG_LENGTH = 1_000


class Entry(NamedTuple):
    value: bytes | None
    """None in a tombstone."""
    expiry: float
    issued_at: float
    number: int
    """Of the change that stored it."""
    lasting: bool = False
    """Whether a tombstone is a lasting removal."""


class ToyEngine(Engine):
    """Keeps sessions in a dictionary: the shortest engine that keeps all promises."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._gate, self._lock = clock, CallGate(), threading.RLock()
        self._entries: dict[tuple[str, bytes], Entry] = {}
        self._purges: dict[str, tuple[float, int]] = {}
        self._to_delete: deque[tuple[str, bytes]] = deque()
        self._name, self._number = os.urandom(8), 0
        self._log: deque[tuple[int, str, bytes, NamespacePurged | None]] = deque(maxlen=LOG_LENGTH)

    @contextlib.contextmanager
    def _call(self) -> Iterator[float]:
        with self._gate, self._lock:
            yield self._clock()

    def _append(self, namespace: str, key: bytes, purge: NamespacePurged | None = None) -> int:
        self._number += 1
        self._log.append((self._number, namespace, key, purge))
        return self._number

    def _is_purged(self, namespace: str, entry: Entry) -> bool:
        time, number = self._purges.get(namespace, (0.0, 0))
        return entry.value is not None and (entry.issued_at < time or entry.number < number)

    def _find(self, namespace: str, key: bytes, now: float) -> Entry | None:
        entry = self._entries.get((namespace, key))
        return None if entry is None or entry.expiry <= now or self._is_purged(namespace, entry) else entry

    def put(
        self,
        namespace: str,
        key: bytes,
        value: bytes,
        ttl: float,
        issued_at: float | None = None,
        *,
        pinned: bool = False,  # it is never full
    ) -> float:
        with self._call() as now:
            if entry := self._find(namespace, key, now):
                if entry.value != value:
                    raise AlreadyExists
                return Kept(entry.expiry - now)
            issued = now if issued_at is None else min(issued_at, now)
            if issued < self._purges.get(namespace, (0.0, 0))[0]:
                raise AlreadyExists
            ttl = min(ttl, issued + LONGEST_TTL_SECONDS - now)
            if ttl <= 0:
                return 0.0
            self._entries[namespace, key] = Entry(value, now + ttl, issued, self._append(namespace, key))
            return ttl

    def get(self, namespace: str, key: bytes) -> StoredSession | None:
        with self._call() as now:
            entry = self._find(namespace, key, now)
            if entry is None or entry.value is None:
                return None
            return StoredSession(entry.value, entry.expiry - now, entry.issued_at)

    def take(self, namespace: str, key: bytes) -> StoredSession | None:
        with self._call():
            if session := self.get(namespace, key):
                self.remove(namespace, key)
            return session

    def remove(self, namespace: str, key: bytes, *, ttl: float | None = None, tombstone: bool = True) -> bool | None:
        with self._call() as now:
            entry = self._find(namespace, key, now)
            if entry is None and not tombstone:
                raise NoTombstone
            expiry = max(entry.expiry if entry else now + UNKNOWN_TOMBSTONE_SECONDS, now + (ttl or 0.0))
            there = entry is not None and entry.value is None
            if not there or (ttl is not None and not (entry and entry.lasting and entry.expiry == expiry)):
                number = self._append(namespace, key)
                self._entries[namespace, key] = Entry(None, expiry, now, number, ttl is not None)
            return None if there else entry is not None

    def batch(self, operations: Sequence[Operation]) -> list[Outcome]:
        with self._call():
            return [self._carry_out(operation) for operation in operations]

    def _carry_out(self, operation: Operation) -> Outcome:
        try:
            match operation:
                case Put(namespace, key, value, ttl, issued_at, _):
                    return self.put(namespace, key, value, ttl, issued_at)
                case Get(namespace, key):
                    return self.get(namespace, key)
                case Take(namespace, key):
                    return self.take(namespace, key)
                case _:
                    return self.remove(
                        operation.namespace, operation.key, ttl=operation.ttl, tombstone=operation.tombstone
                    )
        except EngineError as error:
            return error

    def sweep(self, limit: int) -> int:
        with self._call() as now:
            expired = [address for address, entry in self._entries.items() if entry.expiry <= now][:limit]
            purged = [self._to_delete.popleft() for _ in range(min(limit - len(expired), len(self._to_delete)))]
            for address in (*expired, *purged):
                entry = self._entries.get(address)
                if entry and (entry.expiry <= now or self._is_purged(address[0], entry)):
                    del self._entries[address]
            return len(expired) + len(purged)

    def purge(self, namespace: str, issued_before: float | None) -> float:
        with self._call() as now:
            before = self._purges.get(namespace, (0.0, 0))
            time = now + 1e-6 if issued_before is None else min(now + 1e-6, issued_before)
            if issued_before is not None and time <= before[0]:
                return before[0]
            number = self._append(namespace, b"", NamespacePurged(namespace, issued_before and time, now))
            self._purges[namespace] = max(before[0], time), before[1] if issued_before is not None else number
            self._to_delete += [address for address in self._entries if address[0] == namespace]
            return self._purges[namespace][0]

    def removals(self, namespace: str, limit: int) -> Iterator[list[Change]]:
        with self._call() as now:
            found = [
                Change(namespace, key, None, entry.expiry - now)
                for (name, key), entry in self._entries.items()
                if name == namespace and entry.lasting and entry.expiry > now
            ]
        for start in range(0, len(found), limit):
            yield found[start : start + limit]

    def last_purge(self, namespace: str) -> NamespacePurged | None:
        with self._call():
            time, number = self._purges.get(namespace, (0.0, 0))
            return NamespacePurged(namespace, None if number else time, time if number else None) if time else None

    def usage(self, namespace: str | None) -> dict[str, NamespaceUsage]:
        with self._call() as now:
            counted = {} if namespace is None else {namespace: NamespaceUsage()}
            for (name, _), entry in self._entries.items():
                if entry.expiry > now and namespace in {None, name}:
                    usage = counted.setdefault(name, NamespaceUsage())
                    usage.tombstones += entry.value is None
                    usage.pending_deletion += self._is_purged(name, entry)
                    if entry.value is not None and not self._is_purged(name, entry):
                        usage.sessions += 1
                        usage.value_bytes += len(entry.value)
            for name, usage in counted.items():
                usage.issued_before = self._purges.get(name, (None, 0))[0]
            return counted

    def position(self) -> bytes:
        with self._call():
            return self._name + self._number.to_bytes(8, "big")

    def changes(
        self, after: bytes, until: bytes, limit: int, *, removals_only: bool = False
    ) -> tuple[list[Change | NamespacePurged], bytes] | None:
        with self._call():
            start, end = (int.from_bytes(position[8:], "big") for position in (after, until))
            if after[:8] != self._name or len(after) != 16 or start > end:
                return None
            if start < end and self._log[0][0] > start + 1:
                return None
            changes: list[Change | NamespacePurged] = []
            size, last = 0, start
            for last, namespace, key, purge in islice((each for each in self._log if start < each[0] <= end), limit):
                entry = self._entries.get((namespace, key))
                session = None if purge else self.get(namespace, key)
                if purge:
                    changes.append(purge)
                elif removals_only and session:
                    pass
                elif session or entry is None or (entry.value is None and entry.number == last):
                    left = entry.expiry - self._clock() if entry and entry.lasting else 0.0
                    changes.append(Change(namespace, key, session, left if left > 0 else None))
                size += len(session.value) if session else 0
                if size > 1 << 20:
                    break
            return changes, self._name + last.to_bytes(8, "big")

    def totals(self) -> StoreTotals:
        with self._call():
            values = [entry.value for entry in self._entries.values() if entry.value is not None]
            return StoreTotals(len(values), sum(map(len, values)))

    def probe(self) -> None:
        with self._call():
            pass

    def close(self) -> None:
        self._gate.close(CLOSED)


TOY = EngineSpec(
    schemes=frozenset({"toy"}),
    usage="toy:",
    verify=lambda _url: None,
    open=lambda _url, options: ToyEngine(options.clock),
    driver="toy_driver",
    extra="toy",
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ENGINES", [*ENGINES, TOY])


class TestToy(EngineContract):
    @pytest.fixture
    def engine(self, clock: FakeClock) -> Iterator[Engine]:
        with contextlib.closing(open_engine("toy:", capacity=0, clock=clock)) as engine:
            yield engine

    @pytest.fixture
    def kept(self) -> tuple[int, int]:
        return LOG_LENGTH, LOG_LENGTH

    @pytest.fixture
    def raw_values(self, engine: ToyEngine) -> object:
        return lambda: {address: each.value for address, each in engine._entries.items() if each.value is not None}


def test_in_any_history_a_toy_behaves_like_a_dictionary() -> None:
    check_histories(lambda clock: open_engine("toy:", capacity=0, clock=clock), examples=30)


def test_a_url_of_no_engine_is_refused_with_the_urls_of_all() -> None:
    with pytest.raises(ValueError, match=r"unknown storage engine 'mysql': use lmdb: .*, or redis://.*, or toy:"):
        find_engine("mysql://store")


def test_a_missing_driver_names_the_extra_that_installs_it() -> None:
    assert extras_for("toy_driver") == ["server", "toy"]
    assert extras_for("redis") == ["server", "redis"]
    assert extras_for("lmdb") == extras_for("typer") == ["server"]


def test_workers_share_a_directory_where_the_url_is_private_to_a_process() -> None:
    assert shared_url("lmdb:", lambda: "/tmp/a b") == "lmdb:///tmp/a%20b"
    for url in ("lmdb:///var/lib/resumed", "redis://store", "toy:"):
        assert shared_url(url, lambda: pytest.fail("no directory is needed")) == url


def test_capacity_is_shown_of_the_engines_that_it_bounds() -> None:
    assert [find_engine(url).has_capacity for url in ("lmdb:", "redis://store", "toy:")] == [True, False, False]
