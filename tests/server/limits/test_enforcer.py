"""Rate limits, shared between forked processes, and the assignment of budgets."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from resumed_server.auth.grants import Grants
from resumed_server.limits.config import Limit
from resumed_server.limits.enforcer import (
    BURST_SECONDS,
    LONGEST_HOLD,
    Budget,
    Budgets,
    LimitExceeded,
    Rate,
    Rates,
    Shared,
)

if TYPE_CHECKING:
    from resumed_server.config.reloading_file import Followed

SHOP = "spiffe://example.org/shop"


class Clock:
    """A clock that a test moves by hand."""

    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def spent(rate: Rate, amount: int = 1) -> int:
    """Spend until there is nothing left, and return how often that went."""
    count = 0
    while not rate.spend(amount):
        count += 1
    return count


def test_a_rate_lets_through_what_it_says() -> None:
    clock = Clock()
    rate = Rate(Rates(clock), "shop", 100)
    assert spent(rate) in {100, 101}
    wait = rate.spend(1)
    assert 0 < wait <= 0.01
    clock.now += wait
    assert spent(rate) == 1
    total = 0
    for _ in range(500):
        clock.now += 0.02
        total += spent(rate)
    assert total == pytest.approx(1_000, abs=2)


def test_what_is_not_spent_is_not_saved_up() -> None:
    clock = Clock()
    rate = Rate(Rates(clock), "shop", 100)
    spent(rate)
    clock.now += 3_600
    assert spent(rate) in {100, 101}


def test_a_large_call_is_let_through_whole_and_paid_for_afterwards() -> None:
    clock = Clock()
    rate = Rate(Rates(clock), "shop", 10)
    assert rate.spend(256) == 0
    assert rate.spend(1) == pytest.approx(25.6 - BURST_SECONDS)
    clock.now += 25.6 - BURST_SECONDS + 0.001
    assert rate.spend(256) == 0


def test_rates_of_others_are_others() -> None:
    clock = Clock()
    rates = Rates(clock)
    assert {spent(Rate(rates, f"tenant {number}", 10)) for number in range(1_000)} <= {10, 11}


def test_the_memory_of_who_rests_is_used_again() -> None:
    clock = Clock()
    rates = Rates(clock)
    for number in range(50_000):
        assert Rate(rates, f"tenant {number}", 10).spend(10) == 0
        clock.now += 0.01
    assert Rate(rates, "tenant 49999", 10).spend(100) == 0
    assert Rate(rates, "tenant 49999", 10).spend(1) > 0


def test_forked_processes_count_together() -> None:
    clock = Clock()
    rates = Rates(clock)
    rate = Rate(rates, "shop", 100)
    child = os.fork()
    if not child:
        for _ in range(60):
            rate.spend(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert spent(rate) in {40, 41}
    assert spent(Rate(rates, "pay", 100)) in {100, 101}


def test_who_does_not_heed_refusals_waits_for_them() -> None:
    clock = Clock()
    budget = Budget(SHOP, Limit(SHOP, operations_per_second=100), Shared.fresh(clock))

    def refusal() -> LimitExceeded | None:
        try:
            budget.spend(1)
        except LimitExceeded as error:
            return error
        return None

    while not refusal():
        pass
    holds = [error.hold for _ in range(3_000) if (error := refusal())]
    assert holds[:99] == [0] * 99, "with the one before, as many as it may do"
    assert all(LONGEST_HOLD / 2 <= hold <= LONGEST_HOLD for hold in holds[-100:])
    assert len(set(holds[-100:])) == 100, "they do not come back at the same moment"
    clock.now += LONGEST_HOLD
    while not (error := refusal()):
        pass
    assert (error.hold, error.of, error.limit) == (0, SHOP, "operations_per_second")
    assert 0 < (error.retry or 0) <= 0.01


def budgets(text: str, defaults: Limit | None = None) -> tuple[Budgets, Any]:
    """Return the budgets of a grants file, and the file."""
    followed: Followed[Grants] = SimpleNamespace(value=Grants.parse(text))  # type: ignore[assignment]
    return Budgets(defaults, followed, Shared.fresh(Clock())), followed


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
def test_the_first_limit_that_names_an_identity_is_its_budget(identities: list[str], rate: int | None) -> None:
    budget = budgets(FILE)[0].of_identities(identities)
    assert (budget.limit.operations_per_second if budget else None) == rate


def test_each_identity_has_a_budget_of_its_own() -> None:
    both = budgets(FILE)[0]
    first, second = (both.of_identities([f"{SHOP}/{name}"]) for name in "ab")
    assert first
    assert second
    first.spend(10)
    with pytest.raises(LimitExceeded):
        first.spend(1)
    second.spend(1)


def test_namespaces_of_one_limit_have_one_budget() -> None:
    """Otherwise a tenant could multiply its limit by inventing namespaces."""
    all_of_them, followed = budgets(FILE, Limit(operations_per_second=5))
    shop, eu, pay, other, another = map(all_of_them.of_namespace, ("shop", "shop.eu", "pay", "other", "another"))
    assert shop
    assert eu
    assert pay
    assert other
    assert another
    assert [each.limit.operations_per_second for each in (shop, eu, pay, other, another)] == [3, 3, 4, 5, 5]
    shop.spend(10)
    other.spend(10)
    for used_up in (eu, other):
        with pytest.raises(LimitExceeded):
            used_up.spend(1)
    for not_used_up in (pay, another):
        not_used_up.spend(1)
    followed.value = Grants.parse("")
    changed = all_of_them.of_namespace("shop.eu")
    assert changed
    assert changed.name == "shop.eu"


def test_without_limits_there_are_no_budgets() -> None:
    assert Budgets().of_namespace("shop") is None
    assert Budgets().of_identities([SHOP]) is None
    assert budgets("")[0].of_namespace("shop") is None
    assert budgets(FILE)[0].of_namespace("other") is None
