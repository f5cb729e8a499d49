"""The metrics of `resumed ticket-keys`. They have the names of keys, and no key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric

    from resumed_server.cli.ticket_keys.agent import Agent, Attempts
    from resumed_server.cli.ticket_keys.observed_store import ObservedStore
    from resumed_server.cli.ticket_keys.sds import SecretDiscovery


class AgentMetrics(Collector):
    """Reads the state of an agent at each scrape.

    Args:
        store: The store; its namespace is a label of all metrics.
        agent: The agent.
        discovery: Its SDS server; None for none.
    """

    def __init__(self, store: ObservedStore, agent: Agent, discovery: SecretDiscovery | None = None) -> None:
        self._store, self._agent, self._discovery = store, agent, discovery
        self._namespace = store.namespace

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        status = self._agent.status
        keys = status.keys
        if keys:
            created = "Creation of the key that encrypts, in Unix seconds."
            yield self._gauge("key_created_timestamp_seconds", created, keys.encrypting.created)
        yield self._gauge("keys", "Number of keys that open tickets.", len(keys.all) if keys else 0)
        yield self._gauge(
            "held_over", "Whether the key that encrypts is of an ended epoch (1): no newer one came.", status.held_over
        )
        held_over = "Epochs that ended without the key of the next one, since the store did not answer."
        yield self._counter("held_over_epochs", held_over, status.held_over_epochs)
        temporary = bool(keys and keys.temporary)
        yield self._gauge("temporary", "Whether the only key is this agent's own (1): the fleet has none.", temporary)
        yield self._gauge("store_available", "Whether the last call at the store succeeded (1).", self._store.available)
        yield self._counter("store_failures", "Calls at the store that failed.", self._store.failures)
        yield from self._attempts("writes", "Publications of keys at outputs, by outcome.", status.outputs)
        if status.reloads:
            yield from self._attempts("reloads", "Runs of the reload command, by outcome.", [status.reloads])
        if self._discovery:
            yield self._gauge("sds_streams", "Open streams of Envoys.", self._discovery.streams)
            rejections = "Responses that Envoys rejected."
            yield self._counter("sds_rejections", rejections, self._discovery.rejections)

    def _attempts(self, name: str, text: str, attempts: list[Attempts]) -> Iterator[Metric]:
        total = CounterMetricFamily(
            f"resumed_ticket_keys_{name}", text, labels=("session_namespace", "output", "outcome")
        )
        last = GaugeMetricFamily(
            f"resumed_ticket_keys_last_{name.removesuffix('s')}_timestamp_seconds",
            "Time of the last one that succeeded, 0 before the first.",
            labels=("session_namespace", "output"),
        )
        for each in attempts:
            total.add_metric((self._namespace, each.name, "succeeded"), each.succeeded)
            total.add_metric((self._namespace, each.name, "failed"), each.failed)
            last.add_metric((self._namespace, each.name), each.last)
        yield total
        yield last

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        metric = GaugeMetricFamily(f"resumed_ticket_keys_{name}", text, labels=("session_namespace",))
        metric.add_metric((self._namespace,), value)
        return metric

    def _counter(self, name: str, text: str, value: float) -> Metric:
        metric = CounterMetricFamily(f"resumed_ticket_keys_{name}", text, labels=("session_namespace",))
        metric.add_metric((self._namespace,), value)
        return metric
