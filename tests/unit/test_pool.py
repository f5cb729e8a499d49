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
    """It comes back when it is due, and what is due next comes back at once where there is too much."""
    later, due, next_one, latest = Later(), threading.Event(), threading.Event(), threading.Event()
    later.after(0, due.set)
    assert due.wait(10)
    later.after(1_800, next_one.set)
    for _ in range(MOST_HELD - 1):
        later.after(3_600, latest.set)
    assert not next_one.is_set()
    later.after(3_600, latest.set)
    assert next_one.is_set()
    assert not latest.is_set()
    assert MOST_HELD < front._MAX_QUEUED_CALLS
