"""Metrics of a frontend for Prometheus: `pip install 'resumed[prometheus]'`.

    installation = resumed.install(context, ...)
    resumed.prometheus.export(installation)  # import resumed.prometheus
    prometheus_client.start_http_server(9465)

They are of this process, and gathered on each scrape: handshakes are not affected.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from resumed._policy.stats import ALL_REASONS, BUCKETS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import CollectorRegistry, Metric

    from resumed._install import Installation
    from resumed._policy.stats import Stats

__all__ = ["export"]


def export(installation: Installation, registry: CollectorRegistry = REGISTRY) -> None:
    """Have `registry` show the metrics of an installation, for as long as it lives.

    Those of several installations with one namespace are added up.

    Args:
        installation: What install() returned.
        registry: Where to; Prometheus' own if it is not given.
    """
    exporter = _exporters.get(registry)
    if exporter is None:
        exporter = _exporters[registry] = _Exporter()
        registry.register(exporter)
    exporter.add(installation)


class _Exporter(Collector):
    """Collects the statistics of installations."""

    def __init__(self) -> None:
        self._installations: list[Installation] = []

    def add(self, installation: Installation) -> None:
        if installation not in self._installations:
            self._installations.append(installation)

    def collect(self) -> Iterator[Metric]:
        by_namespace: dict[str, list[Installation]] = {}
        for installation in self._installations:
            by_namespace.setdefault(installation.namespace, []).append(installation)
        stats = {namespace: [each.stats for each in group] for namespace, group in by_namespace.items()}
        counters = [
            ("hits", "source", "Sessions that were resumed, by where they came from."),
            ("foreign_hits", "source", "Those of the hits whose sessions another process had issued."),
            ("misses", "reason", "Sessions that clients offered and that were not resumed."),
            ("puts", "outcome", "Sessions that were negotiated, by what became of them."),
            ("removals", "reason", "Sessions that were removed from the fleet, or kept."),
            ("terminations", "reason", "Resumed connections that were ended after their handshake."),
        ]
        if any(each.removals_live is not None for each in self._installations):
            counters += [
                ("tickets_issued", "secret", "Tickets that were issued, by the epoch of their secret."),
                ("tickets_withheld", "reason", "Tickets that were not issued."),
                ("tickets_resumed", "secret", "Tickets that resumed, by the epoch of their secret."),
                ("tickets_refused", "reason", "Tickets that clients offered and that did not resume."),
            ]
        for kind, label, documentation in counters:
            family = CounterMetricFamily(f"resumed_frontend_{kind}", documentation, labels=["session_namespace", label])
            for namespace, group in stats.items():
                counted = sum((getattr(each, kind) for each in group), Counter[str]())
                # With zeros: Prometheus sees no rise in a series that begins with its first.
                for reason in dict.fromkeys([*ALL_REASONS[kind], *counted]):
                    family.add_metric([namespace, reason], counted[reason])
            yield family
        yield _lookups(stats)
        yield from _states(by_namespace)
        yield from _keyrings(by_namespace)
        yield from _savings(by_namespace)


def _lookups(stats: dict[str, list[Stats]]) -> Metric:
    family = HistogramMetricFamily(
        "resumed_frontend_lookup_duration_seconds",
        "Time that look-ups at the store took.",
        labels=["session_namespace"],
    )
    for namespace, group in stats.items():
        counts = [sum(column) for column in zip(*(each.lookup_seconds for each in group), strict=True)]
        buckets = [
            (bound, float(sum(counts[: place + 1]))) for place, bound in enumerate([*map(repr, BUCKETS), "+Inf"])
        ]
        family.add_metric([namespace], buckets, sum(each.lookup_seconds_sum for each in group))
    return family


def _states(by_namespace: dict[str, list[Installation]]) -> Iterator[Metric]:
    breaker = _gauge("breaker_open", "Whether the store kept failing, so that handshakes do not call it.")
    mirror = _gauge("mirror_live", "Whether the mirror follows the store.")
    removals = _gauge("removals_live", "Whether the removals of tickets are received.")
    removals_held = _gauge("removals_held", "Removals of tickets that are in force.")
    secrets_held = _gauge("ticket_secrets_held", "Secrets that may open a ticket.")
    created = _gauge(
        "ticket_secret_created_timestamp_seconds", "Creation of the secret that encrypts new tickets, in Unix seconds."
    )
    held_over = _gauge(
        "ticket_secret_held_over", "Whether the secret that encrypts new tickets is that of an epoch that has ended."
    )
    for namespace, group in by_namespace.items():
        breaker.add_metric([namespace], any(each.breaker_open for each in group))
        live = [each.mirror_live for each in group if each.mirror_live is not None]
        if live:
            mirror.add_metric([namespace], all(live))
        sharing = [each for each in group if each.removals_live is not None]
        if sharing:
            removals.add_metric([namespace], all(each.removals_live for each in sharing))
            removals_held.add_metric([namespace], max(each.removals_held for each in sharing))
            secrets_held.add_metric([namespace], min(each.ticket_secrets_held for each in sharing))
        secrets = [secret for each in group if (secret := each.ticket_secret) is not None]
        if secrets:
            created.add_metric([namespace], min(moment for moment, _ in secrets))
            held_over.add_metric([namespace], any(is_held_over for _, is_held_over in secrets))
    yield breaker
    yield mirror
    yield from (each for each in (removals, removals_held, secrets_held, created, held_over) if each.samples)


def _keyrings(by_namespace: dict[str, list[Installation]]) -> Iterator[Metric]:
    successful = _gauge("keyring_last_reload_successful", "Whether the present content of the keyring file is in use.")
    moments = _gauge(
        "keyring_last_reload_success_timestamp_seconds",
        "Time of the last successful reload of the keyring file, in Unix seconds.",
    )
    for namespace, group in by_namespace.items():
        states = [state for each in group if (state := each.keyring_last_reload) is not None]
        if states:
            successful.add_metric([namespace], min(state for state, _ in states))
            moments.add_metric([namespace], min(moment for _, moment in states))
    yield successful
    yield moments


def _gauge(name: str, documentation: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"resumed_frontend_{name}", documentation, labels=["session_namespace"])


def _savings(by_namespace: dict[str, list[Installation]]) -> Iterator[Metric]:
    saved = CounterMetricFamily(
        "resumed_frontend_saved_seconds",
        "Processor time of the signatures that hits spared, by the time that one takes here: a lower bound.",
        labels=["session_namespace"],
    )
    for namespace, group in by_namespace.items():
        known = [(each.stats, seconds) for each in group if (seconds := each.signature_seconds) is not None]
        if known:
            saved.add_metric(
                [namespace],
                sum((stats.hits.total() + stats.tickets_resumed.total()) * seconds for stats, seconds in known),
            )
    yield saved


_exporters: weakref.WeakKeyDictionary[CollectorRegistry, _Exporter] = weakref.WeakKeyDictionary()
