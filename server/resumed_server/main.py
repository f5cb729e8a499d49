"""Puts the server together and takes it apart again.

In this order: addresses, then (with several workers) the processes, then storage, sweeper, gRPC, health. Nothing of
gRPC may exist before a fork, so it is all made in `_serve`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import tempfile
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast
from urllib.parse import quote

import structlog

from resumed_server.auth.security_context import SecurityContext
from resumed_server.errors import UserError
from resumed_server.lifecycle import supervisor as workers
from resumed_server.lifecycle.health import LIVENESS, Readiness, lives
from resumed_server.lifecycle.listeners import reserved
from resumed_server.lifecycle.open_files import possible_connections
from resumed_server.lifecycle.shutdown import GRACE, drain, slept
from resumed_server.limits.enforcer import SharedCounters
from resumed_server.limits.usage_counters import UsageRecounter
from resumed_server.observability import logging as logs
from resumed_server.periodic import Heartbeat, PeriodicTask, stop_all
from resumed_server.rpc import server as front
from resumed_server.rpc.admin_service import AdminService
from resumed_server.rpc.health_service import HealthService
from resumed_server.rpc.observer import NullObserver
from resumed_server.rpc.selftest import is_grpcio_compatible
from resumed_server.rpc.session_service import SERVICE_NAME, SessionStoreService
from resumed_server.storage.engine import EngineError
from resumed_server.storage.expiry import Sweeper
from resumed_server.storage.registry import open_engine
from resumed_server.watch.hub import WatchHub

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resumed_server.config.settings import Settings
    from resumed_server.config.types import Address
    from resumed_server.observability.metrics.shared_segment import Board
    from resumed_server.observability.metrics.worker import Metrics
    from resumed_server.rpc.observer import Observer
    from resumed_server.storage.engine import Engine

_LOOP_SECONDS = 0.25
"""How often the main thread looks at what the others found out."""

log = structlog.get_logger()


def run(settings: Settings) -> int:
    """Serve as `settings` say until SIGTERM or SIGINT, and return the exit status.

    That is 1 if only a new start can help: whoever restarts servers should.

    Raises:
        UserError: An address or the store cannot be had.
    """
    logs.configure(settings.log_format, settings.log_level)
    os.umask(0o077)  # the store and unix sockets are for this user only
    signal.pthread_sigmask(signal.SIG_BLOCK, workers.STOP_SIGNALS)  # they are waited for; threads inherit this
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the usual "read your files again", which happens by itself
    log.info("starting", **settings.shown())
    counted = SharedCounters.create()  # before the fork: all workers count together
    with contextlib.ExitStack() as held:
        addresses = held.enter_context(reserved(settings.listen))
        probed = held.enter_context(reserved(settings.health_listen, "--health-listen"))
        scraped = held.enter_context(reserved(settings.metrics_listen, "--metrics-listen"))
        ports = _Ports(addresses, probed, scraped, _board(settings) if scraped else None)
        if settings.workers == 1:
            return _serve(settings, ports, counted, worker=0, supervisor=None)
        if settings.storage == "lmdb:":
            directory = held.enter_context(tempfile.TemporaryDirectory(prefix="resumed-"))
            settings = dataclasses.replace(settings, storage=f"lmdb://{quote(directory)}")
        # Whatever is wrong with the store is found and told once, not by every worker.
        _open(settings).close()
        supervisor = os.getpid()
        return workers.supervise(
            settings.workers,
            lambda worker: _serve(settings, ports, counted, worker, supervisor),
            patience=settings.shutdown_delay + 2 * GRACE,
        )


class _Ports(NamedTuple):
    """Where to serve sessions, health alone, and metrics; and where workers pin those, if anybody asks for them."""

    sessions: Sequence[Address]
    health: Sequence[Address]
    metrics: Sequence[Address]
    board: Board | None


def _serve(settings: Settings, ports: _Ports, counted: SharedCounters, worker: int, supervisor: int | None) -> int:
    """Serve in this process until told to stop, or the supervisor is gone, or the engine is broken.

    Returns the exit status: 1 if the engine is broken, since a new process can open it anew.
    """
    # A worker that is replaced while these files make no sense does not serve; it must not go back to older grants.
    security = SecurityContext(settings, counted)
    with contextlib.ExitStack() as held:
        engine = held.enter_context(contextlib.closing(_open(settings)))
        metrics = _metrics(settings, ports, worker, engine, held) if ports.board else None
        readiness = Readiness(engine)
        probing = PeriodicTask("probe", readiness.probe, "the storage cannot be probed")
        following = PeriodicTask("files", security.poll, "files cannot be followed")
        loop = Heartbeat()
        alive = partial(lives, (loop, following.heartbeat))
        health = HealthService({"": lambda: readiness.ready, SERVICE_NAME: lambda: readiness.ready, LIVENESS: alive})
        observer = _observer(settings, metrics, held)
        watchers = WatchHub(engine)
        shared = supervisor is not None
        service = SessionStoreService(
            metrics.engine if metrics else engine,
            watchers,
            settings.max_ttl,
            authorizer=security.authorizer,
            enforcer=security.enforcer,
            observer=observer,
        )
        admin = AdminService(engine, security.authorizer, observer)
        most = possible_connections(settings.max_connections)
        use_executor, load = is_grpcio_compatible(), metrics.recorder if metrics else None
        server = front.build_session_server(
            settings, service, admin, health, load=load, max_connections=most, shared=shared, use_executor=use_executor
        )
        for address in ports.sessions:
            front.listen(server, address, security.certificates)
        probes = front.build_health_server(health, shared=shared, use_executor=use_executor)
        for address in ports.health:
            front.listen(probes, address, None)
        sweeper = Sweeper(engine)
        sweeper.start()
        counting = UsageRecounter(engine, security.enforcer, counted.usage)
        if worker == 0:
            counting.start()
        if metrics:
            held.enter_context(metrics.reporting(watchers, sweeper))
        server.start()
        probes.start()
        log.info(
            "listening",
            addresses=[*map(str, ports.sessions)],
            health=[*map(str, ports.health)],
            metrics=[*map(str, ports.metrics)],
        )
        probing.start()
        following.start()
        # This loop waits for nothing but signals: whatever a peer, the storage or a file system can block has threads
        # of its own, and health reads what they found out last.
        while not readiness.broken and supervisor in {None, os.getppid()}:
            loop.beat()
            readiness.follow()
            if metrics:
                metrics.ready = readiness.ready
                metrics.expires = security.certificates.expires if security.certificates else None
            if workers.told_to_stop(_LOOP_SECONDS):
                break
        usable = not readiness.broken
        # Without a supervisor, the next server waits for the port already.
        drains = usable and supervisor in {None, os.getppid()}
        # A worker is told twice where systemd tells it too; what ends one at once is its supervisor's SIGKILL.
        hurried = workers.told_to_stop if supervisor is None else slept
        drain(server, health, watchers, settings.shutdown_delay if drains else 0.0, hurried)
        probes.stop(None)
        stop_all((counting, sweeper, following, probing), GRACE)
    log.info("stopped")
    return 0 if usable else 1


def _board(settings: Settings) -> Board:
    from resumed_server.observability.metrics.shared_segment import Board  # noqa: PLC0415 - for those who ask for metrics

    return Board(settings.workers)


def _metrics(settings: Settings, ports: _Ports, worker: int, engine: Engine, held: contextlib.ExitStack) -> Metrics:
    """Return what counts what this worker does, and serve what all of them counted for as long as it is `held`."""
    from resumed_server.observability.metrics.collector import BoardCollector  # noqa: PLC0415 - for those who ask for metrics
    from resumed_server.observability.metrics.http_endpoint import Endpoint  # noqa: PLC0415
    from resumed_server.observability.metrics.worker import Metrics  # noqa: PLC0415

    board = cast("Board", ports.board)
    kind = settings.storage.partition(":")[0]
    about = {"engine": kind, "transport": settings.transport}
    collector = BoardCollector(board, about, settings.capacity if kind == "lmdb" else 0)
    held.callback(Endpoint(ports.metrics, collector).close)
    return Metrics(board, worker, engine)


def _observer(settings: Settings, metrics: Metrics | None, held: contextlib.ExitStack) -> Observer:
    """Return who is told of each call: metrics and tracing, where they are asked for."""
    observer: Observer = metrics.recorder if metrics else NullObserver()
    if not settings.otel:
        return observer
    from resumed_server.observability.tracing import exported  # noqa: PLC0415 - an extra

    return held.enter_context(exported(observer))


def _open(settings: Settings) -> Engine:
    try:
        return open_engine(
            settings.storage,
            capacity=settings.capacity,
            threads=settings.threads,
            clock=time.time,
            blame_crashes=True,
        )
    except (EngineError, OSError, ValueError) as error:
        raise UserError(f"--storage: {error}") from error
