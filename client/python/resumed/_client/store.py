"""The service as a Python object: deadlines, retries where they are harmless, a connection per process.

Keys and values go through as they are: sealing them is the caller's work (session_policy.py does it).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message

from resumed._client.limits import BATCH_OPERATIONS, BATCH_VALUE_BYTES
from resumed._exceptions import StoreError, from_status
from resumed._transport.channel import Channel, Method
from resumed.v1 import session_store_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from google.protobuf.timestamp_pb2 import Timestamp
    from opentelemetry.trace import TracerProvider
    from typing_extensions import Self

    from resumed._transport.channel import Stream
    from resumed._transport.tls import Credentials

_PATIENCE = 3.0
"""Seconds that a Watch may be silent: the store sends a message at least once a second."""

_SERVICE = "/resumed.v1.SessionStoreService/"
# Take is not repeatable: after an unknown outcome a second one misses, although the first may have
# succeeded. Neither is a Batch that carries one.
_PUT, _GET, _REMOVE, _BATCH = (Method(_SERVICE + name, repeatable=True) for name in ("Put", "Get", "Remove", "Batch"))
_TAKE, _TAKING_BATCH, _WATCH = (Method(_SERVICE + name, repeatable=False) for name in ("Take", "Batch", "Watch"))

_Answer = TypeVar("_Answer", bound=Message)


class StoredSession(NamedTuple):
    """A hit: the value, and the seconds it has left in the store."""

    value: bytes
    ttl: float

    def __repr__(self) -> str:
        """Show the size, never the value."""
        return f"StoredSession({len(self.value)} bytes, ttl={self.ttl:.3f})"


@dataclass(frozen=True, slots=True, repr=False)
class Put:
    """Store `value` under `key` for `ttl` seconds; its result is the seconds it has left."""

    key: bytes
    value: bytes
    ttl: float
    issued: float | None = None
    """When the session was negotiated, in Unix seconds, for a purge to go by; None is the time of its arrival."""
    pinned: bool = False
    """Whether the store evicts other values instead of this one, of at most 1,024 bytes, when it is full."""


@dataclass(frozen=True, slots=True, repr=False)
class Get:
    """Look `key` up; its result is the session, or None."""

    key: bytes


@dataclass(frozen=True, slots=True, repr=False)
class Take:
    """Look `key` up and remove it; its result is the session, or None."""

    key: bytes


@dataclass(frozen=True, slots=True, repr=False)
class Remove:
    """Remove `key`; its result is whether a live session was there."""

    key: bytes
    ttl: float | None = None
    """For a lasting removal, which watchers of removals receive: the seconds for which it is in force at least."""


Operation: TypeAlias = Put | Get | Take | Remove
Result: TypeAlias = float | StoredSession | bool | StoreError | None


class StoreClient:
    """One namespace of the store at `target`. Thread-safe; connects when first used, and again in a forked child.

    Args:
        target: Where the store is, as a gRPC name: `dns:///store:7400`, `127.0.0.1:7400`, `unix:/run/resumed.sock`.
        namespace: The namespace of the sessions: 1 to 63 characters of [a-z0-9.-].
        deadline: Seconds that a call may take, retries included, unless it says otherwise.
        credentials: For TLS to the store; None for plaintext.
        tracer_provider: Makes spans of the calls, and needs `pip install 'resumed[otel]'`; None for none.

    Raises ValueError for a malformed target. Every call raises StoreUnavailable when the store does not answer in time
    or cannot serve, InvalidRequest for a key, value or ttl outside its limits (key 1 to 64 bytes, value 1 to 65,536
    bytes, ttl above 0), and StoreError for what else it refuses.
    """

    def __init__(
        self,
        target: str,
        *,
        namespace: str,
        deadline: float = 0.05,
        credentials: Credentials | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        self.target = target
        self.namespace = namespace
        self.deadline = deadline
        self._connection = credentials, tracer_provider
        if tracer_provider is None:
            self._channel = Channel(target, credentials)
        else:
            from resumed._tracing import TracedChannel  # noqa: PLC0415 - an extra

            self._channel = TracedChannel(target, credentials, tracer_provider)

    def separate(self) -> StoreClient:
        """Return another one for the same namespace, with connections of its own."""
        credentials, tracer_provider = self._connection
        return StoreClient(
            self.target,
            namespace=self.namespace,
            deadline=self.deadline,
            credentials=credentials,
            tracer_provider=tracer_provider,
        )

    def __repr__(self) -> str:
        """Show where and what for."""
        return f"StoreClient({self.target!r}, namespace={self.namespace!r})"

    def put(
        self,
        key: bytes,
        value: bytes,
        ttl: float,
        *,
        issued: float | None = None,
        pinned: bool = False,
        deadline: float | None = None,
    ) -> float:
        """Store `value` for `ttl` seconds; return the seconds it has left there.

        `issued` is when the session was negotiated, in Unix seconds, for a purge to go by; None for now. The same value
        again changes nothing. The store keeps a `pinned` value, of at most 1,024 bytes, even if it is full. Raises
        AlreadyExists if the key holds another value, or was removed, taken or purged.
        """
        request = self._put(Put(key, value, ttl, issued, pinned))
        return seconds_of(self._call(_PUT, request, pb.PutResponse, deadline).ttl)

    def get(self, key: bytes, *, deadline: float | None = None) -> StoredSession | None:
        """Return the live session of `key`, or None."""
        request = pb.GetRequest(namespace=self.namespace, key=key)
        return _session(self._call(_GET, request, pb.GetResponse, deadline))

    def take(self, key: bytes, *, deadline: float | None = None) -> StoredSession | None:
        """Return the live session of `key` and remove it, atomically, or None: of all callers ever, one gets it.

        Never retried: after StoreUnavailable the session may be gone.
        """
        request = pb.TakeRequest(namespace=self.namespace, key=key)
        return _session(self._call(_TAKE, request, pb.TakeResponse, deadline))

    def remove(self, key: bytes, *, ttl: float | None = None, deadline: float | None = None) -> bool:
        """Remove the session of `key`, for good; return whether a live one was there. See Remove for `ttl`."""
        request = self._remove(Remove(key, ttl))
        return self._call(_REMOVE, request, pb.RemoveResponse, deadline).removed

    def batch(self, operations: Sequence[Operation], *, deadline: float | None = None) -> list[Result]:
        """Carry out `operations` in order; return one result for each, a StoreError for one that failed.

        More than 256, or more than 16 MiB of values, are sent as several calls, each with the deadline.
        """
        results: list[Result] = []
        request, size = pb.BatchRequest(), 0
        for operation in operations:
            length = len(operation.value) if isinstance(operation, Put) else 0
            if len(request.operations) == BATCH_OPERATIONS or (
                request.operations and size + length > BATCH_VALUE_BYTES
            ):
                results += self._batch(request, deadline)
                request, size = pb.BatchRequest(), 0
            request.operations.append(self._operation(operation))
            size += length
        if request.operations:
            results += self._batch(request, deadline)
        return results

    def watch(self, position: bytes = b"", *, removals_only: bool = False) -> Watch:
        """Follow the namespace, from now on or, if the store still knows, behind the `position` of an earlier stream.

        With `removals_only` the stream has only lasting removals and purges. If it does not continue an earlier one, it
        begins with the last purge and all lasting removals in force.

        Use it as a context manager and iterate over it. Both raise StoreError when the stream ends.
        """
        request = pb.WatchRequest(namespace=self.namespace, position=position, removals_only=removals_only)
        return Watch(self._channel.stream(_WATCH, request.SerializeToString(), _PATIENCE))

    def close(self) -> None:
        """Close the connections; the next call opens another one."""
        self._channel.close()

    def _call(self, method: Method, request: Message, answer: type[_Answer], deadline: float | None) -> _Answer:
        timeout = self.deadline if deadline is None else deadline
        return parse_response(answer, self._channel.call(method, request.SerializeToString(), timeout))

    def _batch(self, request: pb.BatchRequest, deadline: float | None) -> list[Result]:
        method = _TAKING_BATCH if any(each.HasField("take") for each in request.operations) else _BATCH
        answer = self._call(method, request, pb.BatchResponse, deadline)
        if len(answer.results) != len(request.operations):
            raise StoreError(f"the answer has {len(answer.results)} results, not {len(request.operations)}")
        return [_result(result) for result in answer.results]

    def _put(self, put: Put) -> pb.PutRequest:
        request = pb.PutRequest(
            namespace=self.namespace, key=put.key, value=put.value, ttl=_duration(put.ttl), pinned=put.pinned
        )
        if put.issued is not None:
            request.issue_time.seconds = int(put.issued)
            request.issue_time.nanos = int(put.issued % 1 * 1e9)
        return request

    def _remove(self, remove: Remove) -> pb.RemoveRequest:
        ttl = None if remove.ttl is None else _duration(remove.ttl)
        return pb.RemoveRequest(namespace=self.namespace, key=remove.key, ttl=ttl)

    def _operation(self, operation: Operation) -> pb.BatchOperation:
        match operation:
            case Put():
                return pb.BatchOperation(put=self._put(operation))
            case Get(key):
                return pb.BatchOperation(get=pb.GetRequest(namespace=self.namespace, key=key))
            case Take(key):
                return pb.BatchOperation(take=pb.TakeRequest(namespace=self.namespace, key=key))
            case Remove():
                return pb.BatchOperation(remove=self._remove(operation))


class Watch:
    """A stream of what happens in a namespace; see StoreClient.watch().

    Attributes:
        resumed_from_position: Whether the stream continues after the requested position. If not, discard earlier state.
        removals_only: Whether it has only lasting removals and purges. False if the store is too old for that.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._answers = (parse_response(pb.WatchResponse, encoded) for encoded in stream)
        self._first: pb.WatchResponse | None = None
        self.resumed_from_position = self.removals_only = False

    @property
    def confirmed(self) -> float:
        """The time (time.monotonic()) up to which a `live` response includes all changes, even with delayed packets."""
        return self._stream.confirmed

    def __enter__(self) -> Self:
        """Wait for the first answer."""
        try:
            self._first = next(self._answers)
        except BaseException:
            self.cancel()  # __exit__ is not called
            raise
        self.resumed_from_position, self.removals_only = self._first.continued, self._first.removals_only
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self._answers.close()  # and with it the connection

    def __iter__(self) -> Iterator[WatchBatch]:
        """Yield what happened, at least once a second."""
        for answer in itertools.chain([self._first] if self._first else [], self._answers):
            yield WatchBatch([_change(event) for event in answer.events], answer.position, answer.live)

    def cancel(self) -> None:
        """End the stream, from any thread."""
        self._stream.cancel()


