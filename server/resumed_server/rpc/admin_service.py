"""AdminService: Purge and Stats. They take long, so they run in threads of their own."""
# ruff: noqa: N802 - the methods are named as in the contract

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import structlog

from resumed.v1 import admin_pb2 as pb
from resumed.v1.admin_pb2_grpc import AdminServiceServicer
from resumed_server.auth.authorizer import AllowAll, admit, describe_caller
from resumed_server.auth.grants import ALL_NAMESPACES
from resumed_server.rpc.encoding import write_time
from resumed_server.rpc.handlers import unary_handler
from resumed_server.rpc.observer import NullObserver
from resumed_server.rpc.validation import (
    MAX_PAGE_SIZE,
    MAX_PAGE_TOKEN,
    InvalidField,
    seconds_of,
    validate_namespace,
)

if TYPE_CHECKING:
    from grpc import ServicerContext

    from resumed_server.auth.authorizer import Authorizer
    from resumed_server.rpc.observer import Observer
    from resumed_server.storage.engine import Engine, NamespaceUsage

_THREADS = 2

_log = structlog.get_logger()


class AdminService(AdminServiceServicer):
    """The RPCs of operators.

    Args:
        engine: Stores the sessions.
        authorizer: Authenticates callers and authorizes their operations; default: AllowAll.
        observer: Is notified of each call.
    """

    def __init__(self, engine: Engine, authorizer: Authorizer | None = None, observer: Observer | None = None) -> None:
        self._engine = engine
        self._authorizer = authorizer or AllowAll()
        self.observer = observer or NullObserver()

    @unary_handler
    def Purge(self, request: pb.PurgeRequest, context: ServicerContext) -> pb.PurgeResponse:
        """Remove all sessions of a namespace that were issued before a time."""
        caller = admit(self._authorizer, context)
        namespace = request.namespace
        validate_namespace(namespace)
        before = (
            seconds_of(request.issued_before_time, "issued_before_time")
            if request.HasField("issued_before_time")
            else None
        )
        if before is not None and before > time.time():
            raise InvalidField("issued_before_time", "must not lie ahead of the server's clock; leave it out for now")
        caller.authorize("purge", namespace)
        cutoff = self._engine.purge(namespace, before)
        _log.warning(
            "namespace purged",
            namespace=namespace,
            issued_before=_format_time(cutoff),
            identity=describe_caller(context),
            peer=context.peer(),
        )
        response = pb.PurgeResponse()
        write_time(response.issued_before_time, cutoff)
        return response

    @unary_handler
    def Stats(self, request: pb.StatsRequest, context: ServicerContext) -> pb.StatsResponse:
        """Count the sessions of one namespace, or of each namespace."""
        caller = admit(self._authorizer, context)
        namespace = request.namespace or None
        if namespace:
            validate_namespace(namespace)
        if request.page_size < 0:
            raise InvalidField("page_size", "must not be negative")
        if len(request.page_token) > MAX_PAGE_TOKEN:
            raise InvalidField("page_token", "must be a next_page_token")
        caller.authorize("stats", namespace or ALL_NAMESPACES)
        usages = sorted(each for each in self._engine.usage(namespace).items() if each[0] > request.page_token)
        size = min(request.page_size or MAX_PAGE_SIZE, MAX_PAGE_SIZE)
        response = pb.StatsResponse()
        for name, usage in usages[:size]:
            _write_usage(response.namespaces.add(namespace=name), usage)
        if len(usages) > size:
            response.next_page_token = usages[size - 1][0]
        return response

    # Threads that serve no sessions.
    Purge.executor = ThreadPoolExecutor(_THREADS, "admin")  # type: ignore[attr-defined]
    Stats.executor = ThreadPoolExecutor(_THREADS, "admin")  # type: ignore[attr-defined]


def _write_usage(stats: pb.NamespaceStats, usage: NamespaceUsage) -> None:
    stats.session_count = usage.sessions
    stats.value_bytes = usage.value_bytes
    stats.tombstone_count = usage.tombstones
    stats.purged_count = usage.pending_deletion
    if usage.issued_before is not None:
        write_time(stats.issued_before_time, usage.issued_before)


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()
