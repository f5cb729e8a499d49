"""The look-ups of one handshake: one after the other, each once, and never many."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from resumed._async.suspendable_handshake import MAX_LOOKUPS, SuspendableHandshake
from resumed._policy.lookups import completed_future

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed._policy.lookups import LookupResult

PATIENCE = 10.0
IDS = [bytes([number]) * 32 for number in range(10)]


class Driver:
    """Drives a handshake, counts how often it was resumed, and keeps the look-ups; `worthless` ids need none."""

    def __init__(self, *worthless: bytes) -> None:
        self.resumed = self.searched = 0
        self.worthless = worthless
        self.lookups: dict[bytes, Future[LookupResult]] = {}
        self.handshake = SuspendableHandshake(PATIENCE, self.find_resume_callback)

    def find_resume_callback(self) -> Callable[[], None]:
        self.searched += 1
        return self.resume

    def resume(self) -> None:
        self.resumed += 1

    def find(self, session_id: bytes) -> Future[LookupResult]:
        """Return a result as SessionPolicy does."""
        known = self.handshake.result_for(session_id)
        if known or session_id in self.worthless:
            return known or completed_future((None, "foreign-id"))
        return self.handshake.look_up(session_id, partial(self.start, session_id), may_suspend=True)

    def start(self, session_id: bytes, seconds: float, blocking: bool) -> Future[LookupResult]:
        assert session_id not in self.lookups
        self.lookups[session_id] = Future()
        return self.lookups[session_id]

    def suspends(self, *offered: bytes) -> bool:
        """Take a step with a ClientHello."""
        self.handshake.start_lookups(offered, self.find)
        return self.handshake.suspended


def test_a_handshake_is_suspended_until_the_result_is_there() -> None:
    driver = Driver()
    assert driver.suspends(IDS[0])
    assert driver.suspends(IDS[0])
    assert driver.resumed == 0
    driver.lookups[IDS[0]].set_result((b"value", "store"))
    assert driver.resumed == driver.searched == 1
    assert not driver.suspends(IDS[0])
    result = driver.handshake.result_for(IDS[0])
    assert result
    assert result.result() == (b"value", "store")


def test_after_a_miss_the_next_id_is_looked_up_and_none_after_a_hit() -> None:
    driver = Driver(IDS[1])
    assert driver.suspends(*IDS[:4])
    driver.lookups[IDS[0]].set_result((None, "unknown"))
    assert driver.suspends(*IDS[:4])
    driver.lookups[IDS[2]].set_result((b"value", "store"))
    assert not driver.suspends(*IDS[:4])
    assert list(driver.lookups) == [IDS[0], IDS[2]]
    assert driver.handshake.result_for(IDS[1]) is None


def test_one_client_hello_is_few_look_ups() -> None:
    driver = Driver()
    for session_id in IDS[:MAX_LOOKUPS]:
        assert driver.suspends(*IDS)
        driver.lookups[session_id].set_result((None, "unknown"))
    assert not driver.suspends(*IDS)
    assert len(driver.lookups) == MAX_LOOKUPS
    beyond = driver.handshake.result_for(IDS[MAX_LOOKUPS])
    assert beyond
    assert beyond.result() == (None, "too-many-lookups")


def test_without_a_resume_callback_a_look_up_blocks() -> None:
    started = []

    def start(_seconds: float, blocking: bool) -> Future[LookupResult]:
        started.append(blocking)
        return completed_future((b"value", "store"))

    handshake = SuspendableHandshake(PATIENCE)
    handshake.start_lookups(IDS, lambda session_id: handshake.look_up(session_id, start, may_suspend=True))
    assert not handshake.suspended
    assert started == [True]


def test_an_id_that_needs_no_call_does_not_suspend_a_handshake() -> None:
    driver = Driver(*IDS)
    assert not driver.suspends(*IDS)
    assert driver.resumed == driver.searched == 0
