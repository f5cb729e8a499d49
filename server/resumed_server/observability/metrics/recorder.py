"""What one process counts: calls, and operations by namespace. On the path of every call, so it does little."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
"""Upper bounds of the buckets of call times, in seconds; one more holds what took longer."""
OUTCOMES = (
    *(("get", "hit"), ("get", "miss"), ("get", "limited"), ("get", "failed")),
    *(("take", "hit"), ("take", "miss"), ("take", "limited"), ("take", "failed")),
    *(("put", "stored"), ("put", "refused"), ("put", "full"), ("put", "limited"), ("put", "failed")),
    *(("remove", "removed"), ("remove", "unknown"), ("remove", "limited"), ("remove", "failed")),
)
"""Operations and what became of them; a Batch counts as the operations in it."""
COLUMN = {outcome: column for column, outcome in enumerate(OUTCOMES)}
OTHER = "other"
"""Stands for all namespaces without a place of their own, and so for one that is really called so."""

_FOUND = frozenset(COLUMN[each] for each in (("get", "hit"), ("take", "hit"), ("put", "stored")))


class _Times:
    """How long something took, each time."""

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count one more."""
        self.buckets[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds


class Recorder:
    """Counts, from any thread, and without a lock on the path of every call.

    CPython changes threads at calls, at the beginning of functions and when a loop goes round, so not between reading
    and writing what `+=` adds to. An interpreter that did would lose a count now and then.

    Args:
        admit: Says whether a namespace may have a place of its own. Asked when a session is stored or found in one that
            has none: of names that hold nothing a caller can make up as many as they want.
    """

    def __init__(self, admit: Callable[[str], bool]) -> None:
        self._admit = admit
        self._calls: dict[str, _Times] = {}
        self._waits = _Times()
        self._turned_away = 0
        self._operations: dict[str, list[int]] = {}
        self._lock = threading.Lock()
        self._failures: Counter[tuple[str, int]] = Counter()

    def on_success(self, method: str, seconds: float, *_: object) -> None:
        """Count a call that was answered after `seconds`; see errors.Observer."""
        (self._calls.get(method) or self._calls.setdefault(method, _Times())).add(seconds)

    def on_wait(self, seconds: float) -> None:
        """Count a call that waited for a thread; see pool.Load."""
        self._waits.add(seconds)

    def on_rejection(self) -> None:
        """Count a call that gRPC refused, since as many as may be were under way; on gRPC's own thread only."""
        self._turned_away += 1

    def operation(self, namespace: str, column: int) -> None:
        """Count an operation; `column` is one of COLUMN."""
        row = self._operations.get(namespace) or self._row(namespace, column)
        row[column] += 1

    def on_limited(self, operation: str, namespace: str) -> None:
        """Count an operation that a limit of its namespace refused; see rpc.Observer."""
        self.operation(namespace, COLUMN[operation, "limited"])

    def on_failure(self, method: str, code: int, *_: object) -> None:
        """Count a call that ended with a status `code`."""
        with self._lock:
            self._failures[method, code] += 1

    def snapshot(self) -> dict[str, Any]:
        """Return what was counted so far, as JSON can have it."""
        with self._lock:
            failures = [[method, code, number] for (method, code), number in self._failures.items()]
        return {
            "calls": {method: [calls.buckets[:], calls.seconds] for method, calls in list(self._calls.items())},
            "failures": failures,
            "waits": [self._waits.buckets[:], self._waits.seconds],
            "turned_away": self._turned_away,
            "operations": {namespace: row[:] for namespace, row in list(self._operations.items())},
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on counting from a snapshot, as the worker does that takes a dead one's place."""
        for method, (buckets, seconds) in snapshot["calls"].items():
            calls = self._calls[method] = _Times()
            calls.buckets, calls.seconds = buckets, seconds
        self._waits.buckets, self._waits.seconds = snapshot["waits"]
        self._turned_away = snapshot["turned_away"]
        with self._lock:
            self._failures.update({(method, code): number for method, code, number in snapshot["failures"]})
        self._operations |= snapshot["operations"]

    def _row(self, namespace: str, column: int) -> list[int]:
        name = namespace if column in _FOUND and self._admit(namespace) else OTHER
        return self._operations.setdefault(name, [0] * len(OUTCOMES))
