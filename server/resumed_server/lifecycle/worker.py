"""One serving process: everything between the listen addresses and the clients.

Nothing of gRPC may exist before a fork, so open() creates all of it.
"""

from __future__ import annotations

import contextlib
import os
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import structlog

from resumed_server.auth.security_context import SecurityContext
from resumed_server.errors import UserError
from resumed_server.lifecycle.health import LIVENESS, Readiness, is_alive
from resumed_server.lifecycle.open_files import raise_file_limit
from resumed_server.lifecycle.shutdown import GRACE_SECONDS, drain, sleep
from resumed_server.lifecycle.supervisor import wait_for_stop_signal
from resumed_server.limits.usage_counters import UsageRecounter
from resumed_server.observability import native_log
from resumed_server.periodic import Heartbeat, PeriodicTask, stop_all
from resumed_server.rpc import server as rpc_server
from resumed_server.rpc._grpcio_private import ConnectionCounter
from resumed_server.rpc.admin_service import AdminService
from resumed_server.rpc.health_service import HealthService
from resumed_server.rpc.observer import NullObserver
from resumed_server.rpc.selftest import is_grpcio_compatible
from resumed_server.rpc.session_service import SERVICE_NAME, SessionStoreService
from resumed_server.storage.engine import EngineError
from resumed_server.storage.expiry import Sweeper
from resumed_server.storage.registry import find_engine, open_engine
from resumed_server.watch.hub import WatchHub

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from resumed_server.config.settings import Settings
    from resumed_server.config.types import Address
    from resumed_server.limits.enforcer import SharedCounters
    from resumed_server.observability.metrics.shared_segment import MetricsSegment
    from resumed_server.observability.metrics.worker import WorkerMetrics
    from resumed_server.rpc.observer import Observer
    from resumed_server.storage.engine import Engine

_LOOP_SECONDS = 0.25
"""Time between two iterations of the main loop."""

log = structlog.get_logger()


class ListenAddresses(NamedTuple):
    """Reserved addresses, with ports other than 0."""

    sessions: Sequence[Address]
    health: Sequence[Address] = ()
    metrics: Sequence[Address] = ()


