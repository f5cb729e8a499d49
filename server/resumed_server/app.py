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
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import quote

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import OVERALL_HEALTH, HealthServicer
from grpc_health.v1.health import SERVICE_NAME as HEALTH_NAME
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection_pb2_grpc
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION_NAME
from grpc_reflection.v1alpha.reflection import ReflectionServicer

from resumed.v1 import admin_pb2, admin_pb2_grpc, session_store_pb2, session_store_pb2_grpc
from resumed_server import connections, credentials, grants, logs, workers
from resumed_server.access import Anybody, Granted
from resumed_server.admin import AdminService
from resumed_server.budgets import Budgets, Shared
from resumed_server.config import UserError
from resumed_server.credentials import Credentials
from resumed_server.decoding import DecodingServer
from resumed_server.engines import open_engine
from resumed_server.engines.base import EngineBroken, EngineError
from resumed_server.errors import cause_of
from resumed_server.pool import CallPool
from resumed_server.ports import reserved
from resumed_server.quotas import Counting
from resumed_server.service import MAX_MESSAGE, SessionStoreService
from resumed_server.sweeper import Sweeper
from resumed_server.watchers import Watchers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from resumed_server.access import Access
    from resumed_server.config import Settings
    from resumed_server.engines.base import Engine
    from resumed_server.files import Followed
    from resumed_server.metrics.board import Board
    from resumed_server.metrics.process import Metrics
    from resumed_server.native import NativeServer
    from resumed_server.values import Address

GRACE = 5.0
"""Seconds that calls in flight get to finish after the drain."""
LIVENESS = "live"
"""The name by which health says that the process serves, whatever the engine does: a restart would not mend that."""
SERVICE_NAME = session_store_pb2.DESCRIPTOR.services_by_name["SessionStoreService"].full_name
ADMIN_NAME = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name

_PROBE_INTERVAL = 1.0
_MAX_QUEUED_CALLS = 4_096
"""About half a second of work: whoever waits behind more than that has given up before it is their turn."""
OPTIONS = {
    "grpc.max_receive_message_length": MAX_MESSAGE,
    "grpc.max_send_message_length": MAX_MESSAGE,
    "grpc.max_connection_age_grace_ms": 30_000,
    # A client that pings more often than every 10 s is sent away with too_many_pings.
    "grpc.http2.min_ping_interval_without_data_ms": 10_000,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.keepalive_time_ms": 60_000,
    "grpc.keepalive_timeout_ms": 20_000,
    # What one connection may ask for at the same time; whoever wants more has it wait in the client.
    "grpc.max_concurrent_streams": 128,
    # Connections of which nothing comes, or no TLS.
    "grpc.server_handshake_timeout_ms": 10_000,
    # Below these, overload is told as RESOURCE_EXHAUSTED (see _MAX_QUEUED_CALLS); gRPC's core tells it as CANCELLED.
    "grpc.server.max_pending_requests": 16_384,
    "grpc.server.max_pending_requests_hard_limit": 16_384,
}

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
    log.info("starting", **settings.shown())
    counted = Shared.fresh()  # before the fork: all workers count together
    with contextlib.ExitStack() as held:
        addresses = held.enter_context(reserved(settings.listen))
        probed = held.enter_context(reserved(settings.health_listen, "--health-listen"))
        scraped = held.enter_context(reserved(settings.metrics_listen, "--metrics-listen"))
        ports = _Ports(addresses, probed, scraped, _board(settings) if scraped else None)
        if settings.workers == 1:
            return _serve(settings, ports, counted, worker=0, supervisor=None)
        if settings.store == "lmdb:":
            directory = held.enter_context(tempfile.TemporaryDirectory(prefix="resumed-"))
            settings = dataclasses.replace(settings, store=f"lmdb://{quote(directory)}")
        # Whatever is wrong with the store is found and told once, not by every worker.
        _open(settings).close()
        supervisor = os.getpid()
        return workers.supervise(
            settings.workers,
            lambda worker: _serve(settings, ports, counted, worker, supervisor),
            patience=settings.drain + 2 * GRACE,
        )


class _Ports(NamedTuple):
    """Where to serve sessions, health alone, and metrics; and where workers pin those, if anybody asks for them."""

    sessions: Sequence[Address]
    health: Sequence[Address]
    metrics: Sequence[Address]
    board: Board | None


