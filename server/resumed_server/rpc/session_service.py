"""The RPCs: check the request, call the engine, answer. Knows gRPC's messages, and nothing of storage.

Every microsecond counts here (see benchmarks/results/server.md). So fields are checked by hand, and answers are written
field by field, which takes half the time of building the messages in them from keyword arguments.
"""
# ruff: noqa: N802 - the methods are named as in the contract

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceServicer
from resumed_server.auth.authorizer import Anybody, NotGranted, admitted
from resumed_server.limits.enforcer import Budgets, LimitExceeded
from resumed_server.rpc.handlers import InvalidField, Unobserved, answered, status_of, streamed
from resumed_server.storage import engine as storage

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.timestamp_pb2 import Timestamp
    from grpc import ServicerContext

    from resumed_server.auth.authorizer import Access, Caller
    from resumed_server.limits.enforcer import Budget
    from resumed_server.rpc.handlers import Observer
    from resumed_server.storage.engine import Engine, Operation, Outcome, StoredSession
    from resumed_server.watch.hub import Message, Watchers

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["SessionStoreService"].full_name
MAX_KEY = 64
MAX_VALUE = 65_536
MAX_POSITION = 64
MAX_OPERATIONS = 256
MAX_MESSAGE = MAX_OPERATIONS * (MAX_VALUE + 256)
"""Bytes that the largest legal message, a full Batch of full values, may take on the wire."""

_LEAVES_ENTRY = storage.Put | storage.Remove
"""What may leave a session or a tombstone where there was none. (A Take leaves one in the place of its session.)"""
_MAX_SECONDS, _MAX_NANOS = 315_576_000_000, 999_999_999
"""What a google.protobuf.Duration may have."""
_LAST_SECOND = 253_402_300_799
"""Of what a google.protobuf.Timestamp may have: the end of the year 9999."""
MAX_NAMESPACE = 63
NAMESPACE_LIMIT = f"must be 1 to {MAX_NAMESPACE} characters of [a-z0-9.-]"
is_namespace = re.compile(rf"[a-z0-9.-]{{1,{MAX_NAMESPACE}}}").fullmatch


_Answer = TypeVar("_Answer", pb.GetResponse, pb.TakeResponse, pb.SessionStored)


