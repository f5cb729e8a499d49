"""Rejections that are sent later."""

from __future__ import annotations

import threading

from resumed_server.rpc.delay_queue import MOST_HELD, Later
from resumed_server.rpc.server import _MAX_QUEUED_CALLS


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
    assert MOST_HELD < _MAX_QUEUED_CALLS
