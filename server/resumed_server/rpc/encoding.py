"""Encode the outcomes of operations and the changes of a namespace, field by field."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

from resumed.v1 import session_store_pb2 as pb
from resumed_server.rpc.status import to_status
from resumed_server.storage import engine as storage

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.timestamp_pb2 import Timestamp

    from resumed_server.storage.engine import Operation, StoredSession
    from resumed_server.watch.subscription import Message

_Response = TypeVar("_Response", pb.GetResponse, pb.TakeResponse, pb.SessionStored)


def watch_response(message: Message, *, live: bool = False) -> pb.WatchResponse:
    """Return the response with the changes of `message`."""
    response = pb.WatchResponse(position=message.position, live=live)
    events = response.events
    for change in message.changes:
        _write_event(events.add(), change)
    return response


def encode_once(message: Message) -> pb.WatchResponse:
    """Return the response with the changes of `message`, the same object for all watchers of a topic."""
    if message.encoded is None:
        message.encoded = watch_response(message, live=True)
    return cast("pb.WatchResponse", message.encoded)


def fill_response(response: _Response, stored: StoredSession | None) -> _Response:
    """Write a session into `response`, if there is one, and return `response`."""
    if stored is None:
        response.SetInParent()
    else:
        session = response.session
        session.value = stored.value
        write_ttl(session.ttl, stored.ttl)
    return response


def write_result(result: pb.BatchResult, operation: Operation | Exception, outcome: Any) -> None:
    """Write the outcome of `operation`, whose type depends on the operation (see storage/engine.py)."""
    if isinstance(outcome, Exception):
        result.error.CopyFrom(to_status(outcome, operation))
    elif isinstance(operation, storage.Get):
        fill_response(result.get, outcome)
    elif isinstance(operation, storage.Put):
        write_ttl(result.put.ttl, outcome)
    elif isinstance(operation, storage.Take):
        fill_response(result.take, outcome)
    else:
        result.remove.removed = bool(outcome)


def write_time(time: Timestamp, seconds: float) -> None:
    """Write a time given in Unix seconds, to the microsecond."""
    time.FromMicroseconds(round(seconds * 1e6))


def write_ttl(duration: Duration, seconds: float) -> None:
    """Write a duration given in seconds."""
    whole = int(seconds)
    duration.seconds = whole
    duration.nanos = int((seconds - whole) * 1e9)


def _write_event(event: pb.WatchEvent, change: storage.Change | storage.NamespacePurged) -> None:
    if isinstance(change, storage.NamespacePurged):
        event.purged.SetInParent()
        if change.issued_before is not None:
            write_time(event.purged.issued_before_time, change.issued_before)
        if change.time is not None:
            write_time(event.purged.purge_time, change.time)
    elif change.session is None:
        removed = event.removed
        removed.key = change.key
        if change.ttl is not None:
            write_ttl(removed.ttl, change.ttl)
    else:
        event.stored.key = change.key
        fill_response(event.stored, change.session)
        if change.session.issued_at is not None:
            write_time(event.stored.issue_time, change.session.issued_at)
