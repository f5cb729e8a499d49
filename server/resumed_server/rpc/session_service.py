"""SessionStoreService: validate a request, call the engine, encode the response.

It is the hot path (see benchmarks/results/server.md), so it validates fields by hand and encodes responses field by
field, which takes half the time of building nested messages from keyword arguments.
"""
# ruff: noqa: N802 - the methods are named as in the contract

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceServicer
from resumed_server.auth.authorizer import AllowAll, NotGranted, admit
from resumed_server.limits.enforcer import LimitEnforcer, LimitExceeded
from resumed_server.rpc.encoding import encode_once, fill_response, watch_response, write_result, write_ttl
from resumed_server.rpc.handlers import stream_handler, unary_handler
from resumed_server.rpc.observer import NullObserver
from resumed_server.rpc.validation import (
    MAX_KEY,
    MAX_OPERATIONS,
    MAX_PINNED_VALUE,
    MAX_POSITION,
    MAX_VALUE,
    InvalidField,
    seconds_of,
    ttl_seconds,
    validate_namespace,
)
from resumed_server.storage import engine as storage
from resumed_server.watch.subscription import Topic

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from grpc import ServicerContext

    from resumed_server.auth.authorizer import Authorizer, Caller
    from resumed_server.limits.enforcer import LimitState
    from resumed_server.rpc.observer import Observer
    from resumed_server.storage.engine import Engine, Operation, Outcome
    from resumed_server.watch.hub import WatchHub

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["SessionStoreService"].full_name
_MAY_ADD_ENTRY = storage.Put | storage.Remove
"""Operations that may add a session or a tombstone. (A Take replaces its session by a tombstone.)"""


