"""The lookups of one suspended handshake are sequential, unique and few."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from resumed._async.suspendable_handshake import MAX_LOOKUPS, Handshake

if TYPE_CHECKING:
    from resumed._policy.lookups import Found

PATIENCE = 10.0
IDS = [bytes([number]) * 32 for number in range(10)]


class FakeShim:
    """Starts lookups that a test answers; ids in `worthless` are not looked up."""

    def __init__(self, *worthless: bytes) -> None:
        self.worthless = worthless
        self.asked: dict[bytes, Future[Found]] = {}

    def prefetch(self, session_id: bytes) -> Future[Found] | None:
        if session_id in self.worthless:
            return None
        assert session_id not in self.asked
        self.asked[session_id] = Future()
        return self.asked[session_id]


class Driver:
    def __init__(self, shim: FakeShim) -> None:
        self.woken = self.searched = 0
        self.shim = shim
        self.handshake = Handshake(PATIENCE, self.waker)

    def waker(self) -> Any:
        self.searched += 1
        return self.wake

    def wake(self) -> None:
        self.woken += 1

    def rests_with(self, *offered: bytes) -> bool:
        """Advance the handshake with a ClientHello; return whether it is suspended."""
        self.handshake.offers(offered, self.shim.prefetch)
        return self.handshake.rests


def test_it_rests_until_the_answer_is_there() -> None:
    shim = FakeShim()
    driver = Driver(shim)
    assert driver.rests_with(IDS[0])
    assert driver.rests_with(IDS[0])
    assert driver.woken == 0
    shim.asked[IDS[0]].set_result((b"value", "store"))
    assert driver.woken == driver.searched == 1
    assert not driver.rests_with(IDS[0])
    answer = driver.handshake.answer(IDS[0])
    assert answer
    assert answer.result() == (b"value", "store")


def test_after_a_miss_the_next_id_is_looked_up() -> None:
    shim = FakeShim(IDS[1])
    driver = Driver(shim)
    assert driver.rests_with(*IDS[:4])
    shim.asked[IDS[0]].set_result((None, "unknown"))
    assert driver.rests_with(*IDS[:4])
    shim.asked[IDS[2]].set_result((b"value", "store"))
    assert not driver.rests_with(*IDS[:4])
    assert list(shim.asked) == [IDS[0], IDS[2]]
    assert driver.handshake.answer(IDS[1]) is None


def test_one_client_hello_is_few_look_ups() -> None:
    """A ClientHello has room for hundreds of identities."""
    shim = FakeShim()
    driver = Driver(shim)
    for session_id in IDS[:MAX_LOOKUPS]:
        assert driver.rests_with(*IDS)
        shim.asked[session_id].set_result((None, "unknown"))
    assert not driver.rests_with(*IDS)
    assert len(shim.asked) == MAX_LOOKUPS
    beyond = driver.handshake.answer(IDS[MAX_LOOKUPS])
    assert beyond
    assert beyond.result() == (None, "too-many-lookups")


def test_what_nobody_would_wake_does_not_rest() -> None:
    shim = FakeShim()
    handshake = Handshake(PATIENCE)
    handshake.offers(IDS, shim.prefetch)
    assert not handshake.rests
    assert not shim.asked
    assert handshake.answer(IDS[0]) is None


def test_what_is_not_worth_a_call_wakes_nobody() -> None:
    driver = Driver(FakeShim(*IDS))
    assert not driver.rests_with(*IDS)
    assert driver.woken == 0