class _Addressed(Protocol):
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
        self.observer = observer or Unobserved()

    @answered
    def Put(self, request: pb.PutRequest, context: ServicerContext) -> pb.PutResponse:
        """Store a session."""
        put = self._put(request, admitted(self._access, context))
        self._spend("put", put.namespace)
        if refusal := self._admit(put):
            raise refusal
        ttl: storage.Outcome = None
        try:
            ttl = self._engine.put(put.namespace, put.key, put.value, put.ttl, put.issued)
        finally:
            self._settle(put, ttl)
        response = pb.PutResponse()
        _write_ttl(response.ttl, ttl)
        return response

    @answered
    def Get(self, request: pb.GetRequest, context: ServicerContext) -> pb.GetResponse:
        """Return a session."""
        address = _address(request, "get", admitted(self._access, context))
        self._spend("get", address[0])
        return _found(pb.GetResponse(), self._engine.get(*address))

    @answered
    def Take(self, request: pb.TakeRequest, context: ServicerContext) -> pb.TakeResponse:
        """Return a session and remove it."""
        address = _address(request, "take", admitted(self._access, context))
        self._spend("take", address[0])
        return _found(pb.TakeResponse(), self._engine.take(*address))

    @answered
    def Remove(self, request: pb.RemoveRequest, context: ServicerContext) -> pb.RemoveResponse:
        """Remove a session."""
        remove = storage.Remove(*_address(request, "remove", admitted(self._access, context)))
        self._spend("remove", remove.namespace)
        refusal = self._admit(remove)
        removed: storage.Outcome = None
        try:
            removed = self._engine.remove(remove.namespace, remove.key, tombstone=refusal is None)
        except storage.NoTombstone as error:
            raise (refusal or error) from None
        finally:
            if refusal is None:
                self._settle(remove, removed)
        return pb.RemoveResponse(removed=bool(removed))

    @answered
    def Batch(self, request: pb.BatchRequest, context: ServicerContext) -> pb.BatchResponse:
        """Carry out the valid and granted operations in one go; each of the others gets its own error."""
        caller = admitted(self._access, context, len(request.operations))
        if not 1 <= len(request.operations) <= MAX_OPERATIONS:
            raise InvalidField("operations", f"must hold 1 to {MAX_OPERATIONS}")
        checked = list(self._checked(request.operations, caller))
        self._spend_all([each for each in checked if not isinstance(each, Exception)])
        refusals = list(map(self._admit, checked))
        checked = list(map(_within_limits, checked, refusals))
        valid = [operation for operation in checked if not isinstance(operation, Exception)]
        outcomes = iter(self._carried_out(valid))
        response = pb.BatchResponse()
        results = response.results
        for operation, refusal in zip(checked, refusals, strict=True):
            outcome = operation if isinstance(operation, Exception) else next(outcomes)
            _write_result(results.add(), operation, refusal if isinstance(outcome, storage.NoTombstone) else outcome)
        return response

    @streamed
    def Watch(self, request: pb.WatchRequest, context: ServicerContext) -> Iterator[pb.WatchResponse]:
        """Stream what happens in a namespace, for as long as the caller may watch it."""
        caller = admitted(self._access, context)
        if not is_namespace(request.namespace):
            raise InvalidField("namespace", NAMESPACE_LIMIT)
        if len(request.position) > MAX_POSITION:
            raise InvalidField("position", f"must be at most {MAX_POSITION} bytes")
        caller.demand("watch", request.namespace)
        budgets = [each for each in (caller.budget, self._budgets.of_namespace(request.namespace)) if each]
        with contextlib.closing(self._news(request, budgets, context.cancel)) as news:
            for answer in news:  # at least one a second
                self._access.caller(context).demand("watch", request.namespace)
                yield answer

    def _spend(self, operation: str, namespace: str) -> None:
        budget = self._budgets.of_namespace(namespace)
        try:
            if budget:
                budget.spend(1)
        except LimitExceeded:
            self.observer.limited(operation, namespace)
            raise

    def _spend_all(self, operations: Sequence[Operation]) -> None:
        """Spend all operations of a Batch; where one namespace is at its limit none of them is carried out."""
        try:
            for namespace, count in Counter(each.namespace for each in operations).items():
                budget = self._budgets.of_namespace(namespace)
                if budget:
                    budget.spend(count)
        except LimitExceeded:
            for each in operations:
                self.observer.limited(type(each).__name__.lower(), each.namespace)
            raise

    def _admit(self, operation: Operation | Exception) -> LimitExceeded | None:
        """Count the session or tombstone that an operation may leave; return why it may leave none, if so."""
        if not isinstance(operation, _LEAVES_ENTRY):
            return None
        budget = self._budgets.of_namespace(operation.namespace)
        try:
            if budget:
                budget.admit_entry(_size(operation))
        except LimitExceeded as error:
            if isinstance(operation, storage.Put):  # a Remove may still remove a session
                self.observer.limited("put", operation.namespace)
            return error
        return None

    def _settle(self, operation: Operation, outcome: Outcome) -> None:
        """Count what was admitted no more, unless the outcome is that it is there now."""
        admitted = isinstance(operation, storage.Put) or (isinstance(operation, storage.Remove) and operation.tombstone)
        if admitted and not _left_entry(outcome):
            budget = self._budgets.of_namespace(operation.namespace)
            if budget:
                budget.return_entry(_size(operation))

    def _carried_out(self, operations: Sequence[Operation]) -> Sequence[Outcome]:
        """Return the outcomes of operations, whose Puts and Removes were admitted."""
        outcomes: Sequence[Outcome] = [None] * len(operations)
        try:
            if operations:
                outcomes = self._engine.batch(operations)
        finally:
            for operation, outcome in zip(operations, outcomes, strict=True):
                self._settle(operation, outcome)
        return outcomes

    def _news(
        self, request: pb.WatchRequest, budgets: Sequence[Budget], cut: Callable[[], object]
    ) -> Generator[pb.WatchResponse, None, None]:
        with self._watchers.subscribed(request.namespace, budgets, cut) as subscription:
            continued = False
            for message in self._watchers.missed(request.position, subscription) if request.position else ():
                yield _watched(message, continued=not continued)
                continued = True
            yield pb.WatchResponse(position=subscription.position, live=True)
            yield from map(_shared, subscription.messages())

    def _checked(self, operations: Iterable[pb.BatchOperation], caller: Caller) -> Iterator[Operation | Exception]:
        """Yield each operation if it is valid and granted, else what is wrong with it."""
        passed: str | None = None  # where the caller may get: most Batches are about one namespace
        for index, operation in enumerate(operations):
            try:
                if operation.HasField("get"):
                    get = operation.get
                    namespace, key = get.namespace, get.key
                    if namespace != passed or not 1 <= len(key) <= MAX_KEY:
                        passed, key = _address(get, "get", caller)
                    yield storage.Get(namespace, key)
                elif operation.HasField("put"):
                    yield self._put(operation.put, caller)
                elif operation.HasField("take"):
                    yield storage.Take(*_address(operation.take, "take", caller))
                elif operation.HasField("remove"):
                    yield storage.Remove(*_address(operation.remove, "remove", caller))
                else:
                    yield InvalidField(f"operations[{index}]", "must be one of put, get, take and remove")
            except InvalidField as error:
                yield error.below(f"operations[{index}].{operation.WhichOneof('operation')}")
            except NotGranted as error:
                yield error

    def _put(self, request: pb.PutRequest, caller: Caller) -> storage.Put:
        namespace, key = _address(request, "put", caller)
        value, ttl = request.value, request.ttl
        if not 1 <= len(value) <= MAX_VALUE:
            raise InvalidField("value", f"must be 1 to {MAX_VALUE} bytes")
        # A Duration carries its sign in both parts, so this refuses negative ones; a missing one reads as zero.
        if not (0 <= ttl.seconds <= _MAX_SECONDS and 0 <= ttl.nanos <= _MAX_NANOS and (ttl.seconds or ttl.nanos)):
            raise InvalidField("ttl", "must be a duration above zero")
        issued = seconds_of(request.issue_time, "issue_time")
        return storage.Put(namespace, key, value, min(ttl.seconds + ttl.nanos / 1e9, self._max_ttl), issued or None)