class SessionStoreService(SessionStoreServiceServicer):
    """The RPCs of frontends.

    Args:
        engine: Stores the sessions.
        hub: Serves the Watch streams.
        max_ttl: Maximum lifetime of a session, in seconds; longer ones are shortened.
        authorizer: Authenticates callers and authorizes their operations; default: AllowAll.
        enforcer: The limits of namespaces; default: none.
        observer: Is notified of each call.
    """

    def __init__(
        self,
        engine: Engine,
        hub: WatchHub,
        max_ttl: float,
        *,
        authorizer: Authorizer | None = None,
        enforcer: LimitEnforcer | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._engine = engine
        self._hub = hub
        self._max_ttl = max_ttl
        self._authorizer = authorizer or AllowAll()
        self._enforcer = enforcer or LimitEnforcer()
        self.observer = observer or NullObserver()

    @unary_handler
    def Put(self, request: pb.PutRequest, context: ServicerContext) -> pb.PutResponse:
        """Store a session."""
        put = self._validate_put(request, admit(self._authorizer, context))
        self._acquire("put", put.namespace)
        if rejection := self._admit_entry(put):
            raise rejection
        ttl: storage.Outcome = None
        try:
            ttl = self._engine.put(put.namespace, put.key, put.value, put.ttl, put.issued_at, pinned=put.pinned)
        finally:
            self._release_unless_added(put, ttl)
        response = pb.PutResponse()
        write_ttl(response.ttl, ttl)
        return response

    @unary_handler
    def Get(self, request: pb.GetRequest, context: ServicerContext) -> pb.GetResponse:
        """Return a session."""
        ref = _validate_ref(request, "get", admit(self._authorizer, context))
        self._acquire("get", ref[0])
        return fill_response(pb.GetResponse(), self._engine.get(*ref))

    @unary_handler
    def Take(self, request: pb.TakeRequest, context: ServicerContext) -> pb.TakeResponse:
        """Return a session and remove it."""
        ref = _validate_ref(request, "take", admit(self._authorizer, context))
        self._acquire("take", ref[0])
        return fill_response(pb.TakeResponse(), self._engine.take(*ref))

    @unary_handler
    def Remove(self, request: pb.RemoveRequest, context: ServicerContext) -> pb.RemoveResponse:
        """Remove a session."""
        remove = _validate_remove(request, admit(self._authorizer, context))
        self._acquire("remove", remove.namespace)
        rejection = self._admit_entry(remove)
        removed: storage.Outcome = None
        try:
            removed = self._engine.remove(remove.namespace, remove.key, ttl=remove.ttl, tombstone=rejection is None)
        except storage.NoTombstone as error:
            raise (rejection or error) from None
        finally:
            if rejection is None:
                self._release_unless_added(remove, removed)
        return pb.RemoveResponse(removed=bool(removed))

    @unary_handler
    def Batch(self, request: pb.BatchRequest, context: ServicerContext) -> pb.BatchResponse:
        """Execute the valid and granted operations together; each of the others gets its own error."""
        caller = admit(self._authorizer, context, len(request.operations))
        if not 1 <= len(request.operations) <= MAX_OPERATIONS:
            raise InvalidField("operations", f"must have 1 to {MAX_OPERATIONS} items")
        operations = list(self._validate_operations(request.operations, caller))
        self._acquire_all([each for each in operations if not isinstance(each, Exception)])
        rejections = list(map(self._admit_entry, operations))
        operations = list(map(_apply_rejection, operations, rejections))
        outcomes = iter(self._execute([each for each in operations if not isinstance(each, Exception)]))
        response = pb.BatchResponse()
        results = response.results
        for operation, rejection in zip(operations, rejections, strict=True):
            outcome = operation if isinstance(operation, Exception) else next(outcomes)
            write_result(results.add(), operation, rejection if isinstance(outcome, storage.NoTombstone) else outcome)
        return response

    @stream_handler
    def Watch(self, request: pb.WatchRequest, context: ServicerContext) -> Iterator[pb.WatchResponse]:
        """Stream the changes of a namespace, for as long as the caller is granted it."""
        caller = admit(self._authorizer, context)
        validate_namespace(request.namespace)
        if len(request.position) > MAX_POSITION:
            raise InvalidField("position", f"must be at most {MAX_POSITION} bytes")
        caller.authorize("watch", request.namespace)
        limits = [each for each in (caller.limit, self._enforcer.for_namespace(request.namespace)) if each]
        with contextlib.closing(self._stream_changes(request, limits, context.cancel)) as responses:
            for response in responses:  # at least one a second
                self._authorizer.authenticate(context).authorize("watch", request.namespace)
                yield response

    def _acquire(self, operation: str, namespace: str) -> None:
        """Count one operation for the limit of its namespace, or raise LimitExceeded."""
        limit = self._enforcer.for_namespace(namespace)
        try:
            if limit:
                limit.acquire(1)
        except LimitExceeded:
            self.observer.on_limited(operation, namespace)
            raise

    def _acquire_all(self, operations: Sequence[Operation]) -> None:
        """Count all operations of a Batch; raise LimitExceeded if any namespace exceeds its rate."""
        try:
            for namespace, count in Counter(each.namespace for each in operations).items():
                limit = self._enforcer.for_namespace(namespace)
                if limit:
                    limit.acquire(count)
        except LimitExceeded:
            for each in operations:
                self.observer.on_limited(type(each).__name__.lower(), each.namespace)
            raise

    def _admit_entry(self, operation: Operation | Exception) -> LimitExceeded | None:
        """Count the session or tombstone that an operation may add; return the error if it may add none."""
        if not isinstance(operation, _MAY_ADD_ENTRY):
            return None
        limit = self._enforcer.for_namespace(operation.namespace)
        try:
            if limit:
                limit.admit_entry(_value_size(operation))
        except LimitExceeded as error:
            if isinstance(operation, storage.Put):  # a Remove may still remove a session
                self.observer.on_limited("put", operation.namespace)
            return error
        return None

    def _release_unless_added(self, operation: Operation, outcome: Outcome) -> None:
        """Subtract the entry that _admit_entry() counted, unless the engine has added it."""
        admitted = isinstance(operation, storage.Put) or (isinstance(operation, storage.Remove) and operation.tombstone)
        if admitted and not _has_added_entry(outcome):
            limit = self._enforcer.for_namespace(operation.namespace)
            if limit:
                limit.release_entry(_value_size(operation))

    def _execute(self, operations: Sequence[Operation]) -> Sequence[Outcome]:
        """Return the outcomes of admitted operations."""
        outcomes: Sequence[Outcome] = [None] * len(operations)
        try:
            if operations:
                outcomes = self._engine.batch(operations)
        finally:
            for operation, outcome in zip(operations, outcomes, strict=True):
                self._release_unless_added(operation, outcome)
        return outcomes

    def _stream_changes(
        self, request: pb.WatchRequest, limits: Sequence[LimitState], cancel_call: Callable[[], object]
    ) -> Generator[pb.WatchResponse, None, None]:
        topic = Topic(request.namespace, request.removals_only)
        with self._hub.subscribe(topic, limits, cancel_call) as subscription:
            first = pb.WatchResponse(removals_only=topic.removals_only)
            for message in self._hub.replay(request.position, subscription) if request.position else ():
                if first.continued:
                    yield watch_response(message)
                else:
                    first.position, first.continued = message.position, True
                    yield first
            if topic.removals_only and not first.continued:
                yield first
                yield from map(watch_response, self._hub.snapshot(subscription))
            yield pb.WatchResponse(position=subscription.position, live=True)
            yield from map(encode_once, subscription.messages())

    def _validate_operations(
        self, operations: Iterable[pb.BatchOperation], caller: Caller
    ) -> Iterator[Operation | Exception]:
        """Yield each operation, or its error if it is invalid or not granted."""
        granted: str | None = None  # the namespace of the last Get: most Batches have only one
        for index, operation in enumerate(operations):
            try:
                if operation.HasField("get"):
                    get = operation.get
                    namespace, key = get.namespace, get.key
                    if namespace != granted or not 1 <= len(key) <= MAX_KEY:
                        granted, key = _validate_ref(get, "get", caller)
                    yield storage.Get(namespace, key)
                elif operation.HasField("put"):
                    yield self._validate_put(operation.put, caller)
                elif operation.HasField("take"):
                    yield storage.Take(*_validate_ref(operation.take, "take", caller))
                elif operation.HasField("remove"):
                    yield _validate_remove(operation.remove, caller)
                else:
                    yield InvalidField(f"operations[{index}]", "must be one of put, get, take and remove")
            except InvalidField as error:
                yield error.below(f"operations[{index}].{operation.WhichOneof('operation')}")
            except NotGranted as error:
                yield error

    def _validate_put(self, request: pb.PutRequest, caller: Caller) -> storage.Put:
        namespace, key = _validate_ref(request, "put", caller)
        value = request.value
        if not 1 <= len(value) <= MAX_VALUE:
            raise InvalidField("value", f"must be 1 to {MAX_VALUE} bytes")
        if request.pinned and len(value) > MAX_PINNED_VALUE:
            raise InvalidField("value", f"must be 1 to {MAX_PINNED_VALUE} bytes if it is pinned")
        ttl = ttl_seconds(request.ttl)
        issued = seconds_of(request.issue_time, "issue_time")
        longest = storage.LONGEST_TTL_SECONDS if request.pinned else self._max_ttl
        return storage.Put(namespace, key, value, min(ttl, longest), issued or None, request.pinned)


def _apply_rejection(operation: Operation | Exception, rejection: LimitExceeded | None) -> Operation | Exception:
    """Return the part of an operation that its rejection allows: a Remove may still remove a session."""
    if rejection is None:
        return operation
    return dataclasses.replace(operation, tombstone=False) if isinstance(operation, storage.Remove) else rejection


def _value_size(operation: Operation) -> int:
    """Return the bytes of the value in the entry that an operation may add."""
    return len(operation.value) if isinstance(operation, storage.Put) else 0


def _has_added_entry(outcome: Outcome) -> bool:
    """Return whether a Put with this outcome added its session, or a Remove added a tombstone without a session."""
    if isinstance(outcome, float):
        return outcome > 0 and not isinstance(outcome, storage.Kept)
    return outcome is False


def _validate_remove(request: pb.RemoveRequest, caller: Caller) -> storage.Remove:
    ref = _validate_ref(request, "remove", caller)
    ttl = min(ttl_seconds(request.ttl), storage.LONGEST_TTL_SECONDS) if request.HasField("ttl") else None
    return storage.Remove(*ref, ttl)


def _validate_ref(
    request: pb.PutRequest | pb.GetRequest | pb.TakeRequest | pb.RemoveRequest, operation: str, caller: Caller
) -> tuple[str, bytes]:
    """Return the namespace and the key of a request, on which `caller` is granted `operation`."""
    namespace, key = request.namespace, request.key
    validate_namespace(namespace)
    if not 1 <= len(key) <= MAX_KEY:
        raise InvalidField("key", f"must be 1 to {MAX_KEY} bytes")
    caller.authorize(operation, namespace)
    return namespace, key
