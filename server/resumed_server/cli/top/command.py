"""`resumed top`: rates and latencies of stores and frontends, from their metrics."""

from __future__ import annotations

import itertools
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from resumed_server.cli.options import parse_option
from resumed_server.cli.top.metrics_client import Period, Scrape, Unreachable, endpoints, scrape_all
from resumed_server.cli.top.view import build_view
from resumed_server.config.types import Duration
from resumed_server.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_Row = dict[str, Any]

_FAILURES = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL", "UNKNOWN")
"""Status codes of failures that the caller did not cause."""


def top(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ENDPOINT...",
            help="Metrics endpoints of stores and frontends, as host:port or URLs; all addresses of a host name are "
            "scraped. Default: 127.0.0.1:9464.",
        ),
    ] = None,
    interval: Annotated[str, typer.Option(metavar="DURATION", help="Time between scrapes, such as 2s or 1m.")] = "2s",
    count: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Number of intervals. Default: until interrupted.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON for each interval instead of tables.")
    ] = False,
) -> None:
    """Watch stores and frontends: rates, hit rates, foreign hits and latencies, by namespace and worker."""
    seconds = parse_option("--interval", interval, Duration.parse)
    if not 0.1 <= seconds <= 3600:  # noqa: PLR2004 - the range in the error
        raise UserError(f"--interval: {interval} is outside 100ms to 1h")
    console = Console(soft_wrap=as_json)
    reports = itertools.islice(_reports(endpoints(targets or ["127.0.0.1:9464"]), seconds), count)
    if as_json:
        for report in reports:
            console.print_json(data=report, indent=None)
    elif not console.is_terminal:
        for report in reports:
            console.print(build_view(report))
    else:
        with Live(Text("waiting for the second scrape ..."), console=console, auto_refresh=False) as live:
            for report in reports:
                live.update(build_view(report), refresh=True)


def _reports(urls: list[str], seconds: float) -> Iterator[_Row]:
    """Yield a report of each interval."""
    before = scrape_all(urls)
    problems = {url: found for url, found in before.items() if isinstance(found, Unreachable)}
    if len(problems) == len(urls):
        raise UserError(
            "\n".join(f"{url} {problem}" for url, problem in problems.items()),
            min(each.status for each in problems.values()),
        )
    while True:
        time.sleep(seconds)
        after = scrape_all(urls)
        periods, missing = {}, {}
        for url, found in after.items():
            was = before[url]
            if isinstance(found, Unreachable):
                missing[url] = str(found)
            elif isinstance(was, Scrape):
                periods[url] = Period(was, found)
        before = after
        yield report(periods, missing)


def report(periods: dict[str, Period], missing: dict[str, str]) -> _Row:
    """Return the JSON report of one interval: rates per second, times in seconds, shares from 0 to 1."""
    stores = {url: period for url, period in periods.items() if "resumed_build_info" in period}
    frontends = [period for period in periods.values() if "resumed_frontend_breaker_open" in period]
    namespaces = set()
    for each in stores.values():
        namespaces.update(each.labels("resumed_operations_total", "session_namespace"))
    for each in frontends:
        namespaces.update(each.labels("resumed_frontend_breaker_open", "session_namespace"))
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "stores": [_store(url, period) for url, period in stores.items()],
        "workers": [
            _worker(url, worker, period)
            for url, period in stores.items()
            for worker in period.labels("resumed_worker_up", "worker")
        ],
        "namespaces": [_namespace(name, list(stores.values()), frontends) for name in sorted(namespaces)],
        "unreachable": missing,
    }


def _store(url: str, period: Period) -> _Row:
    return {
        "endpoint": url,
        "engine": period.text("resumed_build_info", "engine"),
        "up": bool(period.value("resumed_engine_up")),
        "calls": period.rate("resumed_calls_total"),
        "failed": sum(period.rate("resumed_calls_total", code=code) for code in _FAILURES),
        "get_p50": period.quantile(0.5, "resumed_call_duration_seconds", method="Get"),
        "get_p99": period.quantile(0.99, "resumed_call_duration_seconds", method="Get"),
        "sessions": period.value("resumed_sessions"),
        "bytes": period.value("resumed_storage_bytes"),
        "evicted": period.rate("resumed_evicted_sessions_total"),
        "watchers": period.value("resumed_watchers"),
        "watchers_lag": period.value("resumed_watchers_lag_seconds"),
    }


def _worker(url: str, worker: str, period: Period) -> _Row:
    return {
        "endpoint": url,
        "worker": worker,
        "up": bool(period.value("resumed_worker_up", worker=worker)),
        "calls": period.rate("resumed_worker_calls_total", worker=worker),
        "cpu": period.rate("resumed_worker_process_cpu_seconds_total", worker=worker),
        "resident_bytes": period.value("resumed_worker_process_resident_memory_bytes", worker=worker),
    }


def _namespace(name: str, stores: Iterable[Period], frontends: Iterable[Period]) -> _Row:
    """Return the row of a namespace, from the metrics of the stores and of its frontends."""

    def total(periods: Iterable[Period], metric: str, **where: str) -> float:
        return sum(period.rate(metric, session_namespace=name, **where) for period in periods)

    operations = "resumed_operations_total"
    found = sum(total(stores, operations, operation=each, outcome="hit") for each in ("get", "take"))
    missed = sum(total(stores, operations, operation=each, outcome="miss") for each in ("get", "take"))
    ours = [
        period for period in frontends if name in period.labels("resumed_frontend_breaker_open", "session_namespace")
    ]
    hits = total(ours, "resumed_frontend_hits_total")
    foreign = total(ours, "resumed_frontend_foreign_hits_total")
    misses = total(ours, "resumed_frontend_misses_total")
    lookups = [
        period.quantile(0.99, "resumed_frontend_lookup_duration_seconds", session_namespace=name) for period in ours
    ]
    return {
        "namespace": name,
        "lookups": found + missed,
        "found": _share(found, found + missed),
        "stored": total(stores, operations, operation="put", outcome="stored"),
        "frontends": len(ours),
        "resumed": hits,
        "hit_rate": _share(hits, hits + misses),
        "foreign": _share(foreign, hits),
        "lookup_p99": max((each for each in lookups if each is not None), default=None),
        "saved": total(ours, "resumed_frontend_saved_seconds_total"),
        "breakers_open": sum(
            period.value("resumed_frontend_breaker_open", session_namespace=name) or 0 for period in ours
        ),
    }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