class Worker:
    """Serves sessions in this process.

    Args:
        settings: The settings of the server.
        addresses: Where to listen.
        counters: The counters of limits, which all workers share.
        segment: The memory through which workers publish their metrics; None without metrics.
        number: The number of the worker, from 0.
        supervisor: Process id of the supervisor, which is the parent process; None without one.
        wait: Waits for a stop signal, up to a number of seconds, and returns whether it arrived.
    """

    def __init__(
        self,
        settings: Settings,
        addresses: ListenAddresses,
        counters: SharedCounters,
        segment: MetricsSegment | None = None,
        *,
        number: int = 0,
        supervisor: int | None = None,
        wait: Callable[[float], bool] = wait_for_stop_signal,
    ) -> None:
        self._settings, self._addresses, self._counters, self._segment = settings, addresses, counters, segment
        self._number, self._supervisor, self._wait = number, supervisor, wait
        self._stack = contextlib.ExitStack()
        self._loop = Heartbeat()

    def run(self) -> int:
        """Open, serve and shut down; return the exit status: 1 if a new process can repair a broken engine.

        Raises:
            UserError: The storage or an address cannot be used.
            ValueError: A file of the settings is invalid.
        """
        with self._stack:
            self.open()
            self.serve()
            self.shutdown()
        log.info("stopped")
        return 1 if self._readiness.broken else 0

    def open(self) -> None:
        """Open the storage, and start to serve."""
        settings, stack = self._settings, self._stack
        # A replacement worker does not start while the files are invalid: older ones could restore a revoked grant.
        security = SecurityContext(settings, self._counters)
        engine = stack.enter_context(contextlib.closing(open_storage(settings)))
        self._readiness = Readiness(engine)
        hub, sweeper = WatchHub(engine), Sweeper(engine)
        shared, use_executor = self._supervisor is not None, is_grpcio_compatible()
        max_connections = raise_file_limit(settings.max_connections)
        metrics = self._open_metrics(self._segment, engine, security, max_connections) if self._segment else None
        if "GRPC_VERBOSITY" not in os.environ:  # with it, an operator wants the text
            native_log.capture(metrics.recorder.on_refused_handshake if metrics else lambda _: None)
        observer = self._open_observer(metrics)
        if metrics:
            stack.enter_context(metrics.reporting(hub, sweeper))
        probe = PeriodicTask("probe", self._readiness.probe, "the storage cannot be probed")
        files = PeriodicTask("files", security.poll, "the files of the settings cannot be read")
        recounter = UsageRecounter(engine, security.enforcer, self._counters.usage)
        stack.callback(stop_all, (recounter, sweeper, files, probe), GRACE_SECONDS)
        health = HealthService(
            {
                "": lambda: self._readiness.ready,
                SERVICE_NAME: lambda: self._readiness.ready,
                LIVENESS: partial(is_alive, (self._loop, files.heartbeat)),
            }
        )
        service = SessionStoreService(
            metrics.engine if metrics else engine,
            hub,
            settings.max_ttl,
            authorizer=security.authorizer,
            enforcer=security.enforcer,
            observer=observer,
        )
        server = rpc_server.build_session_server(
            settings,
            service,
            AdminService(engine, security.authorizer, observer),
            health,
            load=metrics.recorder if metrics else None,
            max_connections=max_connections,
            shared=shared,
            use_executor=use_executor,
        )
        for address in self._addresses.sessions:
            rpc_server.listen(server, address, security.certificates)
        health_server = rpc_server.build_health_server(health, shared=shared, use_executor=use_executor)
        for address in self._addresses.health:
            rpc_server.listen(health_server, address, None)
        sweeper.start()
        if self._number == 0:
            recounter.start()
        server.start()
        health_server.start()
        stack.callback(health_server.stop, None)
        self._drain = partial(drain, server, health, hub)
        log.info(
            "listening",
            addresses=[*map(str, self._addresses.sessions)],
            health=[*map(str, self._addresses.health)],
            metrics=[*map(str, self._addresses.metrics)],
        )
        probe.start()
        files.start()

    def serve(self) -> None:
        """Return after a stop signal, when the supervisor is gone, or when the engine is broken.

        This loop waits for signals only. Work that a client, the storage or a file system can block has threads of its
        own, and health reads their results.
        """
        while not self._readiness.broken and not self._is_orphaned:
            self._loop.beat()
            self._readiness.check_overdue()
            if self._wait(_LOOP_SECONDS):
                break

    def shutdown(self) -> None:
        """Send the clients away, finish the calls in flight, and close everything in reverse order."""
        # After the supervisor's end the next server waits for the port, so the shutdown delay is skipped.
        delay = 0.0 if self._readiness.broken or self._is_orphaned else self._settings.shutdown_delay
        # systemd signals every process of the unit, so a worker can receive SIGTERM twice. A second SIGTERM must not
        # shorten the shutdown of a worker; only the supervisor's SIGKILL does.
        self._drain(delay, self._wait if self._supervisor is None else sleep)
        self._stack.close()

    @property
    def _is_orphaned(self) -> bool:
        return self._supervisor not in {None, os.getppid()}

    def _open_metrics(
        self, segment: MetricsSegment, engine: Engine, security: SecurityContext, max_connections: int
    ) -> WorkerMetrics:
        """Serve the metrics of all workers over HTTP, and return those of this one."""
        from resumed_server.observability.metrics.collector import MetricsCollector  # noqa: PLC0415 - only with metrics
        from resumed_server.observability.metrics.http_endpoint import Endpoint  # noqa: PLC0415
        from resumed_server.observability.metrics.worker import WorkerMetrics  # noqa: PLC0415

        storage = self._settings.storage
        capacity = self._settings.capacity if find_engine(storage).has_capacity else 0
        build = {"engine": storage.partition(":")[0], "transport": self._settings.transport}
        collector = MetricsCollector(segment, build, capacity, security.enforcer)
        self._stack.callback(Endpoint(self._addresses.metrics, collector).close)
        metrics = WorkerMetrics(
            segment,
            self._number,
            engine,
            readiness=self._readiness,
            certificates=security.certificates,
            files=security.files,
            count_connections=ConnectionCounter().count if self._settings.transport == "grpcio" else lambda: None,
            max_connections=max_connections,
        )
        security.enforcer.observer = metrics.recorder
        return metrics

    def _open_observer(self, metrics: WorkerMetrics | None) -> Observer:
        """Return the observer of calls: metrics and traces, if the settings enable them."""
        observer: Observer = metrics.recorder if metrics else NullObserver()
        if not self._settings.otel:
            return observer
        from resumed_server.observability.tracing import export_spans  # noqa: PLC0415 - an extra

        return self._stack.enter_context(export_spans(observer))


def open_storage(settings: Settings) -> Engine:
    """Open the storage engine of the settings.

    Raises:
        UserError: It cannot be opened.
    """
    try:
        return open_engine(
            settings.storage,
            capacity=settings.capacity,
            threads=settings.threads,
            clock=time.time,
            quarantine_after_crash=True,
        )
    except (EngineError, OSError, ValueError) as error:
        raise UserError(f"--storage: {error}") from error
