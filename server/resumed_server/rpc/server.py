"""What speaks gRPC to clients: servers with their options, their services, and the addresses where they listen."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_NAME
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION_NAME
from grpc_reflection.v1alpha.reflection import ReflectionServicer

from resumed.v1 import admin_pb2, admin_pb2_grpc, session_store_pb2_grpc
from resumed_server.errors import UserError
from resumed_server.places import Places
from resumed_server.rpc.executor import CallPool, Most, Unmeasured
from resumed_server.rpc.parting import PartingServer
from resumed_server.rpc.plain_server import PlainServer
from resumed_server.rpc.session_service import MAX_MESSAGE, SERVICE_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resumed_server.auth.tls import Credentials
    from resumed_server.config.settings import Settings
    from resumed_server.config.types import Address
    from resumed_server.rpc.admin_service import AdminService
    from resumed_server.rpc.executor import Load
    from resumed_server.rpc.health_service import Health
    from resumed_server.rpc.native_server import NativeServer
    from resumed_server.rpc.session_service import SessionStoreService

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
_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
_MOST_REFLECTIONS = 16
"""Reflection streams of a process; beyond that the oldest is ended."""
_ADMIN_NAME = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name


def session_server(
    settings: Settings,
    service: SessionStoreService,
    admin: AdminService,
    health: Health,
    *,
    load: Load | None,
    most: int,
    shared: bool,
    plain: bool = False,
) -> grpc.Server | NativeServer:
    """Return the server of all services, as the settings want it, without addresses.

    Args:
        settings: What the server is told.
        service: The RPCs of frontends.
        admin: The RPCs of operators.
        health: What answers probes.
        load: Is told how busy it is.
        most: How many connections there may be.
        shared: Whether several processes may have its ports.
        plain: Whether to do without grpcio's private names.
    """
    # Clients look for new replicas only when a connection ends; gRPC itself spreads the ages by a tenth.
    age = ("grpc.max_connection_age_ms", int(settings.max_connection_age * 1000))
    more = [age, ("grpc.max_allowed_incoming_connections", most)]
    server = grpc_server(settings.threads, shared=shared, more=more, load=load, plain=plain)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
    names = (SERVICE_NAME, _ADMIN_NAME, HEALTH_NAME, REFLECTION_NAME)
    reflection = _Reflection(names)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflection, server)
    # grpcio-reflection has v1alpha alone, and other tools ask for v1; both have the same messages.
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_registered_method_handlers(_REFLECTION_V1, {"ServerReflectionInfo": handler})
    front: grpc.Server | NativeServer = server
    if settings.transport == "native":
        from resumed_server.rpc.native_server import NativeServer  # noqa: PLC0415 - an extra that grpcio's front does without

        front = NativeServer(server, settings.threads, shared=shared, metadata=settings.otel)
    session_store_pb2_grpc.add_SessionStoreServiceServicer_to_server(
        service,
        front,  # type: ignore[arg-type] # NativeServer has all of grpc.Server that this uses
    )
    return front


def probe_server(health: Health, *, shared: bool, plain: bool = False) -> grpc.Server:
    """Return a server that says how this one is, and nothing else; see session_server()."""
    server = grpc_server(1, shared=shared, plain=plain)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    return server


def grpc_server(
    threads: int,
    *,
    shared: bool,
    more: Sequence[tuple[str, int]] = (),
    load: Load | None = None,
    plain: bool = False,
) -> grpc.Server:
    """Return a gRPC server as every worker has it, without services.

    `shared` lets several processes have its port; `more` are channel arguments beside OPTIONS; `plain` is a server that
    does without grpcio's private names.
    """
    load = load or Unmeasured()
    pool = None if plain else CallPool(threads, load=load)
    server = grpc.server(
        pool or ThreadPoolExecutor(threads, "call"),  # type: ignore[arg-type] # grpcio only submits to it
        options=[*OPTIONS.items(), ("grpc.so_reuseport", int(shared)), *more],
        maximum_concurrent_rpcs=Most(_MAX_QUEUED_CALLS, load),
    )
    return PartingServer(server, pool) if pool else PlainServer(server)


def listen(server: grpc.Server | NativeServer, address: Address, credentials: Credentials | None) -> None:
    """Have a server listen at an address, with TLS if there are credentials.

    Raises:
        UserError: The address cannot be had.
    """
    try:
        if credentials:
            # The settings are refused where the native front would have to speak TLS.
            cast("grpc.Server", server).add_secure_port(str(address), credentials.for_one_port())
        else:
            server.add_insecure_port(str(address))
    except RuntimeError as error:  # the reservation makes this rare
        raise UserError(f"--listen: cannot listen on {address}; stop what listens there or choose another") from error


class _Reflection(ReflectionServicer):
    _places = Places(_MOST_REFLECTIONS)

    def ServerReflectionInfo(self, request_iterator: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        with self._places.taken(context.cancel):
            yield from super().ServerReflectionInfo(request_iterator, context)

    # Threads of its own, or open streams would take those of the unary calls. Some more than there are places, for
    # those that are just being ended.
    ServerReflectionInfo.threads = ThreadPoolExecutor(_MOST_REFLECTIONS + 8, "reflection")  # type: ignore[attr-defined]
