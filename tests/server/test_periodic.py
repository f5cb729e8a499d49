"""Loops that survive any exception, and heartbeats that reveal one that hangs."""

from __future__ import annotations

import threading

from structlog.testing import capture_logs

from resumed_server.lifecycle.health import STALLED_SECONDS, lives
from resumed_server.periodic import Heartbeat, Periodic
from resumed_server.storage.engine import EngineUnavailable

PATIENCE = 20.0


def test_a_loop_goes_on_after_any_exception() -> None:
    """The log gets only the type of an unexpected exception, whose text may contain a secret."""
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
        tested = Periodic("tested", step, "it failed", retry=0.0)
        tested.start()
        assert done.wait(PATIENCE)
        assert tested.stop(PATIENCE)
    assert [(line["event"], line["log_level"]) for line in logs] == [("it failed", "warning"), ("it failed", "error")]
    assert logs[0]["cause"] == "gone"
    assert "5ec2e7" not in str(logs[1])


def test_stop_does_not_wait_longer_than_it_may() -> None:
    hanging, never = threading.Event(), threading.Event()

    def step() -> float:
        hanging.set()
        never.wait(PATIENCE)
        return 0.0

    tested = Periodic("tested", step, "it failed")
    tested.start()
    assert hanging.wait(PATIENCE)
    assert not tested.stop(0.01)
    never.set()
    assert tested.stop(PATIENCE)


def test_a_process_with_a_loop_that_hangs_does_not_live() -> None:
    now = 100.0
    good, bad = Heartbeat(lambda: now), Heartbeat(lambda: now)
    assert lives((good, bad))
    now += STALLED_SECONDS
    good.beat()
    assert not lives((good, bad))
    bad.beat()
    assert lives((good, bad))
