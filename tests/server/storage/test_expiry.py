"""The sweeper: bounded steps, pauses, and one log line for each outage.

The tests record the pauses instead of waiting for them.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, cast

from structlog.testing import capture_logs

from resumed_server.storage import expiry as sweeper
from resumed_server.storage.engine import EngineFull, EngineUnavailable
from resumed_server.storage.expiry import BATCH_SIZE, IDLE_SECONDS, PAUSE_FACTOR, Sweeper

if TYPE_CHECKING:
    import pytest

    from resumed_server.storage.engine import Engine, EngineError

STEP_SECONDS = 0.5


class Swept:
    """An engine whose steps take half a second each and end as planned; then the sweeper is stopped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *outcomes: int | EngineError) -> None:
        self.outcomes, self.limits, self.pauses = list(outcomes), list[int](), list[float]()
        self.now = 0.0
        monkeypatch.setattr("resumed_server.storage.expiry.time.monotonic", lambda: self.now)

    def sweep(self, limit: int) -> int:
        self.limits.append(limit)
        self.now += STEP_SECONDS
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def is_set(self) -> bool:
        return False

    def wait(self, pause: float) -> bool:
        """Replace the event that stops the sweeper."""
        self.pauses.append(pause)
        return not self.outcomes

    def run(self) -> None:
        """Sweep in this thread until all is done."""
        tested = Sweeper(cast("Engine", self))
        tested._stopping = cast("threading.Event", self)
        tested._run()


def test_while_there_is_more_to_sweep_it_rests_for_longer_than_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    swept = Swept(monkeypatch, BATCH_SIZE, BATCH_SIZE, BATCH_SIZE)
    swept.run()
    assert swept.limits == [BATCH_SIZE] * 3
    assert swept.pauses == [0.0] + [PAUSE_FACTOR * STEP_SECONDS] * 3
    assert PAUSE_FACTOR >= 1


def test_when_nothing_else_has_expired_it_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    swept = Swept(monkeypatch, BATCH_SIZE, BATCH_SIZE - 1, 0)
    swept.run()
    assert swept.pauses == [0.0, PAUSE_FACTOR * STEP_SECONDS, IDLE_SECONDS, IDLE_SECONDS]


def test_an_outage_is_logged_once_and_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    down, full = EngineUnavailable("the database is on strike"), EngineFull("no space left")
    swept = Swept(monkeypatch, 0, down, down, full, 0, full, BATCH_SIZE)
    with capture_logs() as logged:
        swept.run()
    assert [(line["event"], line["log_level"], line["cause"]) for line in logged] == [
        ("sweeping failed", "warning", str(down)),
        ("sweeping failed", "warning", str(full)),
    ]
    assert swept.pauses == [0.0] + [IDLE_SECONDS] * 6 + [PAUSE_FACTOR * STEP_SECONDS]


def test_it_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper, "IDLE_SECONDS", 3_600.0)
    threads, looked = [], threading.Event()

    class Idle:
        def sweep(self, limit: int) -> int:
            threads.append(threading.current_thread())
            looked.set()
            return 0

    tested = Sweeper(cast("Engine", Idle()))
    tested.start()
    assert looked.wait(10)
    started = time.monotonic()
    tested.stop()
    assert time.monotonic() - started < 10
    assert not any(thread.is_alive() for thread in threads)
    assert threads != [threading.current_thread()]
