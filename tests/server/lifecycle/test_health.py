"""Readiness follows the engine, and each change is logged once."""

from __future__ import annotations

import threading
from typing import cast

from structlog.testing import capture_logs

from resumed_server.lifecycle.health import PATIENCE, Readiness
from resumed_server.storage.engine import Engine, EngineBroken, EngineUnavailable


class Moody:
    """An engine whose probe raises `failure`, if there is one."""

    error: Exception | None = None

    def probe(self) -> None:
        if self.error:
            raise self.error


def test_readiness_follows_the_engine_and_each_change_is_one_log_line() -> None:
    moody = Moody()
    readiness = Readiness(cast("Engine", moody))
    assert not readiness.ready
    with capture_logs() as logged:
        for error in (None, None, EngineUnavailable("gone"), EngineUnavailable("gone"), KeyError("secret"), None):
            moody.error = error
            readiness.probe()
            assert readiness.ready is not bool(error)
            assert not readiness.broken
    assert [line["event"] for line in logged] == ["ready", "not ready", "ready"]
    assert logged[1]["cause"] == "gone"


def test_of_a_broken_engine_nothing_is_hoped_for() -> None:
    """The process can then end and be replaced."""
    moody = Moody()
    moody.error = EngineBroken("damaged")
    readiness = Readiness(cast("Engine", moody))
    readiness.probe()
    assert readiness.broken


def test_an_engine_that_does_not_return_is_not_ready() -> None:
    now = 100.0
    asked, returns = threading.Event(), threading.Event()

    class Hanging:
        def probe(self) -> None:
            asked.set()
            assert returns.wait(20)

    readiness = Readiness(cast("Engine", Hanging()), lambda: now)
    returns.set()
    readiness.probe()
    assert readiness.ready
    asked.clear()
    returns.clear()
    probing = threading.Thread(target=readiness.probe)
    with capture_logs() as logged:
        probing.start()
        assert asked.wait(20)
        now += PATIENCE
        assert readiness.ready
        now += 0.1
        assert not readiness.ready
        readiness.check_overdue()
        readiness.check_overdue()
        returns.set()
        probing.join(20)
        assert readiness.ready
    assert [line["event"] for line in logged] == ["not ready", "ready"]
