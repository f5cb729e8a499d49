"""What the log says, and how often."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from resumed_server import logs

if TYPE_CHECKING:
    import pytest


def test_a_library_that_says_the_same_again_and_again_is_heard_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grpcio logs an error for each request that makes no sense, and anybody may send as many as they like."""
    now = [1_000.0]
    monkeypatch.setattr("resumed_server.logs.time.monotonic", lambda: now[0])
    monkeypatch.setattr(logs, "_last_logged", {})
    forwarder = logs._Forwarder()
    record = logging.LogRecord(
        "grpc._common", logging.ERROR, "_common.py", 86, "secret %s", ("f00d",), None, "deserialize"
    )
    other = logging.LogRecord("grpc._server", logging.ERROR, "_server.py", 1, "secret", (), None, "start")
    heard: list[str] = []

    class Logger:
        def log(self, _level: int, _event: str, **details: str) -> None:
            heard.append(json.dumps(details))

    monkeypatch.setattr("resumed_server.logs.structlog.get_logger", Logger)
    for _ in range(100):
        forwarder.emit(record)
    forwarder.emit(other)
    assert len(heard) == 2
    now[0] += 10
    forwarder.emit(record)
    assert len(heard) == 3
    assert "f00d" not in "".join(heard)
