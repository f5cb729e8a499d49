"""Build the gRPC servers: options, services, listen addresses."""

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
from resumed_server.rpc.executor import CallExecutor, ConcurrencyLimit, NullLoadObserver
from resumed_server.rpc.grpc_server import GrpcServer
from resumed_server.rpc.session_service import SERVICE_NAME
from resumed_server.rpc.validation import MAX_MESSAGE
from resumed_server.stream_limit import StreamLimit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resumed_server.auth.tls import ServerCertificates
    from resumed_server.config.settings import Settings
    from resumed_server.config.types import Address
    from resumed_server.rpc.admin_service import AdminService
    from resumed_server.rpc.executor import LoadObserver
    from resumed_server.rpc.health_service import HealthService
    from resumed_server.rpc.native_server import NativeServer
    from resumed_server.rpc.session_service import SessionStoreService

_MAX_CALLS = 4_096
"""Maximum number of calls in flight: about half a second of work. A caller that waits longer has given up."""
OPTIONS = {
    "grpc.max_receive_message_length": MAX_MESSAGE,
    "grpc.max_send_message_length": MAX_MESSAGE,
    "grpc.max_connection_age_grace_ms": 30_000,
    # The server disconnects a client that pings more often than every 10 s, with too_many_pings.
    "grpc.http2.min_ping_interval_without_data_ms": 10_000,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.keepalive_time_ms": 60_000,
    "grpc.keepalive_timeout_ms": 20_000,
    # Maximum number of calls in flight per connection; further ones wait in the client.
    "grpc.max_concurrent_streams": 128,
    # Close connections that do not complete the (TLS) handshake within 10 s.
    "grpc.server_handshake_timeout_ms": 10_000,
    # Keep these above _MAX_CALLS: that limit rejects calls with RESOURCE_EXHAUSTED, these limits with CANCELLED.
    "grpc.server.max_pending_requests": 16_384,
    "grpc.server.max_pending_requests_hard_limit": 16_384,
}
_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
_MAX_REFLECTIONS = 16
"""Maximum number of reflection streams of a process; beyond it the oldest is cancelled."""
_ADMIN_NAME = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name


def build_session_server(
    settings: Settings,
    service: SessionStoreService,
    admin: AdminService,
    health: HealthService,
    *,
    load: LoadObserver | None,
    max_connections: int,
    shared: bool,
    use_executor: bool = True,
) -> grpc.Server | NativeServer:
    """Return the server of all services, as the settings configure it, without addresses.

    Args:
        settings: The settings of the server.
        service: The RPCs of frontends.
        admin: The RPCs of operators.
        health: The RPCs of health checks.
        load: Is notified of the server's load.
        max_connections: Maximum number of connections.
        shared: Whether several processes may listen at its addresses.
        use_executor: Whether to use CallExecutor, which needs grpcio's private names.
    """
    # Clients discover new replicas only when a connection ends. gRPC itself varies the age by a tenth.
    age = ("grpc.max_connection_age_ms", int(settings.max_connection_age * 1000))
    options = [age, ("grpc.max_allowed_incoming_connections", max_connections)]
    server = build_grpc_server(settings.threads, shared=shared, options=options, load=load, use_executor=use_executor)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
    names = (SERVICE_NAME, _ADMIN_NAME, HEALTH_NAME, REFLECTION_NAME)
    reflection = _Reflection(names)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflection, server)
    # grpcio-reflection has v1alpha only, and some tools call v1. Both have the same messages.
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_registered_method_handlers(_REFLECTION_V1, {"ServerReflectionInfo": handler})
    transport: grpc.Server | NativeServer = server
    if settings.transport == "native":
        from resumed_server.rpc.native_server import NativeServer  # noqa: PLC0415 - an extra that grpcio does not need

        transport = NativeServer(server, settings.threads, shared=shared, metadata=settings.otel)
    session_store_pb2_grpc.add_SessionStoreServiceServicer_to_server(
        service,
        transport,  # type: ignore[arg-type] # NativeServer has every method of grpc.Server that this uses
    )
    return transport


def build_health_server(health: HealthService, *, shared: bool, use_executor: bool = True) -> grpc.Server:
    """Return a server with the health service only; see build_session_server()."""
    server = build_grpc_server(1, shared=shared, use_executor=use_executor)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    return server


def build_grpc_server(
    threads: int,
    *,
    shared: bool,
    options: Sequence[tuple[str, int]] = (),
    load: LoadObserver | None = None,
    use_executor: bool = True,
) -> grpc.Server:
    """Return a gRPC server without services; `options` are channel arguments in addition to OPTIONS."""
    load = load or NullLoadObserver()
    executor = CallExecutor(threads, load=load) if use_executor else None
    server = grpc.server(
        executor or ThreadPoolExecutor(threads, "call"),  # type: ignore[arg-type] # grpcio only submits to it
        options=[*OPTIONS.items(), ("grpc.so_reuseport", int(shared)), *options],
        maximum_concurrent_rpcs=ConcurrencyLimit(_MAX_CALLS, load),
    )
    return GrpcServer(server, executor)


def listen(server: grpc.Server | NativeServer, address: Address, certificates: ServerCertificates | None) -> None:
    """Listen at an address, with TLS if there are certificates.

    Raises:
        UserError: The address is in use or not available.
    """
    try:
        if certificates:
            # The validation of the settings rejects TLS with the native transport.
            cast("grpc.Server", server).add_secure_port(str(address), certificates.for_listener())
        else:
            server.add_insecure_port(str(address))
    except RuntimeError as error:  # rare, because the address was reserved before
        raise UserError(
            f"--listen: cannot listen on {address}; stop the process that listens there or choose another address"
        ) from error


class _Reflection(ReflectionServicer):
    _streams = StreamLimit(_MAX_REFLECTIONS)

    def ServerReflectionInfo(self, request_iterator: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        with self._streams.admit(context.cancel):
            yield from super().ServerReflectionInfo(request_iterator, context)

    # An executor of its own, because open streams would occupy the threads of unary calls. It has a few threads more
    # than streams, for those that are being cancelled.
    ServerReflectionInfo.executor = ThreadPoolExecutor(_MAX_REFLECTIONS + 8, "reflection")  # type: ignore[attr-defined]
