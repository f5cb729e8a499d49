"""Makes Prometheus' metrics of what the workers pinned to the board."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from google.rpc.code_pb2 import Code
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from resumed.v1 import admin_pb2, session_store_pb2
from resumed_server.observability.metrics.recorder import BOUNDS, OUTCOMES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from prometheus_client import Metric

    from resumed_server.observability.metrics.shared_segment import Board

STALE_SECONDS = 5.0
"""A worker that pinned nothing for so long does not live, or hangs: it pins five times a second."""

_EXPECTED = ("INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE")
"""Status codes that are shown before they occur: Prometheus sees no rise in a series that begins with its first."""

_SERVICES: dict[str, str] = {
    method.name: service.full_name
    for file in (session_store_pb2.DESCRIPTOR, admin_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
}
"""By method, the service that has it: no two have one of the same name."""

_Figures = dict[str, Any]


class BoardCollector(Collector):
    """Reads the board whenever it is asked.

    Args:
        board: What to read.
        about: What the server is, for `resumed_build_info`.
        capacity: Bytes that the store may take, 0 if nobody knows.
        clock: The clock of those who pin.
    """

    def __init__(
        self,
        board: Board,
        about: Mapping[str, str],
        capacity: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board, self._capacity, self._clock = board, capacity, clock
        self._about = {"version": version("resumed"), **about}

    def describe(self) -> Iterator[Metric]:
        """Return nothing: the registry holds nobody else's metrics that these could be confused with."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        by_worker = {
            str(worker): figures for worker in range(self._board.workers) if (figures := self._board.read(worker))
        }
        now = self._clock()
        up = {worker: now - figures["pinned"] < STALE_SECONDS for worker, figures in by_worker.items()}
        alive = [figures for worker, figures in by_worker.items() if up[worker]]
        yield InfoMetricFamily("resumed_build", "What this server is.", value=self._about)
        yield from _calls([figures["recorded"] for figures in by_worker.values()])
        yield from _load([figures["recorded"] for figures in by_worker.values()])
        yield _operations([figures["recorded"]["operations"] for figures in by_worker.values()])
        yield from self._store(list(by_worker.values()), alive)
        yield from _watchers(list(by_worker.values()), alive)
        yield from _certificate(alive)
        yield from _workers(by_worker, up)

    def _store(self, everybody: Sequence[_Figures], alive: Sequence[_Figures]) -> Iterator[Metric]:
        # All workers share one store: whoever spoke last knows best.
        usage: dict[str, int] = max(everybody, key=lambda each: each["pinned"], default={"usage": {}})["usage"]
        if usage:
            yield GaugeMetricFamily(
                "resumed_sessions", "Sessions in the store; expired ones count until swept.", usage["sessions"]
            )
            yield GaugeMetricFamily("resumed_storage_bytes", "Bytes that the store takes.", usage["bytes"])
            # Not 0 while it is unknown: to Prometheus, a counter that returns from 0 has counted everything again.
            yield CounterMetricFamily(
                "resumed_evicted_sessions", "Live sessions dropped to make room.", usage["evicted"]
            )
        if self._capacity:
            yield GaugeMetricFamily("resumed_storage_capacity_bytes", "Bytes that the store may take.", self._capacity)
        yield CounterMetricFamily(
            "resumed_swept_entries",
            "Expired sessions and tombstones whose space was given back.",
            _total(everybody, "swept"),
        )
        ready = any(figures["ready"] for figures in alive)
        yield GaugeMetricFamily(
            "resumed_engine_up", "Whether the storage engine answers, as any worker sees it.", ready
        )


def _calls(by_worker: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    """Yield the calls of all workers together."""
    buckets: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (len(BOUNDS) + 1))
    seconds: Counter[str] = Counter()
    codes: Counter[tuple[str, str]] = Counter()
    for recorded in by_worker:
        for method, (counts, taken) in recorded["calls"].items():
            buckets[method] = [sum(pair) for pair in zip(buckets[method], counts, strict=True)]
            seconds[method] += taken
            codes[method, "OK"] += sum(counts)
            codes.update({(method, code): 0 for code in _EXPECTED})
        for method, code, number in recorded["failures"]:
            codes[method, Code.Name(code)] += number
    calls = CounterMetricFamily(
        "resumed_calls", "Calls by method and gRPC status; a Batch is one.", labels=["service", "method", "code"]
    )
    for (method, code), number in codes.items():
        calls.add_metric([_SERVICES.get(method, ""), method, code], number)
    yield calls
    times = HistogramMetricFamily(
        "resumed_call_seconds",
        "Time of calls that were answered, from when a thread took them: without network and waiting for a thread.",
        labels=["service", "method"],
    )
    for method, counts in buckets.items():
        times.add_metric([_SERVICES.get(method, ""), method], cumulative(BOUNDS, counts), seconds[method])
    yield times


