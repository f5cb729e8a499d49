"""The RPCs: check the request, call the engine, answer. Knows gRPC's messages, and nothing of storage.

Every microsecond counts here (see docs/performance/server.md). So fields are checked by hand, and answers are written
field by field, which takes half the time of building the messages in them from keyword arguments.
"""
# ruff: noqa: N802 - the methods are named as in the contract

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Protocol

from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceServicer
from resumed_server.auth.authorizer import Anybody, NotGranted, admitted
from resumed_server.limits.enforcer import Budgets, LimitExceeded
from resumed_server.rpc.encoding import encode_once, fill_response, watch_response, write_result, write_ttl
from resumed_server.rpc.handlers import stream_handler, unary_handler
from resumed_server.rpc.observer import NullObserver
from resumed_server.rpc.validation import (
    MAX_KEY,
    MAX_NANOS,
    MAX_OPERATIONS,
    MAX_POSITION,
    MAX_SECONDS,
    MAX_VALUE,
    NAMESPACE_RULE,
    InvalidField,
    is_namespace,
    seconds_of,
)
from resumed_server.storage import engine as storage

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from grpc import ServicerContext

    from resumed_server.auth.authorizer import Access, Caller
    from resumed_server.limits.enforcer import Budget
    from resumed_server.rpc.observer import Observer
    from resumed_server.storage.engine import Engine, Operation, Outcome
    from resumed_server.watch.hub import Watchers

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["SessionStoreService"].full_name
_LEAVES_ENTRY = storage.Put | storage.Remove
"""What may leave a session or a tombstone where there was none. (A Take leaves one in the place of its session.)"""


class SessionRef(Protocol):
    @property
    def namespace(self) -> str: ...
    @property
    def key(self) -> bytes: ...