def _serve(settings: Settings, ports: _Ports, counted: Shared, worker: int, supervisor: int | None) -> int:
    """Serve in this process until told to stop, or the supervisor is gone, or the engine is broken.

    Returns the exit status: 1 if the engine is broken, since a new process can open it anew.
    """
    # A worker that is replaced while these files make no sense does not serve; it must not go back to older grants.
    protection = _Protection(settings, counted)
    with contextlib.ExitStack() as held:
        engine = held.enter_context(contextlib.closing(_open(settings)))
        metrics = _metrics(settings, ports, worker, engine, held) if ports.board else None
        health = HealthServicer(experimental_non_blocking=True, experimental_thread_pool=_stream_pool("health"))
        readiness = _Readiness(health)
        watchers = Watchers(engine)
        shared = supervisor is not None
        service = SessionStoreService(
            metrics.engine if metrics else engine,
            watchers,
            settings.max_ttl,
            access=protection.access,
            budgets=protection.budgets,
            observer=metrics.recorder if metrics else None,
        )
        admin = AdminService(engine, protection.access, metrics.recorder if metrics else None)
        most, open_ports = connections.possible(settings.max_connections), {address.port for address in ports.sessions}
        server = _server(settings, service, admin, health, most=most, shared=shared)
        for address in ports.sessions:
            _listen(server, address, protection.credentials)
        probes = grpc_server(1, shared=shared)
        health_pb2_grpc.add_HealthServicer_to_server(health, probes)
        for address in ports.health:
            _listen(probes, address, None)
        sweeper = Sweeper(engine)
        sweeper.start()
        counting = Counting(engine, protection.budgets, counted.tallies)
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
        while True:
            usable = readiness.follow(engine)
            if metrics:
                metrics.ready = readiness.ready
                metrics.expires = protection.credentials.expires if protection.credentials else None
            if not usable or workers.told_to_stop(_PROBE_INTERVAL) or supervisor not in {None, os.getppid()}:
                break
            protection.follow()
            connections.make_room(most, open_ports)
        # A worker is told twice where systemd tells it too; what ends one at once is its supervisor's SIGKILL.
        hurried = workers.told_to_stop if supervisor is None else _slept
        _drain(server, health, watchers, settings.drain if usable else 0.0, hurried)
        probes.stop(None)
        counting.stop()
        sweeper.stop()
    log.info("stopped")
    return 0 if usable else 1


def _board(settings: Settings) -> Board:
    from resumed_server.metrics.board import Board  # noqa: PLC0415 - for those who ask for metrics

    return Board(settings.workers)


def _metrics(settings: Settings, ports: _Ports, worker: int, engine: Engine, held: contextlib.ExitStack) -> Metrics:
    """Return what counts what this worker does, and serve what all of them counted for as long as it is `held`."""
    from resumed_server.metrics.collector import BoardCollector  # noqa: PLC0415 - for those who ask for metrics
    from resumed_server.metrics.endpoint import Endpoint  # noqa: PLC0415
    from resumed_server.metrics.process import Metrics  # noqa: PLC0415

    board = cast("Board", ports.board)
    kind = settings.store.partition(":")[0]
    about = {"engine": kind, "front": settings.front}
    collector = BoardCollector(board, about, settings.capacity if kind == "lmdb" else 0)
    held.callback(Endpoint(ports.metrics, collector).close)
    return Metrics(board, worker, engine)


def _drain(
    server: grpc.Server | NativeServer,
    health: HealthServicer,
    watchers: Watchers,
    delay: float,
    hurried: Callable[[float], bool],
) -> None:
    """Send callers away, then let the calls in flight finish; `hurried` waits and says whether to end it at once."""
    log.info("draining", seconds=float(delay))
    health.enter_graceful_shutdown()
    hurry = hurried(delay)
    watchers.close()
    if hurry:
        server.stop(None)
        return
    stopped = server.stop(GRACE)
    while not stopped.is_set():
        if hurried(0.02):
            server.stop(None)


