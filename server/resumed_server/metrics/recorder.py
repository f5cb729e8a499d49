"""What one process counts: calls, and operations by namespace. On the path of every call, so it does little."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
"""Upper bounds of the buckets of call times, in seconds; one more holds what took longer."""
OUTCOMES = (
    *(("get", "hit"), ("get", "miss"), ("get", "failed")),
    *(("take", "hit"), ("take", "miss"), ("take", "failed")),
    *(("put", "stored"), ("put", "refused"), ("put", "full"), ("put", "failed")),
    *(("remove", "removed"), ("remove", "unknown"), ("remove", "failed")),
)
"""Operations and what became of them; a Batch counts as the operations in it."""
COLUMN = {outcome: column for column, outcome in enumerate(OUTCOMES)}
OTHER = "other"
"""Stands for all namespaces without a place of their own, and so for one that is really called so."""

_FOUND = frozenset(COLUMN[each] for each in (("get", "hit"), ("take", "hit"), ("put", "stored")))


class _Calls:
    """How long the calls of one method took that were answered."""

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0


class _Counts:
    """Calls by method and operations by namespace, written by one thread and so without a lock."""

    def __init__(self) -> None:
        self.calls: defaultdict[str, _Calls] = defaultdict(_Calls)
        self.operations: dict[str, list[int]] = {}


class _Own(threading.local):
    """What this thread counted."""

    def __init__(self, everybody: list[_Counts]) -> None:
        counts = _Counts()
        self.calls, self.operations = counts.calls, counts.operations
        everybody.append(counts)


class Recorder:
    """Counts, from any thread of a pool: what each counted is kept.

    Args:
        admit: Says whether a namespace may have a place of its own. Asked when a session is stored or found in one that
            has none: of names that hold nothing a caller can make up as many as they want.
    """

    def __init__(self, admit: Callable[[str], bool]) -> None:
        self._admit = admit
        self._admitted: set[str] = set()
        self._before = _Counts()
        self._everybody = [self._before]
        self._own = _Own(self._everybody)
        self._lock = threading.Lock()
        self._failures: Counter[tuple[str, int]] = Counter()

    def answered(self, method: str, seconds: float) -> None:
        """Count a call that was answered after `seconds`."""
        calls = self._own.calls[method]
        calls.buckets[bisect_left(BOUNDS, seconds)] += 1
        calls.seconds += seconds

    def failed(self, method: str, code: int) -> None:
        """Count a call that ended with a status `code`."""
        with self._lock:
            self._failures[method, code] += 1

    def operation(self, namespace: str, column: int, number: int = 1) -> None:
        """Count operations; `column` is one of COLUMN."""
        row = self._own.operations.get(namespace) or self._row(namespace, column)
        row[column] += number

    def snapshot(self) -> dict[str, Any]:
        """Return what was counted so far, as JSON can have it."""
        calls: defaultdict[str, _Calls] = defaultdict(_Calls)
        operations: defaultdict[str, list[int]] = defaultdict(lambda: [0] * len(OUTCOMES))
        for counts in list(self._everybody):
            for method, each in list(counts.calls.items()):
                calls[method].buckets = _added(calls[method].buckets, each.buckets)
                calls[method].seconds += each.seconds
            for namespace, row in list(counts.operations.items()):
                operations[namespace] = _added(operations[namespace], row)
        with self._lock:
            failures = [[method, code, number] for (method, code), number in self._failures.items()]
        return {
            "calls": {method: [each.buckets, each.seconds] for method, each in calls.items()},
            "failures": failures,
            "operations": operations,
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on counting from a snapshot, as the worker does that takes a dead one's place."""
        for method, (buckets, seconds) in snapshot["calls"].items():
            self._before.calls[method].buckets, self._before.calls[method].seconds = buckets, seconds
        self._before.operations |= snapshot["operations"]
        self._admitted.update(snapshot["operations"])
        with self._lock:
            self._failures.update({(method, code): number for method, code, number in snapshot["failures"]})

    def _row(self, namespace: str, column: int) -> list[int]:
        if column in _FOUND and self._admit(namespace):
            self._admitted.add(namespace)
        name = namespace if namespace in self._admitted else OTHER
        return self._own.operations.setdefault(name, [0] * len(OUTCOMES))


def _added(ours: Sequence[int], theirs: Sequence[int]) -> list[int]:
    return [our + their for our, their in zip(ours, theirs, strict=True)]
