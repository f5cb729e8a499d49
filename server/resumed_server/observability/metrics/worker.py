"""Collect and publish the metrics of one worker process."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from resumed_server.observability.metrics.instrumented_engine import InstrumentedEngine
from resumed_server.observability.metrics.recorder import Recorder
from resumed_server.periodic import PeriodicTask
from resumed_server.storage.engine import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resumed_server.observability.metrics.shared_segment import MetricsSegment
    from resumed_server.storage.engine import Engine
    from resumed_server.storage.expiry import Sweeper
    from resumed_server.watch.hub import WatchHub


class HasReadiness(Protocol):
    """Such as lifecycle.health.Readiness."""

    @property
    def ready(self) -> bool:
        """Whether the storage responds."""


class HasExpiry(Protocol):
    """Such as auth.tls.ServerCertificates."""

    @property
    def expires(self) -> float | None:
        """Time of the certificate's expiry, in Unix seconds."""


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
        certificates: HasExpiry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._segment, self._number, self._storage, self._clock = segment, number, engine, clock
        self._readiness, self._certificates = readiness, certificates
        self.recorder = Recorder(segment.register_namespace)
        self.engine = InstrumentedEngine(engine, self.recorder)
        self._started = time.time()
        self._usage: dict[str, int] = {}
        self._usage_read_at = float("-inf")
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
        totals = {
            "swept": sweeper.swept,
            "watchers_cut_off": watch.cut_off,
            "cpu_seconds": time.process_time(),
        }
        figures: dict[str, Any] = {
            "pid": os.getpid(),
            "started": self._started,
            "published": self._clock(),
            "ready": ready,
            "expires": self._certificates.expires if self._certificates else None,
            "watchers": watch.watchers,
            "watchers_lag": watch.lag,
            "resident_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES,
            "usage": self._cached_usage() if ready else self._usage,
            "totals": {name: total + self._before.get(name, 0) for name, total in totals.items()},
            "recorded": self.recorder.snapshot(),
        }
        self._segment.write(self._number, figures)

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
