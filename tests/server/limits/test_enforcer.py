"""Rate limiters, and the limits of identities and namespaces."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from resumed_server.auth.grants import Grants
from resumed_server.limits.config import Limit
from resumed_server.limits.enforcer import MAX_DELAY_SECONDS, LimitEnforcer, LimitExceeded, LimitState, SharedCounters
from resumed_server.limits.rate_limiter import BURST_SECONDS, RateLimiter, RateTable

if TYPE_CHECKING:
    from resumed_server.config.reloading_file import Followed

SHOP = "spiffe://example.org/shop"


class Clock:
    """A clock that a test advances."""

    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def acquire_all(rate: RateLimiter, amount: int = 1) -> int:
    """Acquire until the limiter rejects, and return how often it did not."""
    count = 0
    while not rate.try_acquire(amount):
        count += 1
    return count


def test_a_limiter_allows_its_rate() -> None:
    """A burst of one second, and then the rate."""
    clock = Clock()
    rate = RateLimiter(RateTable(clock), "shop", 100)
    assert acquire_all(rate) in {100, 101}
    wait = rate.try_acquire(1)
    assert 0 < wait <= 0.01
    clock.now += wait
    assert acquire_all(rate) == 1
    total = 0
    for _ in range(500):
        clock.now += 0.02
        total += acquire_all(rate)
    assert total == pytest.approx(1_000, abs=2)


def test_unused_operations_do_not_accumulate() -> None:
    """After an hour without calls, the burst is still one second."""
    clock = Clock()
    rate = RateLimiter(RateTable(clock), "shop", 100)
    acquire_all(rate)
    clock.now += 3_600
    assert acquire_all(rate) in {100, 101}


def test_a_large_call_is_allowed_whole_and_delays_the_next() -> None:
    """A Batch of 256 with a limit of 10 a second, about twice a minute."""
    clock = Clock()
    rate = RateLimiter(RateTable(clock), "shop", 10)
    assert rate.try_acquire(256) == 0
    assert rate.try_acquire(1) == pytest.approx(25.6 - BURST_SECONDS)
    clock.now += 25.6 - BURST_SECONDS + 0.001
    assert rate.try_acquire(256) == 0


def test_limiters_of_different_names_are_independent() -> None:
    """Thousands of them."""
    clock = Clock()
    rates = RateTable(clock)
    assert {acquire_all(RateLimiter(rates, f"tenant {number}", 10)) for number in range(1_000)} <= {10, 11}


def test_slots_of_idle_names_are_reused() -> None:
    """An idle name has nothing to remember."""
    clock = Clock()
    rates = RateTable(clock)
    for number in range(50_000):
        assert RateLimiter(rates, f"tenant {number}", 10).try_acquire(10) == 0
        clock.now += 0.01
    assert RateLimiter(rates, "tenant 49999", 10).try_acquire(100) == 0
    assert RateLimiter(rates, "tenant 49999", 10).try_acquire(1) > 0


def test_forked_processes_count_together() -> None:
    """As the workers of a server do."""
    clock = Clock()
    rates = RateTable(clock)
    rate = RateLimiter(rates, "shop", 100)
    child = os.fork()
    if not child:
        for _ in range(60):
            rate.try_acquire(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert acquire_all(rate) in {40, 41}
    assert acquire_all(RateLimiter(rates, "pay", 100)) in {100, 101}


def test_rejections_of_a_client_that_ignores_them_are_delayed() -> None:
    """The first ones are not; then the delay grows to some seconds."""
    clock = Clock()
    state = LimitState(SHOP, Limit(SHOP, operations_per_second=100), SharedCounters.create(clock))

    def refusal() -> LimitExceeded | None:
        try:
            state.acquire(1)
        except LimitExceeded as error:
            return error
        return None

    while not refusal():
        pass
    delays = [error.delay for _ in range(3_000) if (error := refusal())]
    assert delays[:99] == [0] * 99, "with the one before, as many as it may do"
    assert all(MAX_DELAY_SECONDS / 2 <= delay <= MAX_DELAY_SECONDS for delay in delays[-100:])
    assert len(set(delays[-100:])) == 100, "they do not come back at the same moment"
    clock.now += MAX_DELAY_SECONDS
    while not (error := refusal()):
        pass
    assert (error.delay, error.subject, error.limit) == (0, SHOP, "operations_per_second")
    assert 0 < (error.retry or 0) <= 0.01


def enforcer(text: str, defaults: Limit | None = None) -> tuple[LimitEnforcer, Any]:
    """Return the limits of a grants file, and the file."""
    followed: Followed[Grants] = SimpleNamespace(value=Grants.parse(text))  # type: ignore[assignment]
    return LimitEnforcer(defaults, followed, SharedCounters.create(Clock())), followed


FILE = f"""
[[limit]]
identity = "{SHOP}/*"
operations_per_second = 1
[[limit]]
identity = "dns:*"
operations_per_second = 2
[[limit]]
namespaces = ["shop", "shop.*"]
operations_per_second = 3
[[limit]]
namespaces = ["shop.eu", "pay"]
operations_per_second = 4
"""


@pytest.mark.parametrize(
    ("identities", "rate"),
    [
        ([SHOP], None),
        ([SHOP + "/a"], 1),
        (["dns:a.b"], 2),
        ([SHOP, "dns:a.b"], 2),
        ([SHOP + "/a", "dns:a.b"], 1),
        ([], None),
    ],
)
def test_the_first_limit_that_matches_an_identity_applies(identities: list[str], rate: int | None) -> None:
    """Any of the names of a certificate may match."""
    state = enforcer(FILE)[0].for_identities(identities)
    assert (state.limit.operations_per_second if state else None) == rate


def test_each_identity_has_a_rate_of_its_own() -> None:
    """Although one limit matches both."""
    both = enforcer(FILE)[0]
    first, second = (both.for_identities([f"{SHOP}/{name}"]) for name in "ab")
    assert first
    assert second
    first.acquire(10)
    with pytest.raises(LimitExceeded):
        first.acquire(1)
    second.acquire(1)


def test_namespaces_of_one_limit_share_its_rate() -> None:
    """So a caller gains nothing by inventing namespaces. Each other namespace has a default limit of its own."""
    all_of_them, followed = enforcer(FILE, Limit(operations_per_second=5))
    shop, eu, pay, other, another = map(all_of_them.for_namespace, ("shop", "shop.eu", "pay", "other", "another"))
    assert shop
    assert eu
    assert pay
    assert other
    assert another
    assert [each.limit.operations_per_second for each in (shop, eu, pay, other, another)] == [3, 3, 4, 5, 5]
    shop.acquire(10)
    other.acquire(10)
    for used_up in (eu, other):
        with pytest.raises(LimitExceeded):
            used_up.acquire(1)
    for not_used_up in (pay, another):
        not_used_up.acquire(1)
    followed.value = Grants.parse("")
    changed = all_of_them.for_namespace("shop.eu")
    assert changed
    assert changed.subject == "shop.eu"


def test_without_limits_there_is_no_state() -> None:
    assert LimitEnforcer().for_namespace("shop") is None
    assert LimitEnforcer().for_identities([SHOP]) is None
    assert enforcer("")[0].for_namespace("shop") is None
    assert enforcer(FILE)[0].for_namespace("other") is None
