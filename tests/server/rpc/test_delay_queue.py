"""Rejections that are sent delay_queue."""

from __future__ import annotations

import threading

from resumed_server.rpc.delay_queue import MAX_DELAYED, DelayQueue
from resumed_server.rpc.server import _MAX_CALLS


def test_a_full_queue_runs_the_next_action_at_once() -> None:
    """So delayed rejections leave room for other calls."""
    delay_queue, due, next_one, latest = DelayQueue(), threading.Event(), threading.Event(), threading.Event()
    delay_queue.schedule(0, due.set)
    assert due.wait(10)
    delay_queue.schedule(1_800, next_one.set)
    for _ in range(MAX_DELAYED - 1):
        delay_queue.schedule(3_600, latest.set)
    assert not next_one.is_set()
    delay_queue.schedule(3_600, latest.set)
    assert next_one.is_set()
    assert not latest.is_set()
    assert MAX_DELAYED < _MAX_CALLS
