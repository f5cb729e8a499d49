"""The report of the benchmark: tables between markers of a page with hand-written text, and plots beside the page."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich.table import Table

from benchmarks.bench import plots

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from benchmarks.bench.results import Results, Verdict

_PAGE = "README.md"
_MARKED = "<!-- {0} -->\n{1}\n<!-- end of {0} -->"
_MARKERS = re.compile(r"<!-- ([a-z_]+) -->\n.*?<!-- end of \1 -->", re.DOTALL)
_HEADINGS = ("what", "target", "measured", "")


def write(directory: Path, found: Mapping[str, Results]) -> None:
    """Write the plots, and the tables into the page; create the page if it does not exist."""
    plots.draw(directory, found)
    page = directory / _PAGE
    parts = {"verdicts": _markdown(_HEADINGS, [_cells(each) for each in _all_verdicts(found)])}
    parts |= {name: _section(name, results) for name, results in found.items()}
    if not page.exists():
        page.write_text("".join(f"\n## {name}\n\n{_MARKED.format(name, '')}\n" for name in parts))

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        return _MARKED.format(name, parts[name]) if name in parts else match[0]

    page.write_text(_MARKERS.sub(fill, page.read_text()))


def verdicts(found: Mapping[str, Results]) -> Table:
    """Return the verdicts as a table for a terminal."""
    table = Table(*_HEADINGS)
    for verdict in _all_verdicts(found):
        table.add_row(*_cells(verdict), style="" if verdict.is_met else "red")
    for name, results in found.items():
        for line in results.missing:
            table.add_row(f"{name}: {line}", style="yellow")
    return table


def _all_verdicts(found: Mapping[str, Results]) -> list[Verdict]:
    return [verdict for results in found.values() for verdict in results.verdicts]


def _cells(verdict: Verdict) -> tuple[str, str, str, str]:
    unit = f" {verdict.unit}" if verdict.unit else ""
    measured = _number(verdict.measured)
    if verdict.low != verdict.high:
        measured += f" ({_number(verdict.low)} to {_number(verdict.high)})"
    what = verdict.what + (f"; worst: {verdict.case}" if verdict.case else "")
    return (
        what,
        f"{verdict.relation} {verdict.limit:,g}{unit}",
        measured + unit,
        "kept" if verdict.is_met else "**missed**",
    )


def _number(figure: float) -> str:
    return f"{figure:,.0f}" if figure in {0, round(figure)} or abs(figure) >= 100 else f"{figure:.2f}"


def _section(name: str, results: Results) -> str:
    parts = [f"![{plots.TITLES[name]}]({name}.svg)"] if name in plots.TITLES and results.figures else []
    parts += [f"{title}:\n\n{_markdown(headings, rows)}" for title, headings, rows in results.tables]
    parts += [f"Not measured: {line}." for line in results.missing]
    facts = ", ".join(f"{name} {value}" for name, value in results.facts.items() if name != "quick")
    return "\n\n".join([*parts, f"({'A quick look only. ' if results.facts['quick'] else ''}{facts})"])


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
