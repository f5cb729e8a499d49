"""The limits of identities and namespaces."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from resumed_server.auth.grants import Grants
from resumed_server.limits.config import Limit
from resumed_server.limits.enforcer import MAX_DELAY_SECONDS, LimitEnforcer, LimitExceeded, LimitState, SharedCounters
from support.clock import Clock

if TYPE_CHECKING:
    from resumed_server.config.reloading_file import Followed

SHOP = "spiffe://example.org/shop"


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