class SessionStoreService(SessionStoreServiceServicer):
    """Serves the sessions of an engine and its watchers to those whom `access` lets in.

    `max_ttl` is the longest that a session lives, in seconds; `observer` is told of every call.
    """

    def __init__(
        self,
        engine: Engine,
        watchers: Watchers,
        max_ttl: float,
        *,
        access: Access | None = None,
        budgets: Budgets | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._engine = engine
        self._watchers = watchers
        self._max_ttl = max_ttl
        self._access = access or Anybody()
        self._budgets = budgets or Budgets()
        self.observer = observer or NullObserver()

    @unary_handler
    def Put(self, request: pb.PutRequest, context: ServicerContext) -> pb.PutResponse:
        """Store a session."""
        put = self._put(request, admitted(self._access, context))
        self._acquire("put", put.namespace)
        if refusal := self._admit_entry(put):
            raise refusal
        ttl: storage.Outcome = None
        try:
            ttl = self._engine.put(put.namespace, put.key, put.value, put.ttl, put.issued)
        finally:
            self._release_unless_stored(put, ttl)
        response = pb.PutResponse()
        write_ttl(response.ttl, ttl)
        return response

    @unary_handler
    def Get(self, request: pb.GetRequest, context: ServicerContext) -> pb.GetResponse:
        """Return a session."""
        address = _validate_ref(request, "get", admitted(self._access, context))
        self._acquire("get", address[0])
        return fill_response(pb.GetResponse(), self._engine.get(*address))

    @unary_handler
    def Take(self, request: pb.TakeRequest, context: ServicerContext) -> pb.TakeResponse:
        """Return a session and remove it."""
        address = _validate_ref(request, "take", admitted(self._access, context))
        self._acquire("take", address[0])
        return fill_response(pb.TakeResponse(), self._engine.take(*address))

    @unary_handler
    def Remove(self, request: pb.RemoveRequest, context: ServicerContext) -> pb.RemoveResponse:
        """Remove a session."""
        remove = storage.Remove(*_validate_ref(request, "remove", admitted(self._access, context)))
        self._acquire("remove", remove.namespace)
        refusal = self._admit_entry(remove)
        removed: storage.Outcome = None
        try:
            removed = self._engine.remove(remove.namespace, remove.key, tombstone=refusal is None)
        except storage.NoTombstone as error:
            raise (refusal or error) from None
        finally:
            if refusal is None:
                self._release_unless_stored(remove, removed)
        return pb.RemoveResponse(removed=bool(removed))

    @unary_handler
    def Batch(self, request: pb.BatchRequest, context: ServicerContext) -> pb.BatchResponse:
        """Carry out the valid and granted operations in one go; each of the others gets its own error."""
        caller = admitted(self._access, context, len(request.operations))
        if not 1 <= len(request.operations) <= MAX_OPERATIONS:
            raise InvalidField("operations", f"must hold 1 to {MAX_OPERATIONS}")
        checked = list(self._validate_operations(request.operations, caller))
        self._acquire_all([each for each in checked if not isinstance(each, Exception)])
        refusals = list(map(self._admit_entry, checked))
        checked = list(map(_limit_operation, checked, refusals))
        valid = [operation for operation in checked if not isinstance(operation, Exception)]
        outcomes = iter(self._execute(valid))
        response = pb.BatchResponse()
        results = response.results
        for operation, refusal in zip(checked, refusals, strict=True):
            outcome = operation if isinstance(operation, Exception) else next(outcomes)
            write_result(results.add(), operation, refusal if isinstance(outcome, storage.NoTombstone) else outcome)
        return response

    @stream_handler
    def Watch(self, request: pb.WatchRequest, context: ServicerContext) -> Iterator[pb.WatchResponse]:
        """Stream what happens in a namespace, for as long as the caller may watch it."""
        caller = admitted(self._access, context)
        if not is_namespace(request.namespace):
            raise InvalidField("namespace", NAMESPACE_RULE)
        if len(request.position) > MAX_POSITION:
            raise InvalidField("position", f"must be at most {MAX_POSITION} bytes")
        caller.demand("watch", request.namespace)
        budgets = [each for each in (caller.budget, self._budgets.of_namespace(request.namespace)) if each]
        with contextlib.closing(self._stream_changes(request, budgets, context.cancel)) as news:
            for answer in news:  # at least one a second
                self._access.caller(context).demand("watch", request.namespace)
                yield answer

    def _acquire(self, operation: str, namespace: str) -> None:
        budget = self._budgets.of_namespace(namespace)
        try:
            if budget:
                budget.spend(1)
        except LimitExceeded:
            self.observer.on_limited(operation, namespace)
            raise

    def _acquire_all(self, operations: Sequence[Operation]) -> None:
        """Spend all operations of a Batch; where one namespace is at its limit none of them is carried out."""
        try:
            for namespace, count in Counter(each.namespace for each in operations).items():
                budget = self._budgets.of_namespace(namespace)
                if budget:
                    budget.spend(count)
        except LimitExceeded:
            for each in operations:
                self.observer.on_limited(type(each).__name__.lower(), each.namespace)
            raise

    def _admit_entry(self, operation: Operation | Exception) -> LimitExceeded | None:
        """Count the session or tombstone that an operation may leave; return why it may leave none, if so."""
        if not isinstance(operation, _LEAVES_ENTRY):
            return None
        budget = self._budgets.of_namespace(operation.namespace)
        try:
            if budget:
                budget.admit_entry(_value_size(operation))
        except LimitExceeded as error:
            if isinstance(operation, storage.Put):  # a Remove may still remove a session
                self.observer.on_limited("put", operation.namespace)
            return error
        return None

    def _release_unless_stored(self, operation: Operation, outcome: Outcome) -> None:
        """Count what was admitted no more, unless the outcome is that it is there now."""
        admitted = isinstance(operation, storage.Put) or (isinstance(operation, storage.Remove) and operation.tombstone)
        if admitted and not _leaves_entry(outcome):
            budget = self._budgets.of_namespace(operation.namespace)
            if budget:
                budget.return_entry(_value_size(operation))

    def _execute(self, operations: Sequence[Operation]) -> Sequence[Outcome]:
        """Return the outcomes of operations, whose Puts and Removes were admitted."""
        outcomes: Sequence[Outcome] = [None] * len(operations)
        try:
            if operations:
                outcomes = self._engine.batch(operations)
        finally:
            for operation, outcome in zip(operations, outcomes, strict=True):
                self._release_unless_stored(operation, outcome)
        return outcomes

    def _stream_changes(
        self, request: pb.WatchRequest, budgets: Sequence[Budget], cut: Callable[[], object]
    ) -> Generator[pb.WatchResponse, None, None]:
        with self._watchers.subscribed(request.namespace, budgets, cut) as subscription:
            continued = False
            for message in self._watchers.missed(request.position, subscription) if request.position else ():
                yield watch_response(message, continued=not continued)
                continued = True
            yield pb.WatchResponse(position=subscription.position, live=True)
            yield from map(encode_once, subscription.messages())

    def _validate_operations(
        self, operations: Iterable[pb.BatchOperation], caller: Caller
    ) -> Iterator[Operation | Exception]:
        """Yield each operation if it is valid and granted, else what is wrong with it."""
        passed: str | None = None  # where the caller may get: most Batches are about one namespace
        for index, operation in enumerate(operations):
            try:
                if operation.HasField("get"):
                    get = operation.get
                    namespace, key = get.namespace, get.key
                    if namespace != passed or not 1 <= len(key) <= MAX_KEY:
                        passed, key = _validate_ref(get, "get", caller)
                    yield storage.Get(namespace, key)
                elif operation.HasField("put"):
                    yield self._put(operation.put, caller)
                elif operation.HasField("take"):
                    yield storage.Take(*_validate_ref(operation.take, "take", caller))
                elif operation.HasField("remove"):
                    yield storage.Remove(*_validate_ref(operation.remove, "remove", caller))
                else:
                    yield InvalidField(f"operations[{index}]", "must be one of put, get, take and remove")
            except InvalidField as error:
                yield error.below(f"operations[{index}].{operation.WhichOneof('operation')}")
            except NotGranted as error:
                yield error

    def _put(self, request: pb.PutRequest, caller: Caller) -> storage.Put:
        namespace, key = _validate_ref(request, "put", caller)
        value, ttl = request.value, request.ttl
        if not 1 <= len(value) <= MAX_VALUE:
            raise InvalidField("value", f"must be 1 to {MAX_VALUE} bytes")
        # A Duration carries its sign in both parts, so this refuses negative ones; a missing one reads as zero.
        if not (0 <= ttl.seconds <= MAX_SECONDS and 0 <= ttl.nanos <= MAX_NANOS and (ttl.seconds or ttl.nanos)):
            raise InvalidField("ttl", "must be a duration above zero")
        issued = seconds_of(request.issue_time, "issue_time")
        return storage.Put(namespace, key, value, min(ttl.seconds + ttl.nanos / 1e9, self._max_ttl), issued or None)


def _limit_operation(operation: Operation | Exception, refusal: LimitExceeded | None) -> Operation | Exception:
    """Return what may be done of an operation that was not admitted: a Remove may still remove what is there."""
    if refusal is None:
        return operation
    return dataclasses.replace(operation, tombstone=False) if isinstance(operation, storage.Remove) else refusal


def _value_size(operation: Operation) -> int:
    """Return the bytes of the value in what an operation may leave."""
    return len(operation.value) if isinstance(operation, storage.Put) else 0


def _leaves_entry(outcome: Outcome) -> bool:
    """Return whether a Put with this outcome stored its session, or a Remove left a tombstone for no session."""
    if isinstance(outcome, float):
        return outcome > 0 and not isinstance(outcome, storage.Kept)
    return outcome is False


def _validate_ref(request: SessionRef, operation: str, caller: Caller) -> tuple[str, bytes]:
    """Return the address of a session on which `caller` may carry out `operation`."""
    namespace, key = request.namespace, request.key
    if not is_namespace(namespace):
        raise InvalidField("namespace", NAMESPACE_RULE)
    if not 1 <= len(key) <= MAX_KEY:
        raise InvalidField("key", f"must be 1 to {MAX_KEY} bytes")
    caller.demand(operation, namespace)
    return namespace, key