def _within_limits(operation: Operation | Exception, refusal: LimitExceeded | None) -> Operation | Exception:
    """Return what may be done of an operation that was not admitted: a Remove may still remove what is there."""
    if refusal is None:
        return operation
    return dataclasses.replace(operation, tombstone=False) if isinstance(operation, storage.Remove) else refusal


def _size(operation: Operation) -> int:
    """Return the bytes of the value in what an operation may leave."""
    return len(operation.value) if isinstance(operation, storage.Put) else 0


def _left_entry(outcome: Outcome) -> bool:
    """Return whether a Put with this outcome stored its session, or a Remove left a tombstone for no session."""
    if isinstance(outcome, float):
        return outcome > 0 and not isinstance(outcome, storage.Kept)
    return outcome is False


def _address(request: _Addressed, operation: str, caller: Caller) -> tuple[str, bytes]:
    """Return the address of a session on which `caller` may carry out `operation`."""
    namespace, key = request.namespace, request.key
    if not is_namespace(namespace):
        raise InvalidField("namespace", NAMESPACE_LIMIT)
    if not 1 <= len(key) <= MAX_KEY:
        raise InvalidField("key", f"must be 1 to {MAX_KEY} bytes")
    caller.demand(operation, namespace)
    return namespace, key


def seconds_of(time: Timestamp, field: str) -> float:
    """Return a time in Unix seconds, 0.0 for one that is unset; raise InvalidField if it is before 1970 or no time."""
    if not (0 <= time.seconds <= _LAST_SECOND and 0 <= time.nanos <= _MAX_NANOS):
        raise InvalidField(field, "must be a time from 1970 to 9999")
    return time.seconds + time.nanos / 1e9


def _watched(message: Message, *, continued: bool = False, live: bool = False) -> pb.WatchResponse:
    events = [_event(change) for change in message.changes]
    return pb.WatchResponse(events=events, position=message.position, continued=continued, live=live)


def _shared(message: Message) -> pb.WatchResponse:
    """Return the answer that carries `message`, the same one for all watchers of a namespace."""
    if message.encoded is None:
        message.encoded = _watched(message, live=True)
    return cast("pb.WatchResponse", message.encoded)


def _event(change: storage.Change | storage.Purged) -> pb.WatchEvent:
    event = pb.WatchEvent()
    if isinstance(change, storage.Purged):
        event.purged.SetInParent()
        if change.issued_before is not None:
            write_time(event.purged.issued_before_time, change.issued_before)
    elif change.session is None:
        event.removed.key = change.key
    else:
        event.stored.key = change.key
        _found(event.stored, change.session)
        if change.session.issued is not None:
            write_time(event.stored.issue_time, change.session.issued)
    return event


def _write_result(result: pb.BatchResult, operation: Operation | Exception, outcome: Any) -> None:
    """Write the outcome of `operation`, which decides its type (see `engines.base`)."""
    if isinstance(outcome, Exception):
        result.error.CopyFrom(status_of(outcome, operation))
    elif isinstance(operation, storage.Get):
        _found(result.get, outcome)
    elif isinstance(operation, storage.Put):
        _write_ttl(result.put.ttl, outcome)
    elif isinstance(operation, storage.Take):
        _found(result.take, outcome)
    else:
        result.remove.removed = bool(outcome)


def _found(answer: _Answer, stored: StoredSession | None) -> _Answer:
    """Return `answer` with what was found, if anything was."""
    if stored is None:
        answer.SetInParent()
    else:
        session = answer.session
        session.value = stored.value
        _write_ttl(session.ttl, stored.ttl)
    return answer


def write_time(time: Timestamp, seconds: float) -> None:
    """Write a time in Unix seconds, to the microsecond."""
    time.FromMicroseconds(round(seconds * 1e6))


def _write_ttl(duration: Duration, seconds: float) -> None:
    whole = int(seconds)
    duration.seconds = whole
    duration.nanos = int((seconds - whole) * 1e9)
