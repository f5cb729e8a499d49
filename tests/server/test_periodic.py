"""Periodic tasks continue after failures, and their heartbeats reveal a task that hangs."""

from __future__ import annotations

import threading

from structlog.testing import capture_logs

from resumed_server.lifecycle.health import STALLED_SECONDS, is_alive
from resumed_server.periodic import Heartbeat, PeriodicTask
from resumed_server.storage.engine import EngineUnavailable

PATIENCE = 20.0


def test_a_task_continues_after_any_exception() -> None:
    """The log has the first of consecutive failures. The text of an unexpected exception may contain a secret."""
    outcomes: list[Exception | None] = [None, *2 * [EngineUnavailable("gone")], None, KeyError("5ec2e7"), None]
    done = threading.Event()

    def step() -> float:
        if not outcomes:
            done.set()
            return PATIENCE
        if failure := outcomes.pop(0):
            raise failure
        return 0.0

    with capture_logs() as logs:
        tested = PeriodicTask("tested", step, "it failed", retry=0.0)
        tested.start()
        assert done.wait(PATIENCE)
        assert tested.stop(PATIENCE)
    assert [(line["event"], line["log_level"]) for line in logs] == [("it failed", "warning"), ("it failed", "error")]
    assert logs[0]["cause"] == "gone"
    assert "5ec2e7" not in str(logs[1])


def test_stop_returns_after_its_timeout() -> None:
    """Even if a step hangs."""
    hanging, never = threading.Event(), threading.Event()

    def step() -> float:
        hanging.set()
        never.wait(PATIENCE)
        return 0.0

    tested = PeriodicTask("tested", step, "it failed")
    tested.start()
    assert hanging.wait(PATIENCE)
    assert not tested.stop(0.01)
    never.set()
    assert tested.stop(PATIENCE)


def test_a_process_with_a_task_that_hangs_is_not_live() -> None:
    """Its heartbeat is too old. After the next step the process is live again."""
    now = 100.0
    good, bad = Heartbeat(lambda: now), Heartbeat(lambda: now)
    assert is_alive((good, bad))
    now += STALLED_SECONDS
    good.beat()
    assert not is_alive((good, bad))
    bad.beat()
    assert is_alive((good, bad))
