"""The RPCs: check the request, call the engine, answer. Knows gRPC's messages, and nothing of storage.

Every microsecond of Get counts (see docs/measurements.md), so fields are checked by hand.
"""
# ruff: noqa: N802 - the methods are named as in the contract

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Protocol, cast

from google.protobuf.duration_pb2 import Duration

from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceServicer
from resumed_server.access import Anybody, NotGranted
from resumed_server.engines import base
from resumed_server.errors import InvalidField, answered, status_of, streamed

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from grpc import ServicerContext

    from resumed_server.access import Access, Caller
    from resumed_server.engines.base import Engine, Operation, Outcome, StoredSession
    from resumed_server.watchers import Message, Watchers

MAX_KEY = 64
MAX_VALUE = 65_536
MAX_POSITION = 64
MAX_OPERATIONS = 256
MAX_MESSAGE = MAX_OPERATIONS * (MAX_VALUE + 256)
"""Bytes that the largest legal message, a full Batch of full values, may take on the wire."""

_MAX_SECONDS, _MAX_NANOS = 315_576_000_000, 999_999_999
"""What a google.protobuf.Duration may have."""
NAMESPACE_LIMIT = "must be 1 to 63 characters of [a-z0-9.-]"
_is_namespace = re.compile(r"[a-z0-9.-]{1,63}").fullmatch


class _Addressed(Protocol):
    @property
    def namespace(self) -> str: ...
    @property
    def key(self) -> bytes: ...


class SessionStoreService(SessionStoreServiceServicer):
    """Serves the sessions of an engine and its watchers to those whom `access` lets in.

    `max_ttl` is the longest that a session lives, in seconds.
    """

    def __init__(self, engine: Engine, watchers: Watchers, max_ttl: float, access: Access | None = None) -> None:
        self._engine = engine
        self._watchers = watchers
        self._max_ttl = max_ttl
        self._access = access or Anybody()

    @answered
    def Put(self, request: pb.PutRequest, context: ServicerContext) -> pb.PutResponse:
        """Store a session."""
        operation = self._put(request, self._access.caller(context))
        ttl = self._engine.put(operation.namespace, operation.key, operation.value, operation.ttl)
        return pb.PutResponse(ttl=_duration(ttl))

    @answered
    def Get(self, request: pb.GetRequest, context: ServicerContext) -> pb.GetResponse:
        """Return a session."""
        address = _address(request, "get", self._access.caller(context))
        return pb.GetResponse(session=_session(self._engine.get(*address)))

    @answered
    def Take(self, request: pb.TakeRequest, context: ServicerContext) -> pb.TakeResponse:
        """Return a session and remove it."""
        address = _address(request, "take", self._access.caller(context))
        return pb.TakeResponse(session=_session(self._engine.take(*address)))

    @answered
    def Remove(self, request: pb.RemoveRequest, context: ServicerContext) -> pb.RemoveResponse:
        """Remove a session."""
        address = _address(request, "remove", self._access.caller(context))
        return pb.RemoveResponse(removed=self._engine.remove(*address))

    @answered
    def Batch(self, request: pb.BatchRequest, context: ServicerContext) -> pb.BatchResponse:
        """Carry out the valid and granted operations in one go; each of the others gets its own error."""
        caller = self._access.caller(context)
        if not 1 <= len(request.operations) <= MAX_OPERATIONS:
            raise InvalidField("operations", f"must hold 1 to {MAX_OPERATIONS}")
        checked = [self._checked(operation, caller) for operation in request.operations]
        valid = [operation for operation in checked if not isinstance(operation, Exception)]
        outcomes = iter(self._engine.batch(valid) if valid else ())
        return pb.BatchResponse(
            results=[
                _result(operation, operation if isinstance(operation, Exception) else next(outcomes))
                for operation in checked
            ]
        )

    @streamed
    def Watch(self, request: pb.WatchRequest, context: ServicerContext) -> Iterator[pb.WatchResponse]:
        """Stream what happens in a namespace, for as long as the caller may watch it."""
        caller = self._access.caller(context)
        if not _is_namespace(request.namespace):
            raise InvalidField("namespace", NAMESPACE_LIMIT)
        if len(request.position) > MAX_POSITION:
            raise InvalidField("position", f"must be at most {MAX_POSITION} bytes")
        caller.demand("watch", request.namespace)
        with contextlib.closing(self._news(request)) as news:
            for answer in news:  # at least one a second
                self._access.caller(context).demand("watch", request.namespace)
                yield answer

    def _news(self, request: pb.WatchRequest) -> Generator[pb.WatchResponse, None, None]:
        with self._watchers.subscribed(request.namespace) as subscription:
            continued = False
            for message in self._watchers.missed(request.position, subscription) if request.position else ():
                yield _watched(message, continued=not continued)
                continued = True
            yield pb.WatchResponse(position=subscription.position, live=True)
            for news in subscription.messages():
                yield _shared(news) if news else pb.WatchResponse(live=True)

    def _checked(self, operation: pb.Operation, caller: Caller) -> Operation | Exception:
        try:
            if operation.HasField("put"):
                return self._put(operation.put, caller)
            if operation.HasField("get"):
                return base.Get(*_address(operation.get, "get", caller))
            if operation.HasField("take"):
                return base.Take(*_address(operation.take, "take", caller))
            if operation.HasField("remove"):
                return base.Remove(*_address(operation.remove, "remove", caller))
        except (InvalidField, NotGranted) as error:
            return error
        return InvalidField("operation", "must be one of put, get, take and remove")

    def _put(self, request: pb.PutRequest, caller: Caller) -> base.Put:
        namespace, key = _address(request, "put", caller)
        value, ttl = request.value, request.ttl
        if not 1 <= len(value) <= MAX_VALUE:
            raise InvalidField("value", f"must be 1 to {MAX_VALUE} bytes")
        # A Duration carries its sign in both parts, so this refuses negative ones; a missing one reads as zero.
        if not (0 <= ttl.seconds <= _MAX_SECONDS and 0 <= ttl.nanos <= _MAX_NANOS and (ttl.seconds or ttl.nanos)):
            raise InvalidField("ttl", "must be a duration above zero")
        return base.Put(namespace, key, value, min(ttl.seconds + ttl.nanos / 1e9, self._max_ttl))