class Change(NamedTuple):
    """A session was stored; or removed or taken, if `session` is None; or the namespace was purged, if `key` is empty.

    Attributes:
        key: The store key of the session. Empty for a purge, and for a change that this client does not know.
        session: The session that was stored.
        time: In Unix seconds: when the session was issued, or for a purge, the time before which the sessions to forget
            were issued. None for a session: not known. None for a purge: forget all that was known.
        ttl: Of a lasting removal, the seconds for which it is in force yet; 0.0 of all else.
        purged: When the purge was, in Unix seconds; None if it is no purge, or the store is too old to send it.
    """

    key: bytes
    session: StoredSession | None = None
    time: float | None = None
    ttl: float = 0.0
    purged: float | None = None

    def __repr__(self) -> str:
        """Show what happened, never to which session."""
        return f"Change({'stored' if self.session else 'removed' if self.key else 'purged'}, time={self.time})"


class WatchBatch(NamedTuple):
    """What happened in a namespace."""

    changes: list[Change]
    """In the order in which they happened."""
    position: bytes
    """Where the store is behind them; empty: where it was before."""
    live: bool
    """Whether that is all that happened up to now."""

    def __repr__(self) -> str:
        """Show how many, never which."""
        return f"WatchBatch({len(self.changes)}, live={self.live})"


