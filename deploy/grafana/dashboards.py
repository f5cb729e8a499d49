"""The Grafana dashboards as code: `python deploy/grafana/dashboards.py` writes store.json and frontends.json beside it.

Import these into Grafana 10 or newer. DASHBOARDS defines each panel once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import VisibilityMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

HERE = Path(__file__).parent
RANGE = "$__rate_interval"
_HEIGHT, _WIDTH = 8, 8


class Panel(NamedTuple):
    """A graph.

    Attributes:
        title: The title.
        unit: Grafana's name of the unit.
        queries: In PromQL, by the legend of their results.
        note: Explanation for the reader.
    """

    title: str
    unit: str
    queries: dict[str, str]
    note: str = ""


def _series(metric: str, **where: str) -> str:
    """Return the selector of the chosen targets and namespaces; the values of `where` are patterns."""
    by_namespace = metric.startswith(("resumed_frontend_", "resumed_operations_"))
    chosen = {"job": "$job", "instance": "$instance"} | ({"session_namespace": "$namespace"} if by_namespace else {})
    return metric + "{" + ",".join(f'{name}=~"{value}"' for name, value in (where | chosen).items()) + "}"


def _rate(metric: str, by: str, **where: str) -> str:
    """Return the query of a counter's rate, summed by labels."""
    return f"sum by ({by}) (rate({_series(metric, **where)}[{RANGE}]))"


def _by_namespace(function: str, metric: str, before: str = "") -> str:
    """Return the query of a gauge, over the targets of each session namespace."""
    return f"{function} by (session_namespace) ({before}{_series(metric)})"


def _quantile(share: float, metric: str, by: str, **where: str) -> str:
    return f"histogram_quantile({share}, {_rate(f'{metric}_bucket', by, **where)})"


_HITS, _MISSES = (_rate(f"resumed_frontend_{kind}_total", "session_namespace") for kind in ("hits", "misses"))
_FOREIGN = _rate("resumed_frontend_foreign_hits_total", "session_namespace")
_FOUND, _ASKED = (
    _rate("resumed_operations_total", "session_namespace", operation="get|take", outcome=outcome)
    for outcome in ("hit", "hit|miss")
)