def _address(request: _Addressed, operation: str, caller: Caller) -> tuple[str, bytes]:
    """Return the address of a session on which `caller` may carry out `operation`."""
    namespace, key = request.namespace, request.key
    if not _is_namespace(namespace):
        raise InvalidField("namespace", NAMESPACE_LIMIT)
    if not 1 <= len(key) <= MAX_KEY:
        raise InvalidField("key", f"must be 1 to {MAX_KEY} bytes")
    caller.demand(operation, namespace)
    return namespace, key


def _watched(message: Message, *, continued: bool = False, live: bool = False) -> pb.WatchResponse:
    events = [_event(change) for change in message.changes]
    return pb.WatchResponse(events=events, position=message.position, continued=continued, live=live)


def _shared(message: Message) -> pb.WatchResponse:
    """Return the answer that carries `message`, the same one for all watchers of a namespace."""
    if message.encoded is None:
        message.encoded = _watched(message, live=True)
    return cast("pb.WatchResponse", message.encoded)


def _event(change: base.Change) -> pb.Event:
    if change.session is None:
        return pb.Event(removed=pb.Event.Removed(key=change.key))
    return pb.Event(put=pb.Event.Put(key=change.key, session=_session(change.session)))


def _result(operation: Operation | Exception, outcome: Outcome | Exception) -> pb.Result:
    """Return the answer to `operation`, which decides the type of its outcome (see `engines.base`)."""
    if isinstance(outcome, Exception):
        return pb.Result(error=status_of(outcome, operation))
    if isinstance(operation, base.Put):
        return pb.Result(put=pb.PutResponse(ttl=_duration(cast("float", outcome))))
    if isinstance(operation, base.Remove):
        return pb.Result(remove=pb.RemoveResponse(removed=cast("bool", outcome)))
    session = _session(cast("StoredSession | None", outcome))
    if isinstance(operation, base.Get):
        return pb.Result(get=pb.GetResponse(session=session))
    return pb.Result(take=pb.TakeResponse(session=session))


def _session(stored: StoredSession | None) -> pb.Session | None:
    return None if stored is None else pb.Session(value=stored.value, ttl=_duration(stored.ttl))


def _duration(seconds: float) -> Duration:
    whole = int(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))