def parse_response(kind: type[_Answer], encoded: bytes) -> _Answer:
    """Return an answer of the store; raise StoreError if it is none of that kind."""
    try:
        return kind.FromString(encoded)
    except DecodeError:
        raise StoreError("the answer is no message of this contract") from None


def _change(event: pb.WatchEvent) -> Change:
    match event.WhichOneof("event"):
        case "stored":
            stored = event.stored
            session = StoredSession(stored.session.value, seconds_of(stored.session.ttl))
            return Change(stored.key, session, time_of(stored, "issue_time"))
        case "removed":
            return Change(event.removed.key, ttl=seconds_of(event.removed.ttl))
        case "purged":
            purged = event.purged
            return Change(b"", None, time_of(purged, "issued_before_time"), purged=time_of(purged, "purge_time"))
        case _:
            return Change(b"")


def time_of(message: Message, field: str) -> float | None:
    """Return the time in a field of a message, in Unix seconds; None if it is not set."""
    return seconds_of(getattr(message, field)) if message.HasField(field) else None


def _duration(seconds: float) -> Duration:
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9) if seconds > 0 else 0)


def seconds_of(duration: Duration | Timestamp) -> float:
    """Return a duration, or a time in Unix seconds."""
    return duration.seconds + duration.nanos / 1e9


def _session(answer: pb.GetResponse | pb.TakeResponse) -> StoredSession | None:
    if not answer.HasField("session"):
        return None
    return StoredSession(answer.session.value, seconds_of(answer.session.ttl))


def _result(result: pb.BatchResult) -> Result:
    match result.WhichOneof("result"):
        case "put":
            return seconds_of(result.put.ttl)
        case "get":
            return _session(result.get)
        case "take":
            return _session(result.take)
        case "remove":
            return result.remove.removed
        case _:
            return from_status(result.error.code, result.error.message)
