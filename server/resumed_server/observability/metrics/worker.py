"""Collect and publish the metrics of one worker process."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from resumed_server.observability.metrics.instrumented_engine import InstrumentedEngine
from resumed_server.observability.metrics.recorder import Recorder
from resumed_server.periodic import PeriodicTask
from resumed_server.storage.engine import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from resumed_server.auth.tls import ServerCertificates
    from resumed_server.config.reloading_file import Followed
    from resumed_server.observability.metrics.shared_segment import MetricsSegment
    from resumed_server.storage.engine import Engine
    from resumed_server.storage.expiry import Sweeper
    from resumed_server.watch.hub import WatchHub


class HasReadiness(Protocol):
    """Such as lifecycle.health.Readiness."""

    @property
    def ready(self) -> bool:
        """Whether the storage responds."""


REPORT_SECONDS = 0.2
"""Seconds between two publications; the error of a rate over some seconds is a few percent."""
USAGE_SECONDS = 2.0
"""Minimum time between two queries of the engine's totals, in seconds."""

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class WorkerMetrics:
    """The figures of one worker.

    Args:
        segment: The memory to publish them in.
        number: The number of the worker, from 0.
        engine: The storage.
        readiness: Whether the storage responds.
        certificates: The server's certificates; None without TLS.
        files: The files that the server reloads.
        count_connections: Returns the number of open connections; None where that is unknown.
        max_connections: Maximum number of connections.
        clock: Monotonic seconds, the same for all processes of this machine.

    Attributes:
        recorder: The observer of calls.
        engine: The storage, with its operations counted.
    """

    def __init__(
        self,
        segment: MetricsSegment,
        number: int,
        engine: Engine,
        *,
        readiness: HasReadiness,
        certificates: ServerCertificates | None = None,
        files: Sequence[Followed[Any]] = (),
        count_connections: Callable[[], int | None] = lambda: None,
        max_connections: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._segment, self._number, self._storage, self._clock = segment, number, engine, clock
        self._readiness, self._certificates, self._files = readiness, certificates, files
        self._count_connections, self._max_connections = count_connections, max_connections
        self._resources: dict[str, Any] = {}
        self.recorder = Recorder(segment.register_namespace)
        self.engine = InstrumentedEngine(engine, self.recorder)
        self._started = time.time()
        self._usage: dict[str, int] = {}
        self._usage_read_at = self._resources_read_at = float("-inf")
        before = segment.read(number)
        self._before: dict[str, float] = before["totals"] if before else {}
        if before:
            self.recorder.restore(before["recorded"])

    @contextlib.contextmanager
    def reporting(self, hub: WatchHub, sweeper: Sweeper) -> Iterator[None]:
        """Publish the figures periodically, in a thread, until the context ends."""

        def step() -> float:
            self.report(hub, sweeper)
            return REPORT_SECONDS

        task = PeriodicTask("metrics-report", step, "failed to publish metrics", retry=REPORT_SECONDS)
        task.start()
        try:
            yield
        finally:
            task.stop()
            with contextlib.suppress(Exception):  # an error of the last publication must not prevent the shutdown
                step()

    def report(self, hub: WatchHub, sweeper: Sweeper) -> None:
        """Publish the current figures."""
        watch, ready = hub.stats(), self._readiness.ready
        resources = self._cached_resources()
        storage = resources["storage_connections"]
        totals = {
            "swept": sweeper.swept,
            "watchers_cut_off": watch.cut_off,
            "cpu_seconds": time.process_time(),
            "handshakes": self._certificates.handshakes if self._certificates else 0,
            "storage_connections_opened": storage["opened"] if storage else 0,
        }
        figures: dict[str, Any] = {
            "pid": os.getpid(),
            "started": self._started,
            "published": self._clock(),
            "ready": ready,
            "certificate": [self._certificates.begins, self._certificates.expires] if self._certificates else None,
            "reloads": [[file.name.lower(), file.reload_succeeded, file.reloaded_at] for file in self._files],
            "watchers": watch.watchers,
            "watchers_lag": watch.lag,
            "resident_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES,
            **resources,
            "usage": self._cached_usage() if ready else self._usage,
            "totals": {name: total + self._before.get(name, 0) for name, total in totals.items()},
            "recorded": self.recorder.snapshot(),
        }
        self._segment.write(self._number, figures)

    def _cached_resources(self) -> dict[str, Any]:
        """Return the connections and open files of this process; each query takes milliseconds if they are many."""
        now = self._clock()
        if now - self._resources_read_at >= USAGE_SECONDS:
            self._resources_read_at = now
            self._resources = {
                "connections": self._count_connections(),
                "storage_connections": asdict(storage) if (storage := self._storage.connections()) else None,
                "max_connections": self._max_connections,
                "open_files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - only their number
                "max_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            }
        return self._resources

    def _cached_usage(self) -> dict[str, int]:
        now = self._clock()
        if now - self._usage_read_at >= USAGE_SECONDS:
            self._usage_read_at = now
            try:
                usage = self._storage.totals()
            except EngineError:
                return self._usage  # health reports an error that lasts
            self._usage = {name: number for name, number in asdict(usage).items() if number is not None}
        return self._usage
