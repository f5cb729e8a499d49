"""Sections that are separate scripts: this module runs each with --markdown, and compares its tables with targets."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.bench.results import Results
from benchmarks.bench.rig import CORES

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.bench.rig import Options

HERE = Path(__file__).parents[1]
PATIENCE = 900.0
"""Time limit of a script in seconds."""

Table = list[list[str]]
"""The headings and the rows."""


def measure(name: str, options: Options) -> Results:
    """Run one of SCRIPTS, if its file exists."""
    script, file = SCRIPTS[name], HERE / f"{name}.py"
    if not file.exists():
        return Results(missing=[f"{script.title}: there is no {file.name}"])
    options.progress.add_task(file.name, total=None)
    command = [sys.executable, str(file), "--markdown", *(script.quick if options.quick else script.full)]
    # The scripts bind their processes to cores themselves.
    command = ["taskset", "-c", ",".join(map(str, CORES)), *command]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=PATIENCE, check=False)
    parsed = parse_tables(done.stdout)
    if not parsed:
        return Results(missing=[f"{script.title}: {file.name} ended with status {done.returncode}"])
    results = Results()
    script.judge(results, parsed)
    for number, (headings, *rows) in enumerate(parsed):
        results.tables.append((script.title if not number else "Its figures", headings, rows))
    return results


def parse_tables(text: str) -> list[Table]:
    """Return the Markdown tables in a text."""
    parsed: list[Table] = []
    rows: Table = []
    for line in [*text.splitlines(), ""]:
        if line.lstrip().startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
                rows.append(cells)
        elif rows:
            parsed.append(rows)
            rows = []
    return parsed


def parse_spread(cell: str) -> list[float]:
    """Return lowest, median and highest figure of a cell "median (lowest to highest)"."""
    median, lowest, highest = (float(figure.replace(",", "")) for figure in re.findall(r"[\d.,]*\d", cell)[:3])
    return [lowest, median, highest]


def server_path(results: Results, parsed: list[Table]) -> None:
    """Judge the ratios that have a target in the last column."""
    for what, a_second, *_, wanted in parsed[0][1:]:
        if wanted:
            results.judge(f"{what}, a second", "≥", float(wanted.split()[1]), {"": parse_spread(a_second)})


def watch_delay(results: Results, parsed: list[Table]) -> None:
    """Judge the delay until the last of 50 mirrors has a change."""
    rows = {store: parse_spread(p99) for store, _, p99, *_ in parsed[0][1:]}
    results.judge("50 watchers, 1,000 puts/s: put to visible in every mirror, p99", "≤", 200, rows, "ms")


def event_loop(results: Results, parsed: list[Table]) -> None:
    """Judge how long look-ups delay the event loop of asyncio."""
    cases = {
        f"TLS {version}": [float(held.split("/")[1])]
        for loop, version, lookups, _, held, *_ in parsed[0][1:]
        if (loop, lookups) == ("asyncio", "suspended")
    }
    what = "asyncio server, store answering in 20 ms: event loop held up by look-ups, p99"
    results.judge(what, "≤", 2, cases, "ms")


def resumptions(results: Results, parsed: list[Table]) -> None:
    """Judge the number of lost sessions."""
    tries = [[int(count.replace(",", "")) for count in re.findall(r"[\d,]+", row[4])[:2]] for row in parsed[0][1:]]
    resumed, offered = map(sum, zip(*tries, strict=True))
    what = f"lost of {offered:,} sessions with Puts in the background, client back at once"
    results.judge(what, "≤", 0, {"": [offered - resumed]})


class Script(NamedTuple):
    """The options of a script, in full and for a quick look, and the function that judges its tables."""

    title: str
    full: list[str]
    quick: list[str]
    judge: Callable[[Results, list[Table]], None]


SCRIPTS = {
    "resumptions": Script(
        "Clients that come back at once, to the other frontend",
        ["--tries", "2500", "--puts", "background"],
        ["--tries", "100", "--puts", "background", "--s-client", "5"],
        resumptions,
    ),
    "server_path": Script("Overhead of the server per call", [], ["--rounds", "3", "--calls", "500"], server_path),
    "watch_delay": Script(
        "Delay until a mirror has a change",
        [],
        ["--rounds", "2", "--seconds", "3", "--stores", "lmdb, 1 worker"],
        watch_delay,
    ),
    "event_loop": Script("Event loops", [], ["--rounds", "3"], event_loop),
}