def _slept(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _open(settings: Settings) -> Engine:
    try:
        return open_engine(
            settings.store,
            capacity=settings.capacity,
            threads=settings.threads,
            clock=time.time,
            blame_crashes=True,
        )
    except (EngineError, OSError, ValueError) as error:
        raise UserError(f"--store: {error}") from error


def _server(
    settings: Settings,
    service: SessionStoreService,
    admin: AdminService,
    health: HealthServicer,
    *,
    most: int,
    shared: bool,
) -> grpc.Server | NativeServer:
    # Clients look for new replicas only when a connection ends; gRPC itself spreads the ages by a tenth.
    age = ("grpc.max_connection_age_ms", int(settings.max_connection_age * 1000))
    server = grpc_server(settings.threads, shared=shared, more=[age, ("grpc.max_allowed_incoming_connections", most)])
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
    names = (SERVICE_NAME, ADMIN_NAME, HEALTH_NAME, REFLECTION_NAME)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(_Reflection(names), server)
    front: grpc.Server | NativeServer = server
    if settings.front == "native":
        from resumed_server.native import NativeServer  # noqa: PLC0415 - an extra that grpcio's front does without

        front = NativeServer(server, settings.threads, shared=shared)
    session_store_pb2_grpc.add_SessionStoreServiceServicer_to_server(
        service,
        front,  # type: ignore[arg-type] # NativeServer has all of grpc.Server that this uses
    )
    return front


def grpc_server(threads: int, *, shared: bool, more: Sequence[tuple[str, int]] = ()) -> grpc.Server:
    """Return a gRPC server as every worker has it, without services.

    `shared` lets several processes have its port; `more` are channel arguments beside OPTIONS.
    """
    return DecodingServer(
        grpc.server(
            CallPool(threads),  # type: ignore[arg-type] # grpcio only submits to it
            options=[*OPTIONS.items(), ("grpc.so_reuseport", int(shared)), *more],
            maximum_concurrent_rpcs=_MAX_QUEUED_CALLS,
        )
    )


def _listen(server: grpc.Server | NativeServer, address: Address, credentials: Credentials | None) -> None:
    try:
        if credentials:
            # The settings are refused where the native front would have to speak TLS.
            cast("grpc.Server", server).add_secure_port(str(address), credentials.for_one_port())
        else:
            server.add_insecure_port(str(address))
    except RuntimeError as error:  # the reservation makes this rare
        raise UserError(f"--listen: cannot listen on {address}; stop what listens there or choose another") from error


def _stream_pool(name: str) -> ThreadPoolExecutor:
    """Return threads for calls that stay open: on those of the unary calls they would starve them."""
    return ThreadPoolExecutor(2, thread_name_prefix=name)


class _Reflection(ReflectionServicer):
    def ServerReflectionInfo(self, request_iterator: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return super().ServerReflectionInfo(request_iterator, context)

    ServerReflectionInfo.experimental_thread_pool = _stream_pool("reflection")  # type: ignore[attr-defined]


class _Protection:
    """What stands before the sessions: TLS and grants, if the settings have them, and limits. Follows their files."""

    def __init__(self, settings: Settings, counted: Shared) -> None:
        self.credentials: Credentials | None = None
        self.access: Access = Anybody()
        self.budgets = Budgets(settings.namespace_limit, None, counted)
        self._files: list[Followed[Any]] = []
        if settings.tls_cert:
            tls = credentials.followed(settings.tls_cert, settings.tls_key, settings.client_ca)
            self.credentials = Credentials(tls, renewal=settings.max_connection_age)
            self._files.append(tls)
        if settings.grants:
            granted = grants.followed(settings.grants)
            self.budgets = Budgets(settings.namespace_limit, granted, counted)
            self.access = Granted(granted, self.budgets)
            self._files.append(granted)

    def follow(self) -> None:
        """Look at the files once."""
        for files in self._files:
            files.follow()


class _Readiness:
    """Makes health say whether the engine answers; one log line per change."""

    def __init__(self, health: HealthServicer) -> None:
        self._health = health
        self._ready: bool | None = None  # nobody knows
        self._set(HealthCheckResponse.NOT_SERVING)
        health.set(LIVENESS, HealthCheckResponse.SERVING)

    def follow(self, engine: Engine) -> bool:
        """Ask the engine once; return False if it never will be ready again."""
        try:
            engine.probe()
        except Exception as error:  # noqa: BLE001 - whatever it is, this server cannot serve now
            if self._ready is not False:
                log.warning("not ready", **cause_of(error))
            self._ready = False
            self._set(HealthCheckResponse.NOT_SERVING)
            return not isinstance(error, EngineBroken)
        else:
            if not self._ready:
                log.info("ready")
            self._ready = True
            self._set(HealthCheckResponse.SERVING)
            return True

    @property
    def ready(self) -> bool:
        """Whether the engine answered when it was asked last."""
        return bool(self._ready)

    def _set(self, status: int) -> None:
        for name in (OVERALL_HEALTH, SERVICE_NAME):
            self._health.set(name, status)
