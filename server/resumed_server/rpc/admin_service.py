"""The RPCs of operators: check the request, ask the engine, answer. On threads of their own, since they take long."""
# ruff: noqa: N802 - the methods are named as in the contract

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import TYPE_CHECKING, TypeVar

import structlog

from resumed.v1 import admin_pb2 as pb
from resumed.v1.admin_pb2_grpc import AdminServiceServicer
from resumed_server.auth.authorizer import Anybody, admitted
from resumed_server.rpc.handlers import InvalidField, Unobserved, answered
from resumed_server.rpc.session_service import MAX_NAMESPACE, NAMESPACE_LIMIT, is_namespace, seconds_of, write_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from grpc import ServicerContext

    from resumed_server.auth.authorizer import Access
    from resumed_server.rpc.handlers import Observer
    from resumed_server.storage.engine import Engine, NamespaceUsage

_EVERY_NAMESPACE = "*"
"""What a grant must be for who asks about all of them. No namespace is called so."""
_LARGEST_PAGE = 10_000
_THREADS = 2

_Rpc = TypeVar("_Rpc", bound="Callable[..., object]")

_log = structlog.get_logger()


def _apart(rpc: _Rpc) -> _Rpc:
    """Answer an RPC on threads that no session waits for."""
    rpc.threads = ThreadPoolExecutor(_THREADS, "admin")  # type: ignore[attr-defined]
    return rpc


class AdminService(AdminServiceServicer):
    """Serves operators of an engine, those whom `access` lets in; `observer` is told of every call."""

    def __init__(self, engine: Engine, access: Access | None = None, observer: Observer | None = None) -> None:
        self._engine = engine
        self._access = access or Anybody()
        self.observer = observer or Unobserved()

    @_apart
    @answered
    def Purge(self, request: pb.PurgeRequest, context: ServicerContext) -> pb.PurgeResponse:
        """End all sessions of a namespace that were issued before a time."""
        caller = admitted(self._access, context)
        namespace = _named(request.namespace)
        before = (
            seconds_of(request.issued_before_time, "issued_before_time")
            if request.HasField("issued_before_time")
            else None
        )
        if before is not None and before > time.time():
            raise InvalidField("issued_before_time", "must not lie ahead of the server's clock; leave it out for now")
        caller.demand("purge", namespace)
        mark = self._engine.purge(namespace, before)
        _log.warning("namespace purged", namespace=namespace, issued_before=_shown(mark))
        response = pb.PurgeResponse()
        write_time(response.issued_before_time, mark)
        return response

    @_apart
    @answered
    def Stats(self, request: pb.StatsRequest, context: ServicerContext) -> pb.StatsResponse:
        """Count what there is of a namespace, or of all."""
        caller = admitted(self._access, context)
        namespace = _named(request.namespace) if request.namespace else None
        if request.page_size < 0:
            raise InvalidField("page_size", "must not be negative")
        if len(request.page_token) > MAX_NAMESPACE:
            raise InvalidField("page_token", "must be a next_page_token")
        caller.demand("stats", namespace or _EVERY_NAMESPACE)
        found = sorted(each for each in self._engine.usage(namespace).items() if each[0] > request.page_token)
        size = min(request.page_size or _LARGEST_PAGE, _LARGEST_PAGE)
        response = pb.StatsResponse()
        for name, usage in found[:size]:
            _write_usage(response.namespaces.add(namespace=name), usage)
        if len(found) > size:
            response.next_page_token = found[size - 1][0]
        return response


def _named(namespace: str) -> str:
    if not is_namespace(namespace):
        raise InvalidField("namespace", NAMESPACE_LIMIT)
    return namespace


def _write_usage(stats: pb.NamespaceStats, usage: NamespaceUsage) -> None:
    stats.session_count = usage.sessions
    stats.value_bytes = usage.value_bytes
    stats.tombstone_count = usage.tombstones
    stats.purged_count = usage.pending_deletion
    if usage.issued_before is not None:
        write_time(stats.issued_before_time, usage.issued_before)


def _shown(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()
