"""Collect the metrics of all workers for Prometheus."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

from google.rpc.code_pb2 import Code
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from resumed.v1 import admin_pb2, session_store_pb2
from resumed_server.observability.metrics.recorder import BOUNDS, OUTCOMES
from resumed_server.observability.native_log import REASONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from prometheus_client import Metric

    from resumed_server.limits.enforcer import LimitEnforcer
    from resumed_server.observability.metrics.shared_segment import MetricsSegment

STALE_SECONDS = 5.0
"""A worker that has not published for this time has ended or hangs; it publishes five times per second."""

_EXPECTED = ("INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE")
"""Status codes with a series before their first occurrence: Prometheus sees no increase from a new series."""

_SERVICES: dict[str, str] = {
    method.name: service.full_name
    for file in (session_store_pb2.DESCRIPTOR, admin_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
}
"""The service of each method; method names are unique."""

_Figures = dict[str, Any]
_Labels = TypeVar("_Labels", bound=tuple[str, ...])


class MetricsCollector(Collector):
    """Reads the segment at each scrape.

    Args:
        segment: The figures of all workers.
        build: Labels of `resumed_build_info`.
        capacity: Capacity of the storage in bytes, 0 if it is unknown.
        enforcer: The limits; None for none.
        clock: The clock of the workers.
    """

    def __init__(
        self,
        segment: MetricsSegment,
        build: Mapping[str, str],
        capacity: int = 0,
        enforcer: LimitEnforcer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._segment, self._capacity, self._enforcer, self._clock = segment, capacity, enforcer, clock
        self._build = {"version": version("resumed"), **build}

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        by_worker = {
            str(worker): figures for worker in range(self._segment.workers) if (figures := self._segment.read(worker))
        }
        now = self._clock()
        up = {worker: now - figures["published"] < STALE_SECONDS for worker, figures in by_worker.items()}
        all_workers = list(by_worker.values())
        live_workers = [figures for worker, figures in by_worker.items() if up[worker]]
        recorded = [figures["recorded"] for figures in all_workers]
        yield InfoMetricFamily("resumed_build", "Version and configuration of this server.", value=self._build)
        yield from _calls(recorded)
        yield from _load(recorded)
        yield from _connections(all_workers, live_workers)
        yield from _storage_connections(all_workers, live_workers)
        yield from self._limits([each["limited"] for each in recorded])
        yield from _reloads(live_workers)
        yield from _process(all_workers, live_workers)
        yield _operations([each["operations"] for each in recorded])
        yield from self._store(all_workers, live_workers)
        yield from _watchers(all_workers, live_workers)
        yield from _certificate(live_workers)
        yield from _workers(by_worker, up)

    def _limits(self, by_worker: Sequence[Sequence[tuple[str, str, int]]]) -> Iterator[Metric]:
        limits: dict[tuple[str, str], tuple[int, int | None]] = {}
        for subject, limit, amount, used in self._enforcer.uses(self._segment.namespaces()) if self._enforcer else ():
            limits.setdefault((subject, limit), (amount, used))  # of two with the same patterns, the first one applies
        rejections = Counter(dict.fromkeys(limits, 0))
        for limited in by_worker:
            for subject, limit, number in limited:
                rejections[subject, limit] += number
        amounts = {key: amount for key, (amount, _) in limits.items()}
        uses = {key: use for key, (_, use) in limits.items() if use is not None}
        labels = ("subject", "limit")
        yield _labelled(GaugeMetricFamily, "resumed_limit", "Amount of a limit.", labels, amounts)
        yield _labelled(GaugeMetricFamily, "resumed_limit_used", "Use of a limit of sessions or bytes.", labels, uses)
        text = "Calls, operations and Watch streams that a limit rejected."
        yield _labelled(CounterMetricFamily, "resumed_limit_rejections", text, labels, rejections)

    def _store(self, all_workers: Sequence[_Figures], live_workers: Sequence[_Figures]) -> Iterator[Metric]:
        # All workers share one storage: the latest figures count. A new worker does not have any yet.
        known = [each for each in all_workers if each["usage"]]
        usage: dict[str, int] = max(known, key=lambda each: each["published"])["usage"] if known else {}
        if usage:
            yield GaugeMetricFamily(
                "resumed_sessions",
                "Stored sessions; expired ones are included until they are swept.",
                usage["sessions"],
            )
            yield GaugeMetricFamily("resumed_storage_bytes", "Size of the storage.", usage["bytes"])
            if "removals" in usage:
                yield GaugeMetricFamily(
                    "resumed_lasting_removals",
                    "Lasting removals; those that are over are included until they are swept.",
                    usage["removals"],
                )
            # Not 0 while it is unknown: to Prometheus, a counter that returns from 0 has counted everything again.
            yield CounterMetricFamily(
                "resumed_evicted_sessions", "Unexpired sessions evicted for lack of space.", usage["evicted"]
            )
        if self._capacity:
            yield GaugeMetricFamily("resumed_storage_capacity_bytes", "Capacity of the storage.", self._capacity)
        yield CounterMetricFamily(
            "resumed_swept_entries",
            "Expired sessions and tombstones that were deleted.",
            _total(all_workers, "swept"),
        )
        ready = any(figures["ready"] for figures in live_workers)
        yield GaugeMetricFamily("resumed_engine_up", "Whether the storage engine responds to any worker.", ready)


def _labelled(
    kind: type[GaugeMetricFamily | CounterMetricFamily],
    name: str,
    documentation: str,
    labels: Sequence[str],
    values: Mapping[_Labels, float],
) -> Metric:
    """Return a metric with a series for each key of `values`, which has the values of its labels."""
    family = kind(name, documentation, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


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
    yield _labelled(
        CounterMetricFamily,
        "resumed_calls",
        "Calls by method and gRPC status; a Batch is one.",
        ("grpc_service", "method", "code"),
        {(_SERVICES.get(method, ""), method, code): number for (method, code), number in codes.items()},
    )
    times = HistogramMetricFamily(
        "resumed_call_duration_seconds",
        "Duration of successful calls in the handler, without network and wait for a thread.",
        labels=["grpc_service", "method"],
    )
    for method, counts in buckets.items():
        times.add_metric([_SERVICES.get(method, ""), method], _cumulative(counts), seconds[method])
    yield times


def _load(by_worker: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    """Yield the load of all workers: waits for a thread, and rejected calls."""
    waits = [recorded["waits"] for recorded in by_worker]
    yield _histogram("resumed_call_wait_duration_seconds", "Time that calls wait for a thread.", waits)
    calls = [recorded["storage"] for recorded in by_worker]
    yield _histogram(
        "resumed_storage_call_duration_seconds",
        "Duration of calls to the storage (LMDB or Redis), with the wait for a connection.",
        calls,
    )
    yield CounterMetricFamily(
        "resumed_calls_rejected",
        "Calls rejected by gRPC (RESOURCE_EXHAUSTED) at the limit of concurrent calls; not included in resumed_calls.",
        sum(recorded["rejected"] for recorded in by_worker),
    )


def _histogram(name: str, documentation: str, by_worker: Sequence[tuple[Sequence[int], float]]) -> Metric:
    """Return the durations of all workers together."""
    counts = [sum(column) for column in zip(*(buckets for buckets, _ in by_worker), strict=True)]
    times = HistogramMetricFamily(name, documentation)
    times.add_metric([], _cumulative(counts or [0] * (len(BOUNDS) + 1)), sum(seconds for _, seconds in by_worker))
    return times


def _connections(all_workers: Sequence[_Figures], live_workers: Sequence[_Figures]) -> Iterator[Metric]:
    known = [figures["connections"] for figures in live_workers if figures["connections"] is not None]
    if known:
        yield GaugeMetricFamily("resumed_connections", "Open connections of clients.", sum(known))
    yield GaugeMetricFamily(
        "resumed_max_connections",
        "Maximum number of connections of clients.",
        sum(figures["max_connections"] for figures in live_workers),
    )
    yield CounterMetricFamily(
        "resumed_tls_handshakes", "TLS handshakes that clients have begun.", _total(all_workers, "handshakes")
    )
    refused = [figures["recorded"]["refused_handshakes"] for figures in all_workers]
    yield _labelled(
        CounterMetricFamily,
        "resumed_tls_handshakes_refused",
        "TLS handshakes that failed, by reason.",
        ("reason",),
        {(reason,): sum(each.get(reason, 0) for each in refused) for reason in REASONS},
    )


def _storage_connections(all_workers: Sequence[_Figures], live_workers: Sequence[_Figures]) -> Iterator[Metric]:
    pools = [figures["storage_connections"] for figures in live_workers if figures["storage_connections"]]
    if not pools:
        return
    states = {(state,): sum(pool[state] for pool in pools) for state in ("used", "idle")}
    text = "Open connections to Redis, by use."
    yield _labelled(GaugeMetricFamily, "resumed_storage_connections", text, ("state",), states)
    yield GaugeMetricFamily(
        "resumed_storage_max_connections",
        "Maximum number of connections to Redis.",
        sum(pool["maximum"] for pool in pools),
    )
    yield CounterMetricFamily(
        "resumed_storage_connections_opened",
        "Connections to Redis that were opened.",
        _total(all_workers, "storage_connections_opened"),
    )


def _reloads(live_workers: Sequence[_Figures]) -> Iterator[Metric]:
    """Yield the state of the files that the server reloads, of the worker where it is worst."""
    states: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    for figures in live_workers:
        for name, state, moment in figures["reloads"]:
            states[name].append((state, moment))
    successful = {(name,): min(state for state, _ in each) for name, each in states.items()}
    moments = {(name,): min(moment for _, moment in each) for name, each in states.items()}
    text = "Whether the present content of a file is in use."
    yield _labelled(GaugeMetricFamily, "resumed_config_last_reload_successful", text, ("file",), successful)
    name = "resumed_config_last_reload_success_timestamp_seconds"
    text = "Time of the last successful reload of a file, in Unix seconds."
    yield _labelled(GaugeMetricFamily, name, text, ("file",), moments)


def _process(all_workers: Sequence[_Figures], live_workers: Sequence[_Figures]) -> Iterator[Metric]:
    """Yield the metrics of Prometheus' client libraries, of all workers together."""
    yield CounterMetricFamily(
        "process_cpu_seconds", "Processor time of all workers in seconds.", _total(all_workers, "cpu_seconds")
    )
    for name, documentation, key in (
        ("resident_memory_bytes", "Resident memory of all workers in bytes.", "resident_bytes"),
        ("open_fds", "Open files of all workers.", "open_files"),
        ("max_fds", "Maximum number of open files of all workers.", "max_files"),
    ):
        yield GaugeMetricFamily(f"process_{name}", documentation, sum(figures[key] for figures in live_workers))
    if live_workers:
        started = min(figures["started"] for figures in live_workers)
        yield GaugeMetricFamily(
            "process_start_time_seconds", "Start time of the oldest worker, in Unix seconds.", started
        )


