"""What one process counts: calls, and operations by namespace. On the path of every call, where it only takes notes."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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

_Event = TypeVar("_Event")
_FOUND = frozenset(COLUMN[each] for each in (("get", "hit"), ("take", "hit"), ("put", "stored")))


MOST_QUEUED = 1 << 18
"""Events that wait to be counted; beyond that the oldest are forgotten. Some seconds of the busiest server."""


class _Calls:
    """How long the calls of one method took that were answered."""

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0


class Recorder:
    """Counts what happens, when snapshot() is called: between handling two calls the code for it would never be warm.

    Args:
        admit: Says whether a namespace may have a place of its own. Asked when a session is stored or found in one that
            has none: of names that hold nothing a caller can make up as many as they want.

    Attributes:
        answered: Notes a call that was answered: its method and the seconds it took.
        operation: Notes an operation: its namespace, and one of COLUMN.
    """

    def __init__(self, admit: Callable[[str], bool]) -> None:
        self._admit = admit
        self._new_calls: deque[tuple[str, float]] = deque(maxlen=MOST_QUEUED)
        self._new_operations: deque[tuple[str, int]] = deque(maxlen=MOST_QUEUED)
        self.answered = self._new_calls.append
        self.operation = self._new_operations.append
        self._lock = threading.Lock()
        self._calls: defaultdict[str, _Calls] = defaultdict(_Calls)
        self._failures: Counter[tuple[str, int]] = Counter()
        self._operations: dict[str, list[int]] = {}

    def failed(self, method: str, code: int) -> None:
        """Note a call that ended with a status `code`."""
        with self._lock:
            self._failures[method, code] += 1

    def snapshot(self) -> dict[str, Any]:
        """Return what was counted so far, as JSON can have it."""
        with self._lock:
            for method, seconds in _drained(self._new_calls):
                calls = self._calls[method]
                calls.buckets[bisect_left(BOUNDS, seconds)] += 1
                calls.seconds += seconds
            for (namespace, column), number in Counter(_drained(self._new_operations)).items():
                self._row(namespace, column)[column] += number
            return {
                "calls": {method: [each.buckets[:], each.seconds] for method, each in self._calls.items()},
                "failures": [[method, code, number] for (method, code), number in self._failures.items()],
                "operations": {namespace: row[:] for namespace, row in self._operations.items()},
            }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on counting from a snapshot, as the worker does that takes a dead one's place."""
        with self._lock:
            for method, (buckets, seconds) in snapshot["calls"].items():
                self._calls[method].buckets, self._calls[method].seconds = buckets, seconds
            self._failures.update({(method, code): number for method, code, number in snapshot["failures"]})
            self._operations |= snapshot["operations"]

    def _row(self, namespace: str, column: int) -> list[int]:
        if namespace not in self._operations and not (column in _FOUND and self._admit(namespace)):
            namespace = OTHER
        return self._operations.setdefault(namespace, [0] * len(OUTCOMES))


def _drained(events: deque[_Event]) -> list[_Event]:
    return [events.popleft() for _ in range(len(events))]
