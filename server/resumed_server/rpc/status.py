"""The one table from exceptions to gRPC errors.

Every error has two texts: a fixed, harmless one for the caller, and the cause, which only the log gets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import ServicerContext, StatusCode
from grpc_status import rpc_status

from resumed.v1 import session_store_pb2 as pb
from resumed_server.auth.authorizer import NotGranted, Unauthenticated
from resumed_server.errors import Stopping, described, is_news
from resumed_server.limits.enforcer import LimitExceeded
from resumed_server.rpc.validation import InvalidField
from resumed_server.storage.engine import AlreadyExists, EngineError, EngineFull, EngineUnavailable
from resumed_server.watch.hub import TooManyWatchers, WatcherTooSlow

if TYPE_CHECKING:
    from google.protobuf.message import Message

DOMAIN = "resumed.github.io"
"""Of all reasons: a name that belongs to the project and carries no version (AIP-193)."""

log = structlog.get_logger()


class MessageTooLarge(Exception):
    """A request has more bytes than any legal one."""


class UnknownMethod(Exception):
    """There is no method `name` in a service of this server."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class StatusMapping(NamedTuple):
    code: StatusCode
    reason: int
    text: str


_INTERNAL = StatusMapping(StatusCode.INTERNAL, pb.ERROR_REASON_INTERNAL, "the server has a fault; its log says which")
_MAPPINGS: dict[type[Exception], StatusMapping] = {
    InvalidField: StatusMapping(
        StatusCode.INVALID_ARGUMENT, pb.ERROR_REASON_INVALID_FIELD, "a field of the request is outside its limits"
    ),
    Unauthenticated: StatusMapping(
        StatusCode.UNAUTHENTICATED,
        pb.ERROR_REASON_UNAUTHENTICATED,
        "this server serves callers with a client certificate that has a SPIFFE id or a DNS name",
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
        "the server has as many watchers as it takes, watch another replica",
    ),
    LimitExceeded: StatusMapping(StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_LIMIT_EXCEEDED, "a limit is used up"),
    Stopping: StatusMapping(
        StatusCode.UNAVAILABLE, pb.ERROR_REASON_DRAINING, "the server is stopping, call another one"
    ),
    DecodeError: StatusMapping(
        StatusCode.INVALID_ARGUMENT, pb.ERROR_REASON_MALFORMED_REQUEST, "the request is no message of this method"
    ),
    UnknownMethod: StatusMapping(
        StatusCode.UNIMPLEMENTED, pb.ERROR_REASON_UNIMPLEMENTED, "this server has no such method"
    ),
    # grpcio refuses it before the call gets here, so there are no details (see the contract).
    MessageTooLarge: StatusMapping(
        StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_UNSPECIFIED, "the request is larger than any may be"
    ),
}
_NOT_LOGGED = (DecodeError, Stopping)
"""Their cause is the caller, or is in the log already."""


def to_status(error: Exception, request: Any) -> Status:
    """Return what the caller of `request` is told of `error`, and log what only the operator may know."""
    answer = next((_MAPPINGS[kind] for kind in type(error).__mro__ if kind in _MAPPINGS), _INTERNAL)
    if answer.reason == pb.ERROR_REASON_UNSPECIFIED:
        return Status(code=answer.code.value[0], message=answer.text)
    details: list[Message] = []
    metadata = {}
    text = answer.text
    if isinstance(error, InvalidField):
        text = str(error)
        metadata["field"] = error.field
        details.append(
            BadRequest(field_violations=[BadRequest.FieldViolation(field=error.field, description=error.limit)])
        )
    elif isinstance(error, LimitExceeded):
        text = str(error)
        metadata |= {"of": error.of, "limit": error.limit}
        if error.retry is not None:
            retry = RetryInfo()
            retry.retry_delay.FromMilliseconds(round(1e3 * max(error.retry, error.hold)) + 1)
            details.append(retry)
        _log(answer, error)
    elif isinstance(error, NotGranted):
        text = str(error)
        metadata |= vars(error)
        _log(answer, error)
    elif isinstance(error, AlreadyExists):
        metadata["namespace"] = request.namespace
    elif isinstance(error, UnknownMethod):
        metadata["method"] = error.name
    elif not isinstance(error, _NOT_LOGGED):
        _log(answer, error)
    details.insert(0, ErrorInfo(reason=pb.ErrorReason.Name(answer.reason), domain=DOMAIN, metadata=metadata))
    return Status(code=answer.code.value[0], message=text, details=map(_packed, details))


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


def abort(context: ServicerContext, status: Status) -> NoReturn:
    """End a call with a status."""
    context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError  # abort_with_status always raises, its stubs do not say so


def log_fields(error: Exception) -> dict[str, str]:
    """Return what the log may say of `error`."""
    if isinstance(error, NotGranted):
        return dict(vars(error))
    if isinstance(error, LimitExceeded):
        return {"of": error.of, "limit": error.limit}
    # These promise that their messages carry no key and no value; nobody promises that for other exceptions.
    return {"cause": str(error)} if isinstance(error, EngineError | Unauthenticated) else described(error)


def _log(answer: StatusMapping, error: Exception) -> None:
    """Log the cause of an error that the operator has to see, unless the same was logged a moment ago."""
    cause = log_fields(error)
    # Not by namespace: of those a caller can make up as many as they want.
    rule = error.rule if isinstance(error, LimitExceeded) else ""
    named = (rule, *(cause.get(name, "") for name in ("where", "identity", "operation", "limit")))
    if is_news(type(error).__qualname__, *named):
        (log.error if answer is _INTERNAL else log.warning)(
            answer.text if answer is not _INTERNAL else "internal error", **cause
        )
