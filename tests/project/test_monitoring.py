"""Alerts, dashboards and their documentation speak of the same things, and of metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from prometheus_client import CollectorRegistry, generate_latest

import resumed.prometheus
from resumed._policy.stats import ALL_REASONS, Stats
from resumed_server.cli.ticket_keys.agent import Status
from resumed_server.cli.ticket_keys.metrics import AgentMetrics
from resumed_server.limits.config import Limit
from resumed_server.limits.enforcer import LimitEnforcer
from resumed_server.observability.metrics.collector import MetricsCollector
from resumed_server.observability.metrics.recorder import COLUMN
from resumed_server.observability.metrics.shared_segment import MetricsSegment
from resumed_server.observability.metrics.worker import WorkerMetrics
from resumed_server.storage.engine import StorageConnections
from resumed_server.storage.expiry import Sweeper
from resumed_server.watch.hub import WatchHub

if TYPE_CHECKING:
    from resumed import Installation
    from resumed_server.auth.tls import ServerCertificates
    from resumed_server.cli.ticket_keys.agent import Agent
    from resumed_server.cli.ticket_keys.observed_store import ObservedStore
    from resumed_server.config.reloading_file import Followed
    from resumed_server.storage.engine import Engine

ROOT = Path(__file__).parents[2]
ALERTS = (ROOT / "deploy/prometheus/alerts.yaml").read_text()
TESTS = (ROOT / "deploy/prometheus/alerts.test.yaml").read_text()
RUNBOOK = (ROOT / "docs/operations.md").read_text()
NAMES = re.findall(r"- alert: (\w+)", ALERTS)


class Nothing:
    """An engine that holds nothing."""

    def connections(self) -> StorageConnections:
        return StorageConnections(used=0, idle=1, maximum=2, opened=1)


class Idle:
    """An installation that did nothing."""

    namespace, stats, breaker_open, mirror_live, signature_seconds = "shop", Stats(), False, True, 0.001
    removals_live, removals_held, ticket_secrets_held = True, 0, 4
    ticket_secret, keyring_last_reload = (1.0, False), (True, 1.0)


class Serving:
    """Readiness and certificates of a server."""

    ready, begins, expires, handshakes = False, 0.0, 1.0, 0
    name, reload_succeeded, reloaded_at = "grants", True, 1.0


class Starting:
    """An agent of ticket keys, and its store."""

    namespace, available, failures, status = "shop", True, 0, Status()


def exposition() -> str:
    """Return all metrics that servers, frontends and agents of ticket keys show."""
    board, engine, serving = MetricsSegment(1), cast("Engine", Nothing()), Serving()
    counted = WorkerMetrics(
        board,
        0,
        engine,
        readiness=serving,
        certificates=cast("ServerCertificates", serving),
        files=[cast("Followed[Any]", serving)],
    )
    counted._usage = {"sessions": 0, "bytes": 0, "evicted": 0}
    counted._count_connections = lambda: 0
    counted.recorder.on_success("Get", 0.0)
    counted.recorder.operation("shop", COLUMN["get", "hit"])
    counted.report(WatchHub(engine), Sweeper(engine))
    registry = CollectorRegistry()
    registry.register(MetricsCollector(board, {}, 1, LimitEnforcer(Limit(sessions=1))))
    resumed.prometheus.export(cast("Installation", Idle()), registry)
    registry.register(AgentMetrics(cast("ObservedStore", Starting()), cast("Agent", Starting())))
    return generate_latest(registry).decode()


def metrics() -> set[str]:
    """Return the names of all these metrics."""
    return set(re.findall(r"^(resumed_\w+)", exposition(), re.MULTILINE))


def test_alerts_and_dashboards_ask_for_metrics_that_there_are() -> None:
    """An alert on a misspelt metric would never fire."""
    there = metrics()
    queries = re.findall(r"expr: (.*?)\n +(?:for|labels)", ALERTS, re.DOTALL)
    queries += [file.read_text() for file in (ROOT / "deploy/grafana").glob("*.json")]
    asked = set(re.findall(r"resumed_\w+", "\n".join(queries)))
    assert len(asked) > 20
    assert asked <= there


def test_no_label_is_one_that_prometheus_gives_to_a_target() -> None:
    """A ServiceMonitor sets these, and Prometheus would rename ours to exported_namespace and so on."""
    ours = set(re.findall(r'[{,](\w+)="', exposition()))
    assert "session_namespace" in ours
    assert (
        ours & {"namespace", "job", "instance", "pod", "service", "endpoint", "container", "node", "cluster"} == set()
    )


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_promtool_finds_all_names_conventional() -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=exposition(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["store", "frontends"])
def test_the_variables_of_a_dashboard_are_queried_again(name: str) -> None:
    """Without a refresh, Grafana never queries their values."""
    dashboard = json.loads((ROOT / f"deploy/grafana/{name}.json").read_text())
    queries = {each["name"]: each["refresh"] for each in dashboard["templating"]["list"] if each["type"] == "query"}
    assert queries == {"job": 2, "instance": 2, "namespace": 2}


def test_every_alert_has_a_runbook_and_a_test() -> None:
    headings = re.findall(r"^### (\w+)$", RUNBOOK, re.MULTILINE)
    links = re.findall(r"runbook_url: \S+operations\.md#(\w+)", ALERTS)
    assert headings == NAMES
    assert links == [name.lower() for name in NAMES]
    assert set(NAMES) <= set(re.findall(r'"(Resumed\w+)"', TESTS))


def test_every_metric_is_documented() -> None:
    pages = ("operations.md", "frontends.md", "ticket-keys.md")
    documented = "".join((ROOT / "docs" / page).read_text() for page in pages)
    names = {re.sub(r"^resumed_ticket_keys_|_(bucket|count|sum)$", "", name) for name in metrics()}
    assert {name for name in names if f"`{name}" not in documented} == set()


def test_a_frontend_shows_every_reason_before_it_occurs() -> None:
    """Prometheus sees no increase in a series that begins with its first event."""
    registry = CollectorRegistry()
    resumed.prometheus.export(cast("Installation", Idle()), registry)
    text = generate_latest(registry).decode()
    for kind, reasons in ALL_REASONS.items():
        for reason in reasons:
            assert re.search(rf'resumed_frontend_{kind}_total{{.*"{reason}".*}} 0.0', text)
