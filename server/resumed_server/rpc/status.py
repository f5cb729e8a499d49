"""The one table from exceptions to gRPC statuses.

Every error has two texts: a fixed one for the caller, which reveals nothing, and the cause, which only the log gets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import structlog
from google.protobuf.any import pack
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import ServicerContext, StatusCode
from grpc_status import rpc_status

from resumed.v1 import session_store_pb2 as pb
from resumed_server.auth.authorizer import NotGranted
from resumed_server.auth.identity import Unauthenticated
from resumed_server.errors import Stopping, exception_fields, should_log
from resumed_server.limits.enforcer import LimitExceeded
from resumed_server.rpc.validation import InvalidField
from resumed_server.storage.engine import AlreadyExists, EngineError, EngineFull, EngineUnavailable
from resumed_server.watch.hub import TooManyWatchers
from resumed_server.watch.subscription import WatcherTooSlow

if TYPE_CHECKING:
    from google.protobuf.message import Message

DOMAIN = "resumed.github.io"
"""The domain of all reasons: a name of the project, without a version (AIP-193)."""

log = structlog.get_logger()


class MessageTooLarge(Exception):
    """A request has more bytes than any valid one."""


class UnknownMethod(Exception):
    """The server has no method `name` in this service."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class StatusMapping(NamedTuple):
    """The status of a kind of exception: its code, an ErrorReason, and the text for the caller."""

    code: StatusCode
    reason: int
    text: str


_INTERNAL = StatusMapping(StatusCode.INTERNAL, pb.ERROR_REASON_INTERNAL, "internal error of the server; see its log")
_MAPPINGS: dict[type[Exception], StatusMapping] = {
    InvalidField: StatusMapping(
        StatusCode.INVALID_ARGUMENT, pb.ERROR_REASON_INVALID_FIELD, "a field of the request is outside its limits"
    ),
    Unauthenticated: StatusMapping(
        StatusCode.UNAUTHENTICATED,
        pb.ERROR_REASON_UNAUTHENTICATED,
        "this server requires a client certificate with a SPIFFE id or a DNS name",
    ),
    NotGranted: StatusMapping(StatusCode.PERMISSION_DENIED, pb.ERROR_REASON_NOT_GRANTED, "no grant allows this"),
    AlreadyExists: StatusMapping(
        StatusCode.ALREADY_EXISTS,
        pb.ERROR_REASON_WRITE_ONCE,
        "the key holds another value, or its session was removed, taken or purged",
    ),
    EngineFull: StatusMapping(StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_STORE_FULL, "the store is full"),
    EngineUnavailable: StatusMapping(
        StatusCode.UNAVAILABLE, pb.ERROR_REASON_ENGINE_UNAVAILABLE, "the storage does not answer now, try again later"
    ),
    WatcherTooSlow: StatusMapping(
        StatusCode.ABORTED, pb.ERROR_REASON_WATCHER_TOO_SLOW, "events were not read fast enough, watch again"
    ),
    TooManyWatchers: StatusMapping(
        StatusCode.UNAVAILABLE,
        pb.ERROR_REASON_TOO_MANY_WATCHERS,
        "the server has its maximum of watchers, watch another replica",
    ),
    LimitExceeded: StatusMapping(StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_LIMIT_EXCEEDED, "a limit is used up"),
    Stopping: StatusMapping(
        StatusCode.UNAVAILABLE, pb.ERROR_REASON_DRAINING, "the server is stopping, call another one"
    ),
    DecodeError: StatusMapping(
        StatusCode.INVALID_ARGUMENT,
        pb.ERROR_REASON_MALFORMED_REQUEST,
        "the request is not a valid message of this method",
    ),
    UnknownMethod: StatusMapping(
        StatusCode.UNIMPLEMENTED, pb.ERROR_REASON_UNIMPLEMENTED, "this server has no such method"
    ),
    # grpcio itself produces this error, without details; the native server returns the same status (see the contract).
    MessageTooLarge: StatusMapping(
        StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_UNSPECIFIED, "the request is larger than any valid one"
    ),
}
_NOT_LOGGED = (DecodeError, Stopping)
"""Exceptions that the caller causes, or that are in the log already."""


def to_status(error: Exception, request: Any) -> Status:
    """Return the status of `error` for the caller of `request`, and log its cause."""
    mapping = next((_MAPPINGS[kind] for kind in type(error).__mro__ if kind in _MAPPINGS), _INTERNAL)
    if mapping.reason == pb.ERROR_REASON_UNSPECIFIED:
        return Status(code=mapping.code.value[0], message=mapping.text)
    details: list[Message] = []
    metadata = {}
    text = mapping.text
    if isinstance(error, InvalidField):
        text = str(error)
        metadata["field"] = error.field
        details.append(
            BadRequest(field_violations=[BadRequest.FieldViolation(field=error.field, description=error.limit)])
        )
    elif isinstance(error, LimitExceeded):
        text = str(error)
        metadata |= {"of": error.subject, "limit": error.limit}
        if error.retry is not None:
            retry = RetryInfo()
            retry.retry_delay.FromMilliseconds(round(1e3 * max(error.retry, error.delay)) + 1)
            details.append(retry)
        _log(mapping, error)
    elif isinstance(error, NotGranted):
        text = str(error)
        metadata |= vars(error)
        _log(mapping, error)
    elif isinstance(error, AlreadyExists):
        metadata["namespace"] = request.namespace
    elif isinstance(error, UnknownMethod):
        metadata["method"] = error.name
    elif not isinstance(error, _NOT_LOGGED):
        _log(mapping, error)
    details.insert(0, ErrorInfo(reason=pb.ErrorReason.Name(mapping.reason), domain=DOMAIN, metadata=metadata))
    return Status(code=mapping.code.value[0], message=text, details=map(pack, details))


def abort(context: ServicerContext, status: Status) -> NoReturn:
    """End a call with a status."""
    context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError  # abort_with_status() always raises, but its stubs do not declare it


def log_fields(error: Exception) -> dict[str, str]:
    """Return the fields of a log line about `error`, none of which is a secret."""
    if isinstance(error, NotGranted):
        return dict(vars(error))
    if isinstance(error, LimitExceeded):
        return {"of": error.subject, "limit": error.limit}
    # The messages of these contain no key and no value by contract; those of other exceptions might.
    return {"cause": str(error)} if isinstance(error, EngineError | Unauthenticated) else exception_fields(error)


def _log(mapping: StatusMapping, error: Exception) -> None:
    """Log the cause of an error for the operator, unless the same cause was logged in the last seconds."""
    fields = log_fields(error)
    # The namespace is not part of the key: callers choose it, so including it would defeat the rate limit of the log.
    rule = error.rule if isinstance(error, LimitExceeded) else ""
    key = (rule, *(fields.get(name, "") for name in ("where", "identity", "operation", "limit")))
    if should_log(type(error).__qualname__, *key):
        (log.error if mapping is _INTERNAL else log.warning)(
            mapping.text if mapping is not _INTERNAL else "internal error", **fields
        )
