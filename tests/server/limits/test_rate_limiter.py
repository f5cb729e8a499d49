"""Rate limiters, and the slots that they share."""

from __future__ import annotations

import subprocess
import sys

import pytest

from resumed_server.limits.rate_limiter import BURST_SECONDS, RateLimiter, RateTable
from support.clock import Clock


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
    """As the workers of a server do. The fork is in a process without gRPC."""
    script = """
import os
from resumed_server.limits.rate_limiter import RateLimiter, RateTable
rates = RateTable(lambda: 1_000.0)
limiter = RateLimiter(rates, "shop", 100)
child = os.fork()
if not child:
    for _ in range(60):
        limiter.try_acquire(1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
remaining = [sum(not each.try_acquire(1) for _ in range(200)) for each in (limiter, RateLimiter(rates, "pay", 100))]
assert remaining[0] in {40, 41} and remaining[1] in {100, 101}, remaining
"""
    subprocess.run([sys.executable, "-c", script], check=True)
