"""The contents and the rate limits of the log."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from structlog.testing import capture_logs

from resumed_server import errors
from resumed_server.auth.grants import Grants
from resumed_server.limits.config import Limit
from resumed_server.limits.enforcer import LimitEnforcer, LimitExceeded
from resumed_server.observability import logging as logs
from resumed_server.rpc.status import to_status

if TYPE_CHECKING:
    import pytest

LIMITS = """
[[limit]]
namespaces = ["shop.*"]
sessions = 1
[[limit]]
namespaces = ["pay"]
sessions = 1
"""


def test_repeated_lines_of_a_library_are_logged_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library grpcio logs an error for each malformed request, so a client could fill the disk."""
    now = [1_000.0]
    monkeypatch.setattr("resumed_server.errors.time.monotonic", lambda: now[0])
    monkeypatch.setattr(errors, "_last_logged", {})
    forwarder = logs._StdlibBridge()
    record = logging.LogRecord(
        "grpc._common", logging.ERROR, "_common.py", 86, "secret %s", ("f00d",), None, "deserialize"
    )
    other = logging.LogRecord("grpc._server", logging.ERROR, "_server.py", 1, "secret", (), None, "start")
    heard: list[str] = []

    class Logger:
        def log(self, _level: int, _event: str, **details: str) -> None:
            heard.append(json.dumps(details))

    monkeypatch.setattr("resumed_server.observability.logging.structlog.get_logger", Logger)
    for _ in range(100):
        forwarder.emit(record)
    forwarder.emit(other)
    assert len(heard) == 2
    now[0] += 10
    forwarder.emit(record)
    assert len(heard) == 3
    assert "f00d" not in "".join(heard)


def test_the_number_of_lines_is_bounded_for_every_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that chooses part of a message must not be able to fill the disk."""
    now = [1_000.0]
    monkeypatch.setattr("resumed_server.errors.time.monotonic", lambda: now[0])
    monkeypatch.setattr(errors, "_last_logged", {})
    lines = sum(errors.should_log("made-up", str(number)) for number in range(10_000))
    assert lines == 1_024
    now[0] += 10
    assert errors.should_log("made-up", "0")
    assert not errors.should_log("made-up", "0")
    assert errors.should_log("other")


def test_a_limit_of_each_namespace_is_one_line_however_many_are_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_last_logged", {})
    by_default = LimitEnforcer(Limit(sessions=1))
    by_file = LimitEnforcer(None, cast("Any", SimpleNamespace(value=Grants.parse(LIMITS))))

    def refuse(enforcer: LimitEnforcer, namespace: str) -> None:
        state = enforcer.for_namespace(namespace)
        assert state
        try:
            for _ in range(2):
                state.admit_entry(1)
        except LimitExceeded as error:
            to_status(error, None)

    with capture_logs() as lines:
        for number in range(100):
            refuse(by_default, f"made-up-{number}")
        for namespace in ("shop.eu", "shop.us", "pay"):
            refuse(by_file, namespace)
    assert [line["of"] for line in lines] == ["made-up-0", "shop.*", "pay"]