def _load(by_worker: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    """Yield how busy all workers were: what calls waited before they counted, and those that never did."""
    waits = [recorded["waits"] for recorded in by_worker]
    counts = [sum(column) for column in zip(*(buckets for buckets, _ in waits), strict=True)]
    times = HistogramMetricFamily("resumed_call_wait_seconds", "Time that calls waited for a thread.")
    times.add_metric([], cumulative(BOUNDS, counts or [0] * (len(BOUNDS) + 1)), sum(seconds for _, seconds in waits))
    yield times
    yield CounterMetricFamily(
        "resumed_calls_rejected",
        "Calls refused by gRPC (RESOURCE_EXHAUSTED), since as many as may be were under way; not among resumed_calls.",
        sum(recorded["turned_away"] for recorded in by_worker),
    )


def _operations(by_worker: Sequence[Mapping[str, Sequence[int]]]) -> Metric:
    """Return the operations of all workers together."""
    rows: defaultdict[str, list[int]] = defaultdict(lambda: [0] * len(OUTCOMES))
    for namespaces in by_worker:
        for namespace, row in namespaces.items():
            rows[namespace] = [sum(pair) for pair in zip(rows[namespace], row, strict=True)]
    operations = CounterMetricFamily(
        "resumed_operations",
        "Operations by namespace and outcome, those of Batches included; namespaces beyond the first 64 are 'other'.",
        labels=["namespace", "operation", "outcome"],
    )
    for namespace, row in rows.items():
        for (operation, outcome), count in zip(OUTCOMES, row, strict=True):
            operations.add_metric([namespace, operation, outcome], count)
    return operations


def _watchers(everybody: Sequence[_Figures], alive: Sequence[_Figures]) -> Iterator[Metric]:
    yield GaugeMetricFamily("resumed_watchers", "Open Watch streams.", sum(each["watchers"] for each in alive))
    yield GaugeMetricFamily(
        "resumed_watchers_lag_seconds",
        "Age of the oldest change that some watcher has yet to be told.",
        max((each["watchers_lag"] for each in alive), default=0),
    )
    yield CounterMetricFamily(
        "resumed_watchers_cut_off", "Watchers that did not keep up.", _total(everybody, "watchers_cut_off")
    )


def _certificate(alive: Sequence[_Figures]) -> Iterator[Metric]:
    if ends := [figures["expires"] for figures in alive if figures["expires"] is not None]:
        yield GaugeMetricFamily(
            "resumed_certificate_expiry_timestamp_seconds", "When the server's certificate expires.", min(ends)
        )


def _workers(by_worker: Mapping[str, _Figures], up: Mapping[str, bool]) -> Iterator[Metric]:
    """Yield what is told of each worker apart."""
    kinds: dict[str, type[GaugeMetricFamily | CounterMetricFamily]] = {"g": GaugeMetricFamily, "c": CounterMetricFamily}
    for kind, name, documentation, value in (
        ("g", "up", "Whether the worker lives and is not stuck.", lambda _: True),
        ("g", "ready", "Whether the storage engine answers this worker.", lambda figures: figures["ready"]),
        ("g", "process_resident_memory_bytes", "Memory of the worker.", lambda figures: figures["resident_bytes"]),
        (
            "g",
            "process_start_time_seconds",
            "When the worker started, in Unix seconds.",
            lambda figures: figures["started"],
        ),
        ("c", "process_cpu_seconds", "Processor time of the worker.", lambda figures: figures["totals"]["cpu_seconds"]),
        ("c", "calls", "Calls that the worker ended.", _calls_of),
    ):
        family = kinds[kind](f"resumed_worker_{name}", documentation, labels=["worker"])
        for worker, figures in by_worker.items():
            family.add_metric([worker], value(figures) if kind == "c" or up[worker] else 0)
        yield family


def _calls_of(figures: _Figures) -> int:
    recorded = figures["recorded"]
    answered: int = sum(sum(buckets) for buckets, _ in recorded["calls"].values())
    failed: int = sum(number for _, _, number in recorded["failures"])
    return answered + failed


def cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return the buckets of a histogram as Prometheus wants them: each with all that took no longer."""
    reached, buckets = 0, []
    for bound, count in zip([*map(repr, bounds), "+Inf"], counts, strict=True):
        reached += count
        buckets.append((bound, float(reached)))
    return buckets


def _total(everybody: Sequence[_Figures], name: str) -> float:
    total: float = sum(figures["totals"][name] for figures in everybody)
    return total
