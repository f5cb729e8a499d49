"""The status and the log line of each error: never a key, a value or a stack trace."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo
from structlog.testing import capture_logs

from resumed._exceptions import from_status
from resumed.v1 import session_store_pb2 as pb
from resumed_server import errors
from resumed_server.cli.diagnosis import explain
from resumed_server.cli.tls_options import TlsOptions
from resumed_server.errors import ExitStatus, Stopping
from resumed_server.limits.config import Limit
from resumed_server.limits.enforcer import LimitExceeded
from resumed_server.rpc.status import UnknownMethod, to_status
from resumed_server.rpc.validation import InvalidField
from resumed_server.storage.engine import (
    AlreadyExists,
    EngineBroken,
    EngineError,
    EngineFull,
    EngineUnavailable,
)
from resumed_server.watch.hub import TooManyWatchers
from resumed_server.watch.subscription import WatcherTooSlow

SECRET = "f00dbeef"
REQUEST = pb.PutRequest(namespace="shop", key=SECRET.encode(), value=SECRET.encode())


@pytest.fixture(autouse=True)
def _nothing_logged_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start with an empty record of logged causes."""
    monkeypatch.setattr(errors, "_last_logged", {})


def raised(error: Exception) -> Exception:
    """Return `error` with a traceback through a frame whose variables hold a secret."""
    secret = SECRET
    try:
        if secret:
            raise error
    except type(error) as caught:
        return caught
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (InvalidField("ttl", "must be above zero"), 3, pb.ERROR_REASON_INVALID_FIELD),
        (AlreadyExists(), 6, pb.ERROR_REASON_WRITE_ONCE),
        (EngineFull("cause"), 8, pb.ERROR_REASON_STORE_FULL),
        (EngineUnavailable("cause"), 14, pb.ERROR_REASON_ENGINE_UNAVAILABLE),
        (EngineBroken("cause"), 14, pb.ERROR_REASON_ENGINE_UNAVAILABLE),
        (WatcherTooSlow("cause"), 10, pb.ERROR_REASON_WATCHER_TOO_SLOW),
        (TooManyWatchers("cause"), 14, pb.ERROR_REASON_TOO_MANY_WATCHERS),
        (LimitExceeded("shop", Limit(namespaces=("shop",), sessions=7), "sessions"), 8, pb.ERROR_REASON_LIMIT_EXCEEDED),
        (Stopping(), 14, pb.ERROR_REASON_DRAINING),
        (DecodeError("cause"), 3, pb.ERROR_REASON_MALFORMED_REQUEST),
        (UnknownMethod("Fetch"), 12, pb.ERROR_REASON_UNIMPLEMENTED),
        (EngineError("cause"), 13, pb.ERROR_REASON_INTERNAL),
        (KeyError(SECRET), 13, pb.ERROR_REASON_INTERNAL),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_has_one_code_one_reason_and_a_fixed_text(
    error: Exception, code: int, reason: pb.ErrorReason
) -> None:
    status = to_status(raised(error), REQUEST)
    assert status.code == code
    (detail,) = [detail for detail in status.details if detail.Is(ErrorInfo.DESCRIPTOR)]
    info = ErrorInfo()
    detail.Unpack(info)
    assert (info.reason, info.domain) == (pb.ErrorReason.Name(reason), "resumed.github.io")
    assert "cause" not in str(status)
    assert SECRET not in str(status)


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (Stopping(), "the server is shutting down"),
        (TooManyWatchers(), "the server has reached its limit of watchers"),
        (WatcherTooSlow(), "the watcher did not keep up with the store"),
        (EngineUnavailable(), "the storage of the store is unavailable"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_commands_explain_each_error_differently(error: Exception, meaning: str) -> None:
    """`resumed check` and `resumed doctor` use the text for the caller."""
    status = to_status(error, REQUEST)
    explanation = explain(from_status(status.code, status.message), "", TlsOptions())
    assert explanation.problem.startswith(f"{meaning} (")
    assert explanation.status is ExitStatus.RETRY


def test_the_log_has_the_type_and_the_frames_of_an_unknown_error_and_no_secret() -> None:
    with capture_logs() as logged:
        to_status(raised(KeyError(SECRET)), REQUEST)
    (line,) = logged
    assert (line["event"], line["log_level"], line["error"]) == ("internal error", "error", "KeyError")
    assert "test_status.py" in line["where"]
    assert SECRET not in str(line)


def test_the_cause_of_an_engine_error_is_logged_once_in_a_while() -> None:
    """An outage must not fill the disk."""
    with capture_logs() as logged:
        for _ in range(100):
            to_status(EngineUnavailable("the disk is gone"), REQUEST)
            to_status(EngineFull("no room"), REQUEST)
    assert [line["cause"] for line in logged] == ["the disk is gone", "no room"]


@pytest.mark.parametrize("error", [InvalidField("ttl", "x"), AlreadyExists(), UnknownMethod("x" * 64)])
def test_errors_of_the_caller_are_not_logged(error: Exception) -> None:
    """Clients must not be able to fill the log."""
    with capture_logs() as logged:
        to_status(error, REQUEST)
    assert not logged