DASHBOARDS = {
    "store": [
        Panel("Calls", "cps", {"{{method}}": _rate("resumed_calls_total", "method")}),
        Panel(
            "Calls that fail",
            "cps",
            {"{{code}}": _rate("resumed_calls_total", "code", code="UNAVAILABLE|RESOURCE_EXHAUSTED|INTERNAL|UNKNOWN")},
            "None on a good day.",
        ),
        Panel(
            "Get and Take",
            "s",
            {
                f"p{share * 100:g}": _quantile(share, "resumed_call_duration_seconds", "le", method="Get|Take")
                for share in (0.5, 0.99)
            },
            "In the server, from when a thread takes the call. Handshakes wait 50 ms at most, network included.",
        ),
        Panel("Look-ups", "cps", {"{{session_namespace}}": _ASKED}),
        Panel("Found", "percentunit", {"{{session_namespace}}": f"{_FOUND} / {_ASKED}"}, "A miss is no error."),
        Panel(
            "Stored",
            "cps",
            {
                "{{session_namespace}}": _rate(
                    "resumed_operations_total", "session_namespace", operation="put", outcome="stored"
                )
            },
        ),
        Panel("Sessions", "short", {"{{instance}}": _series("resumed_sessions")}),
        Panel(
            "Bytes",
            "bytes",
            {
                "{{instance}}": _series("resumed_storage_bytes"),
                "{{instance}} capacity": _series("resumed_storage_capacity_bytes"),
            },
        ),
        Panel(
            "Evicted and swept",
            "cps",
            {
                "{{instance}} evicted for room": _rate("resumed_evicted_sessions_total", "instance"),
                "{{instance}} swept": _rate("resumed_swept_entries_total", "instance"),
            },
            "Live sessions are evicted when the store is full; expired ones are swept.",
        ),
        Panel(
            "Watchers",
            "short",
            {"{{instance}}": _series("resumed_watchers")},
        ),
        Panel(
            "Watchers' lag",
            "s",
            {"{{instance}}": _series("resumed_watchers_lag_seconds")},
            "How late a mirror receives a removal, without the network.",
        ),
        Panel(
            "Processor",
            "percentunit",
            {"{{instance}} worker {{worker}}": _rate("resumed_worker_process_cpu_seconds_total", "instance, worker")},
        ),
        Panel(
            "Memory",
            "bytes",
            {"{{instance}} worker {{worker}}": _series("resumed_worker_process_resident_memory_bytes")},
        ),
        Panel(
            "Ready",
            "short",
            {
                "{{instance}} engine": _series("resumed_engine_up"),
                "{{instance}} worker {{worker}}": _series("resumed_worker_ready"),
            },
            "1 if the storage responds.",
        ),
        Panel(
            "Waits and the storage",
            "s",
            {
                "wait for a thread, p99": _quantile(0.99, "resumed_call_wait_duration_seconds", "le"),
                "call to the storage, p99": _quantile(0.99, "resumed_storage_call_duration_seconds", "le"),
            },
        ),
        Panel(
            "Connections",
            "short",
            {
                "{{instance}}": _series("resumed_connections"),
                "{{instance}} maximum": _series("resumed_max_connections"),
            },
        ),
        Panel(
            "Connections to Redis",
            "short",
            {
                "{{instance}} {{state}}": _series("resumed_storage_connections"),
                "{{instance}} maximum": _series("resumed_storage_max_connections"),
            },
        ),
        Panel(
            "Connections to Redis that were opened",
            "cps",
            {"{{instance}}": _rate("resumed_storage_connections_opened_total", "instance")},
            "None on a good day.",
        ),
        Panel(
            "TLS handshakes refused",
            "cps",
            {"{{reason}}": _rate("resumed_tls_handshakes_refused_total", "reason")},
        ),
        Panel(
            "Use of limits",
            "percentunit",
            {"{{subject}} {{limit}}": f"{_series('resumed_limit_used')} / {_series('resumed_limit')}"},
        ),
        Panel(
            "Rejections by limits",
            "cps",
            {"{{subject}} {{limit}}": _rate("resumed_limit_rejections_total", "subject, limit")},
        ),
        Panel(
            "Certificate, lifetime left",
            "percentunit",
            {
                "{{instance}}": (
                    f"({_series('resumed_certificate_expiry_timestamp_seconds')} - time()) / "
                    f"({_series('resumed_certificate_expiry_timestamp_seconds')} - "
                    f"{_series('resumed_certificate_not_before_timestamp_seconds')})"
                )
            },
        ),
        Panel(
            "Reloads",
            "short",
            {"{{instance}} {{file}}": _series("resumed_config_last_reload_successful")},
            "1 if the present content of a file is in use. With 0 a restarted server would not start.",
        ),
    ],
    "frontends": [
        Panel(
            "Resumed",
            "cps",
            {
                "{{session_namespace}} from another frontend": _FOREIGN,
                "{{session_namespace}} from the same": f"{_HITS} - {_FOREIGN}",
            },
            "A cache of its own could not have resumed sessions of other frontends.",
        ),
        Panel(
            "Hit rate",
            "percentunit",
            {"{{session_namespace}}": f"{_HITS} / ({_HITS} + {_MISSES})"},
            "Of the sessions that clients offer.",
        ),
        Panel(
            "Foreign hits",
            "percentunit",
            {"{{session_namespace}}": f"{_FOREIGN} / {_HITS}"},
            "N alike frontends: (N - 1) / N.",
        ),
        Panel("Hits, by source", "cps", {"{{source}}": _rate("resumed_frontend_hits_total", "source")}),
        Panel("Misses, by reason", "cps", {"{{reason}}": _rate("resumed_frontend_misses_total", "reason")}),
        Panel("Puts", "cps", {"{{outcome}}": _rate("resumed_frontend_puts_total", "outcome")}),
        Panel(
            "Look-ups at the store",
            "s",
            {
                f"{{{{session_namespace}}}} p{share * 100:g}": _quantile(
                    share, "resumed_frontend_lookup_duration_seconds", "le, session_namespace"
                )
                for share in (0.5, 0.99)
            },
            "The wait of handshakes; mirrored sessions need none.",
        ),
        Panel(
            "Processor time saved, at least",
            "percentunit",
            {"{{session_namespace}}": _rate("resumed_frontend_saved_seconds_total", "session_namespace")},
            "Signatures that resumed handshakes did without, in cores.",
        ),
        Panel(
            "Breakers open, mirrors and removals cut off",
            "short",
            {
                "{{session_namespace}} breakers": _by_namespace("sum", "resumed_frontend_breaker_open"),
                "{{session_namespace}} mirrors": _by_namespace("sum", "resumed_frontend_mirror_live", "1 - "),
                "{{session_namespace}} removals": _by_namespace("sum", "resumed_frontend_removals_live", "1 - "),
            },
        ),
        Panel(
            "Tickets resumed, by the epoch of their secret",
            "cps",
            {"{{secret}}": _rate("resumed_frontend_tickets_resumed_total", "secret")},
        ),
        Panel(
            "Tickets refused, by reason",
            "cps",
            {"{{reason}}": _rate("resumed_frontend_tickets_refused_total", "reason")},
        ),
        Panel(
            "Removals and secrets of tickets",
            "short",
            {
                "{{session_namespace}} removals": _by_namespace("max", "resumed_frontend_removals_held"),
                "{{session_namespace}} secrets": _by_namespace("min", "resumed_frontend_ticket_secrets_held"),
            },
        ),
        Panel(
            "Age of the secrets that encrypt tickets",
            "s",
            {
                "{{session_namespace}}": _by_namespace(
                    "max", "resumed_frontend_ticket_secret_created_timestamp_seconds", "time() - "
                )
            },
            "At most two rotations, unless the store does not answer.",
        ),
        Panel(
            "Reloads of keyrings",
            "short",
            {"{{session_namespace}}": _by_namespace("min", "resumed_frontend_keyring_last_reload_successful")},
            "1 if the present content of the file is in use. With 0 a restarted frontend would not start.",
        ),
    ],
}
_TITLES = {"store": "resumed: the store", "frontends": "resumed: frontends"}
_TARGETS = {"store": "resumed_engine_up", "frontends": "resumed_frontend_breaker_open"}
_NAMESPACES = {"store": "resumed_operations_total", "frontends": "resumed_frontend_breaker_open"}
"""By dashboard: a metric of its targets, and one of its session namespaces."""


