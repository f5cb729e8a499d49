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
from grafana_foundation_sdk.models.dashboard import DataSourceRef

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


def _rate(metric: str, by: str, **where: str) -> str:
    """Return the query of a counter's rate, summed by labels; "=~" where the value is a pattern."""
    labels = "".join(f'{name}=~"{value}",' for name, value in where.items())
    return f'sum by ({by}) (rate({metric}{{{labels}instance=~"$instance"}}[{RANGE}]))'


def _quantile(share: float, metric: str, by: str, **where: str) -> str:
    return f"histogram_quantile({share}, {_rate(f'{metric}_bucket', by, **where)})"


_HITS, _MISSES = (_rate(f"resumed_frontend_{kind}_total", "namespace") for kind in ("hits", "misses"))
_FOREIGN = _rate("resumed_frontend_foreign_hits_total", "namespace")
_FOUND, _ASKED = (
    _rate("resumed_operations_total", "namespace", operation="get|take", outcome=outcome)
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
                f"p{share * 100:g}": _quantile(share, "resumed_call_seconds", "le", method="Get|Take")
                for share in (0.5, 0.99)
            },
            "In the server, from when a thread takes the call. Handshakes wait 50 ms at most, network included.",
        ),
        Panel("Look-ups", "cps", {"{{namespace}}": _ASKED}),
        Panel("Found", "percentunit", {"{{namespace}}": f"{_FOUND} / {_ASKED}"}, "A miss is no error."),
        Panel(
            "Stored",
            "cps",
            {"{{namespace}}": _rate("resumed_operations_total", "namespace", operation="put", outcome="stored")},
        ),
        Panel("Sessions", "short", {"{{instance}}": 'resumed_sessions{instance=~"$instance"}'}),
        Panel(
            "Bytes",
            "bytes",
            {
                "{{instance}}": 'resumed_storage_bytes{instance=~"$instance"}',
                "{{instance}} may take": 'resumed_storage_capacity_bytes{instance=~"$instance"}',
            },
        ),
        Panel(
            "Dropped and swept",
            "cps",
            {
                "dropped for room": _rate("resumed_evicted_sessions_total", "instance"),
                "swept": _rate("resumed_swept_entries_total", "instance"),
            },
            "Live sessions are dropped when the store is full; swept is what expired.",
        ),
        Panel(
            "Watchers",
            "short",
            {"{{instance}}": 'resumed_watchers{instance=~"$instance"}'},
        ),
        Panel(
            "Watchers' lag",
            "s",
            {"{{instance}}": 'resumed_watchers_lag_seconds{instance=~"$instance"}'},
            "How late a mirror hears of a removal, without the network.",
        ),
        Panel(
            "Processor",
            "percentunit",
            {"worker {{worker}}": _rate("resumed_worker_process_cpu_seconds_total", "instance, worker")},
        ),
    ],
    "frontends": [
        Panel(
            "Resumed",
            "cps",
            {"{{namespace}} from another frontend": _FOREIGN, "{{namespace}} from the same": f"{_HITS} - {_FOREIGN}"},
            "What another frontend negotiated no cache of its own could have resumed.",
        ),
        Panel(
            "Hit rate",
            "percentunit",
            {"{{namespace}}": f"{_HITS} / ({_HITS} + {_MISSES})"},
            "Of the sessions that clients offer.",
        ),
        Panel(
            "Foreign hits", "percentunit", {"{{namespace}}": f"{_FOREIGN} / {_HITS}"}, "N alike frontends: (N - 1) / N."
        ),
        Panel("Hits, by source", "cps", {"{{source}}": _rate("resumed_frontend_hits_total", "source")}),
        Panel("Misses, by reason", "cps", {"{{reason}}": _rate("resumed_frontend_misses_total", "reason")}),
        Panel("Puts", "cps", {"{{outcome}}": _rate("resumed_frontend_puts_total", "outcome")}),
        Panel(
            "Look-ups at the store",
            "s",
            {
                f"{{{{namespace}}}} p{share * 100:g}": _quantile(
                    share, "resumed_frontend_lookup_seconds", "le, namespace"
                )
                for share in (0.5, 0.99)
            },
            "What handshakes wait; mirrored sessions are not in it.",
        ),
        Panel(
            "Processor time saved, at least",
            "percentunit",
            {"{{namespace}}": _rate("resumed_frontend_saved_seconds_total", "namespace")},
            "Signatures that resumed handshakes did without, in cores.",
        ),
        Panel(
            "Breakers open, mirrors and removals cut off",
            "short",
            {
                "{{namespace}} breakers": 'sum by (namespace) (resumed_frontend_breaker_open{instance=~"$instance"})',
                "{{namespace}} mirrors": 'sum by (namespace) (1 - resumed_frontend_mirror_live{instance=~"$instance"})',
                "{{namespace}} removals": (
                    'sum by (namespace) (1 - resumed_frontend_removals_live{instance=~"$instance"})'
                ),
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
                "{{namespace}} removals": 'max by (namespace) (resumed_frontend_removals_held{instance=~"$instance"})',
                "{{namespace}} secrets": (
                    'min by (namespace) (resumed_frontend_ticket_secrets_held{instance=~"$instance"})'
                ),
            },
        ),
    ],
}
_TITLES = {"store": "resumed: the store", "frontends": "resumed: frontends"}
_INSTANCES = {"store": "resumed_engine_up", "frontends": "resumed_frontend_breaker_open"}


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
        .with_variable(
            builders.QueryVariable("instance")
            .label("instance")
            .datasource(source)
            .query(f"label_values({_INSTANCES[name]}, instance)")
            .multi(True)
            .include_all(True)
        )
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
