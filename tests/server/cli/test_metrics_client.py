"""Rates and quantiles that `resumed top` computes from two scrapes."""

from __future__ import annotations

from typing import TypeAlias

import pytest

from resumed_server.cli.top.command import report
from resumed_server.cli.top.metrics_client import Period, Scrape, endpoints
from resumed_server.errors import UserError

Values: TypeAlias = dict[tuple[tuple[str, str], ...], float]


def scrape(time: float, **values: Values) -> Scrape:
    return Scrape(
        time, {name: {frozenset(labels): value for labels, value in each.items()} for name, each in values.items()}
    )


def histogram(*counts: float) -> Values:
    """Return cumulative buckets with the bounds 1, 2, 4 and infinity."""
    return {(("le", bound),): count for bound, count in zip(("1.0", "2.0", "4.0", "+Inf"), counts, strict=True)}


class TestPeriod:
    def test_a_counter_that_began_anew_began_at_zero(self) -> None:
        """A restart must not produce a negative rate."""
        two: Values = {(("worker", "0"),): 100.0, (("worker", "1"),): 50.0}
        after: Values = {(("worker", "0"),): 110.0, (("worker", "1"),): 5.0, (("worker", "2"),): 3.0}
        period = Period(scrape(10, calls=two), scrape(12, calls=after))
        assert period.rate("calls") == (10 + 5 + 3) / 2
        assert period.rate("calls", worker="1") == 2.5
        assert period.value("calls") == 118
        assert period.value("nothing") is None

    @pytest.mark.parametrize(
        ("share", "counts", "seconds"),
        [
            (0.5, (10, 10, 10, 10), 0.5),
            (0.5, (0, 10, 10, 10), 1.5),
            (0.99, (90, 98, 100, 100), 3.0),
            (0.99, (0, 0, 0, 10), 4.0),  # all took longer than the largest bound
            (0.5, (0, 0, 0, 0), None),
        ],
    )
    def test_quantiles_are_those_of_prometheus(
        self, share: float, counts: tuple[float, ...], seconds: float | None
    ) -> None:
        nothing = scrape(0, times_bucket=histogram(0, 0, 0, 0))
        assert Period(nothing, scrape(1, times_bucket=histogram(*counts))).quantile(share, "times") == seconds


def test_a_namespace_combines_metrics_of_stores_and_frontends() -> None:
    breaker: Values = {(("session_namespace", "shop"),): 0.0, (("session_namespace", "idle"),): 1.0}
    shop = (("session_namespace", "shop"), ("source", "store"))
    operation = (("session_namespace", "shop"), ("operation", "get"), ("outcome", "hit"))
    idle: dict[str, Values] = {"resumed_build_info": {(): 1.0}, "resumed_frontend_breaker_open": breaker}
    busy: dict[str, Values] = {
        "resumed_frontend_hits_total": {shop: 30.0},
        "resumed_frontend_foreign_hits_total": {shop: 15.0},
        "resumed_frontend_misses_total": {(("session_namespace", "shop"), ("reason", "unknown")): 10.0},
        "resumed_operations_total": {operation: 30.0},
    }
    found = report({"http://here": Period(scrape(0, **idle), scrape(10, **idle, **busy))}, {"http://there": "is gone"})
    none, some = found["namespaces"]
    assert (none["namespace"], none["hit_rate"], none["foreign"], none["breakers_open"]) == ("idle", None, None, 1)
    assert (some["resumed"], some["hit_rate"], some["foreign"], some["lookups"]) == (3.0, 0.75, 0.5, 3.0)
    assert found["unreachable"] == {"http://there": "is gone"}


class TestEndpoints:
    def test_hosts_and_urls(self) -> None:
        given = ["127.0.0.1:9464", "http://127.0.0.1:9464/metrics", "localhost:9464", "http://127.0.0.1:1/m", "[::1]:2"]
        assert endpoints(given) == [
            *("http://127.0.0.1:9464/metrics", "http://127.0.0.1:1/m", "http://[::1]:2/metrics")
        ]

    @pytest.mark.parametrize("text", ["", "here", "here:port", "https://here:1", "unix:/run/m", "http://[::1"])
    def test_invalid_addresses_are_rejected(self, text: str) -> None:
        with pytest.raises(UserError, match="ENDPOINT"):
            endpoints([text])
