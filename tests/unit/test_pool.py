"""The threads that answer calls: every call runs, and grpcio hears of every end exactly once."""

from __future__ import annotations

import threading

import pytest
from structlog.testing import capture_logs

from resumed_server import front
from resumed_server.pool import MOST_HELD, CallPool, Later


def test_every_call_runs_with_its_arguments_and_its_end_is_told_once() -> None:
    """Whether the call or its observer is faster."""
    pool, told, all_told = CallPool(4), [], threading.Event()

    def tell(_call: object) -> None:
        told.append(1)
        if len(told) == 10_000:
            all_told.set()

    results: list[int] = []
    for number in range(10_000):
        pool.submit(results.append, number).add_done_callback(tell)
    assert all_told.wait(10)
    assert sorted(results) == list(range(10_000))
    assert len(told) == 10_000


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_call_that_raises_ends_no_thread(error: type[BaseException]) -> None:
    """It is logged, its end is told, and the only thread goes on."""
    pool, ended = CallPool(1), threading.Event()

    def fail() -> None:
        raise error("secret")

    with capture_logs() as logged:
        pool.submit(fail)
        pool.submit(int).add_done_callback(lambda _call: ended.set())
        assert ended.wait(10)
    assert [(line["event"], line["error"]) for line in logged] == [("call failed", error.__name__)]
    assert "secret" not in str(logged)


def test_what_is_held_back_leaves_places_for_other_calls() -> None:
    """It comes back when it is due; beyond so many nothing is held, whatever there is to come back to."""
    later, came_back = Later(), threading.Event()
    assert later.after(0, came_back.set)
    assert came_back.wait(10)
    assert all(later.after(3_600, threading.Event) for _ in range(MOST_HELD))
    assert not later.after(0, threading.Event)
    assert MOST_HELD < front._MAX_QUEUED_CALLS