def _operations(by_worker: Sequence[Mapping[str, Sequence[int]]]) -> Metric:
    """Return the operations of all workers together."""
    rows: defaultdict[str, list[int]] = defaultdict(lambda: [0] * len(OUTCOMES))
    for namespaces in by_worker:
        for namespace, row in namespaces.items():
            rows[namespace] = [sum(pair) for pair in zip(rows[namespace], row, strict=True)]
    return _labelled(
        CounterMetricFamily,
        "resumed_operations",
        "Operations by namespace and outcome, including those of Batches; namespaces beyond the first 64 are 'other'.",
        ("session_namespace", "operation", "outcome"),
        {
            (namespace, *outcome): count
            for namespace, row in rows.items()
            for outcome, count in zip(OUTCOMES, row, strict=True)
        },
    )


def _watchers(all_workers: Sequence[_Figures], live_workers: Sequence[_Figures]) -> Iterator[Metric]:
    yield GaugeMetricFamily("resumed_watchers", "Open Watch streams.", sum(each["watchers"] for each in live_workers))
    yield GaugeMetricFamily(
        "resumed_watchers_lag_seconds",
        "Age of the oldest change that a watcher has not received yet.",
        max((each["watchers_lag"] for each in live_workers), default=0),
    )
    yield CounterMetricFamily(
        "resumed_watchers_cut_off",
        "Watchers that were disconnected because they were too slow.",
        _total(all_workers, "watchers_cut_off"),
    )


