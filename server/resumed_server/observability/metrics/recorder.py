"""Counters of one process: calls, and operations by namespace. They are cheap, as every call uses them."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from resumed_server.limits.config import Limit

BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
"""Upper bounds of the buckets of durations, in seconds; one more bucket counts longer ones."""
OUTCOMES = (
    *(("get", "hit"), ("get", "miss"), ("get", "limited"), ("get", "failed")),
    *(("take", "hit"), ("take", "miss"), ("take", "limited"), ("take", "failed")),
    *(("put", "stored"), ("put", "refused"), ("put", "full"), ("put", "limited"), ("put", "failed")),
    *(("remove", "removed"), ("remove", "unknown"), ("remove", "limited"), ("remove", "failed")),
)
"""Operations and their outcomes; the operations of a Batch are counted one by one."""
COLUMN = {outcome: column for column, outcome in enumerate(OUTCOMES)}
OTHER = "other"
"""Stands for all namespaces without a row of their own; a namespace of this name is included."""

_MAX_LIMITS = 256
"""Number of limits with counters of their own; the rejections of all others are added up."""
_REGISTERING = frozenset(COLUMN[each] for each in (("get", "hit"), ("take", "hit"), ("put", "stored")))


class _Histogram:
    """Durations, counted in the buckets of BOUNDS."""

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.buckets[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds


class Recorder:
    """Counters for any thread, without a lock on the path of every call.

    CPython switches threads at calls, at the start of functions and at the end of loop iterations, so not between the
    read and the write of `+=`. An interpreter without this property would occasionally lose a count.

    Args:
        register: Registers a namespace, and returns whether it has a row of its own. Called only when a session is
            stored or found in the namespace, since callers can invent any number of names.
    """

    def __init__(self, register: Callable[[str], bool]) -> None:
        self._register = register
        self._calls: dict[str, _Histogram] = {}
        self._waits = _Histogram()
        self._storage = _Histogram()
        self._rejected = 0
        self._limited: Counter[tuple[str, str]] = Counter()
        self._refused_handshakes: Counter[str] = Counter()
        self._operations: dict[str, list[int]] = {}
        self._lock = threading.Lock()
        self._failures: Counter[tuple[str, int]] = Counter()

    def on_success(self, method: str, seconds: float, *_: object) -> None:
        """Count a successful call of `seconds`; see rpc.observer."""
        (self._calls.get(method) or self._calls.setdefault(method, _Histogram())).add(seconds)

    def on_wait(self, seconds: float) -> None:
        """Count the wait of a call for a thread; see rpc.executor.LoadObserver."""
        self._waits.add(seconds)

    def on_storage_call(self, seconds: float) -> None:
        """Count the duration of a call to the storage."""
        self._storage.add(seconds)

    def on_refused_handshake(self, reason: str) -> None:
        """Count a TLS handshake that failed, by one of native_log.REASONS; called on one thread only."""
        self._refused_handshakes[reason] += 1

    def on_limit(self, limit: Limit, subject: str, name: str) -> None:
        """Count a rejection by a limit; see limits.enforcer.LimitObserver."""
        # Callers can invent namespaces, each of which has the default limit.
        label = limit.label or (subject if subject in self._operations else OTHER)
        with self._lock:
            if (label, name) not in self._limited and len(self._limited) >= _MAX_LIMITS:
                label = OTHER
            self._limited[label, name] += 1

    def on_rejection(self) -> None:
        """Count a call that gRPC rejected at its limit of concurrent calls; called on gRPC's own thread only."""
        self._rejected += 1

    def operation(self, namespace: str, column: int) -> None:
        """Count an operation; `column` is one of COLUMN."""
        row = self._operations.get(namespace) or self._row(namespace, column)
        row[column] += 1

    def on_limited(self, operation: str, namespace: str) -> None:
        """Count an operation that a limit of its namespace rejected; see rpc.observer."""
        self.operation(namespace, COLUMN[operation, "limited"])

    def on_failure(self, method: str, code: int, *_: object) -> None:
        """Count a call that failed with the status `code`."""
        with self._lock:
            self._failures[method, code] += 1

    def snapshot(self) -> dict[str, Any]:
        """Return all counters, in types of JSON."""
        with self._lock:
            failures = [[method, code, number] for (method, code), number in self._failures.items()]
            limited = [[subject, name, number] for (subject, name), number in self._limited.items()]
        return {
            "calls": {method: [calls.buckets[:], calls.seconds] for method, calls in list(self._calls.items())},
            "failures": failures,
            "waits": [self._waits.buckets[:], self._waits.seconds],
            "storage": [self._storage.buckets[:], self._storage.seconds],
            "rejected": self._rejected,
            "limited": limited,
            "refused_handshakes": dict(self._refused_handshakes),
            "operations": {namespace: row[:] for namespace, row in list(self._operations.items())},
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Continue from the snapshot of a predecessor."""
        for method, (buckets, seconds) in snapshot["calls"].items():
            calls = self._calls[method] = _Histogram()
            calls.buckets, calls.seconds = buckets, seconds
        self._waits.buckets, self._waits.seconds = snapshot["waits"]
        self._storage.buckets, self._storage.seconds = snapshot["storage"]
        self._rejected = snapshot["rejected"]
        self._refused_handshakes.update(snapshot["refused_handshakes"])
        with self._lock:
            self._limited.update({(subject, name): number for subject, name, number in snapshot["limited"]})
            self._failures.update({(method, code): number for method, code, number in snapshot["failures"]})
        self._operations |= snapshot["operations"]

    def _row(self, namespace: str, column: int) -> list[int]:
        name = namespace if column in _REGISTERING and self._register(namespace) else OTHER
        return self._operations.setdefault(name, [0] * len(OUTCOMES))
