"""The tables of `resumed top`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable

_Row = dict[str, Any]


def build_view(found: _Row) -> Group:
    """Return the tables of a report; a terminal of 80 columns will do."""
    stores, frontends = found["stores"], [row for row in found["namespaces"] if row["frontends"]]
    parts = []
    if stores:
        parts += [
            _table(
                f"stores, {found['time']}",
                stores,
                {
                    "store": lambda row: _short(row["endpoint"]),
                    "engine": lambda row: _name_cell(row["engine"], row["up"]),
                    "calls/s": lambda row: f"{row['calls']:,.0f}",
                    "failed/s": lambda row: _alarming(row["failed"]),
                    "Get p50": lambda row: _time(row["get_p50"]),
                    "p99": lambda row: _time(row["get_p99"]),
                },
            ),
            _table(
                "what they hold, and who watches",
                stores,
                {
                    "store": lambda row: _short(row["endpoint"]),
                    "sessions": lambda row: _count(row["sessions"]),
                    "bytes": lambda row: _size(row["bytes"]),
                    "evicted/s": lambda row: _alarming(row["evicted"]),
                    "watchers": lambda row: _count(row["watchers"]),
                    "lag": lambda row: _time(row["watchers_lag"]),
                },
            ),
            _table(
                "workers",
                found["workers"],
                {
                    "store": lambda row: _short(row["endpoint"]),
                    "worker": lambda row: _name_cell(row["worker"], row["up"]),
                    "calls/s": lambda row: f"{row['calls']:,.0f}",
                    "CPU": lambda row: f"{row['cpu']:.0%}",
                    "memory": lambda row: _size(row["resident_bytes"]),
                },
            ),
            _table(
                "namespaces, in the stores",
                found["namespaces"],
                {
                    "namespace": lambda row: Text(row["namespace"]),
                    "look-ups/s": lambda row: f"{row['lookups']:,.0f}",
                    "found": lambda row: _percent(row["found"]),
                    "stored/s": lambda row: f"{row['stored']:,.0f}",
                },
            ),
        ]
    if frontends:
        parts.append(
            _table(
                "namespaces, at the frontends",
                frontends,
                {
                    "namespace": lambda row: Text(row["namespace"]),
                    "frontends": lambda row: str(row["frontends"]),
                    "resumed/s": lambda row: f"{row['resumed']:,.0f}",
                    "hit rate": lambda row: _percent(row["hit_rate"]),
                    "foreign": lambda row: _percent(row["foreign"]),
                    "look-up p99": lambda row: _time(row["lookup_p99"]),
                    "breakers open": lambda row: _alarming(row["breakers_open"]),
                },
            )
        )
    unreachable = [Text(f"{url} {problem}", "bold red") for url, problem in found["unreachable"].items()]
    return Group(*parts, *unreachable)


def _table(title: str, rows: list[_Row], columns: dict[str, Callable[[_Row], str | Text]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    return table


def _short(url: str) -> str:
    return url.removeprefix("http://").removesuffix("/metrics")


def _name_cell(name: str, up: bool) -> Text:
    return Text(name) if up else Text(f"{name} down", "bold red")


def _alarming(rate: float) -> Text:
    return Text(f"{rate:,.1f}", "bold red") if rate else Text("0", "dim")


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:,.2f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def _size(number: float | None) -> str:
    if number is None:
        return "-"
    units = ["B", "KiB", "MiB", "GiB"]
    place = min(int(math.log(max(number, 1), 1024)), len(units) - 1)
    return f"{number / 1024**place:,.1f} {units[place]}"