def dashboard(name: str) -> str:
    """Return one of DASHBOARDS as Grafana takes it."""
    source = DataSourceRef(type_val="prometheus", uid="${source}")
    built = (
        builders.Dashboard(_TITLES[name])
        .uid(f"resumed-{name}")
        .tags(["resumed"])
        .refresh("30s")
        .time("now-3h", "now")
        .with_variable(builders.DatasourceVariable("source").label("Prometheus").type("prometheus"))
    )
    for variable, label, query in (
        ("job", "job", f"label_values({_TARGETS[name]}, job)"),
        ("instance", "instance", f'label_values({_TARGETS[name]}{{job=~"$job"}}, instance)'),
        ("namespace", "session namespace", f'label_values({_NAMESPACES[name]}{{job=~"$job"}}, session_namespace)'),
    ):
        built.with_variable(
            builders.QueryVariable(variable)
            .label(label)
            .datasource(source)
            .query(query)
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)  # without it, Grafana never queries the values
            .multi(True)
            .include_all(True)
        )
    for panel in DASHBOARDS[name]:
        graph = (
            timeseries.Panel()
            .title(panel.title)
            .description(panel.note)
            .unit(panel.unit)
            .datasource(source)
            .min(0)
            .fill_opacity(10)
            .show_points(VisibilityMode.NEVER)
            .height(_HEIGHT)
            .span(_WIDTH)
        )
        for number, (legend, query) in enumerate(panel.queries.items()):
            graph.with_target(prometheus.Dataquery().expr(query).legend_format(legend).ref_id(chr(ord("A") + number)))
        built.with_panel(graph)
    return json.dumps(built.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def main() -> None:
    """Write the files."""
    for name in DASHBOARDS:
        (HERE / f"{name}.json").write_text(dashboard(name))


if __name__ == "__main__":
    main()