def _certificate(live_workers: Sequence[_Figures]) -> Iterator[Metric]:
    periods = [figures["certificate"] for figures in live_workers if figures["certificate"]]
    if periods:
        begins, expires = min(periods, key=lambda period: period[1])
        yield GaugeMetricFamily(
            "resumed_certificate_not_before_timestamp_seconds",
            "Beginning of the validity of the server's certificate, in Unix seconds.",
            begins,
        )
        yield GaugeMetricFamily(
            "resumed_certificate_expiry_timestamp_seconds",
            "Expiry of the server's certificate, in Unix seconds.",
            expires,
        )


def _workers(by_worker: Mapping[str, _Figures], up: Mapping[str, bool]) -> Iterator[Metric]:
    """Yield the metrics of each worker."""
    yield _labelled(
        GaugeMetricFamily,
        "resumed_worker_up",
        "Whether the worker runs and does not hang.",
        ("worker",),
        {(worker,): is_up for worker, is_up in up.items()},
    )
    for name, documentation, key in (
        ("ready", "Whether the storage engine responds to this worker.", "ready"),
        ("process_resident_memory_bytes", "Resident memory of the worker in bytes.", "resident_bytes"),
        ("process_start_time_seconds", "Start time of the worker, in Unix seconds.", "started"),
    ):
        gauges = {(worker,): figures[key] if up[worker] else 0 for worker, figures in by_worker.items()}
        yield _labelled(GaugeMetricFamily, f"resumed_worker_{name}", documentation, ("worker",), gauges)
    seconds = {(worker,): figures["totals"]["cpu_seconds"] for worker, figures in by_worker.items()}
    text = "Processor time of the worker in seconds."
    yield _labelled(CounterMetricFamily, "resumed_worker_process_cpu_seconds", text, ("worker",), seconds)
    calls = {(worker,): _calls_of(figures) for worker, figures in by_worker.items()}
    text = "Calls that the worker completed."
    yield _labelled(CounterMetricFamily, "resumed_worker_calls", text, ("worker",), calls)


def _calls_of(figures: _Figures) -> int:
    recorded = figures["recorded"]
    answered: int = sum(sum(buckets) for buckets, _ in recorded["calls"].values())
    failed: int = sum(number for _, _, number in recorded["failures"])
    return answered + failed


def _cumulative(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return the cumulative buckets of a Prometheus histogram with BOUNDS."""
    reached, buckets = 0, []
    for bound, count in zip([*map(repr, BOUNDS), "+Inf"], counts, strict=True):
        reached += count
        buckets.append((bound, float(reached)))
    return buckets


def _total(all_workers: Sequence[_Figures], name: str) -> float:
    total: float = sum(figures["totals"][name] for figures in all_workers)
    return total
