"""Sections that are scripts of their own: each runs with --markdown, and its tables are judged here."""

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
"""Seconds that a script may take."""

Table = list[list[str]]
"""The headings and the rows."""


def measure(name: str, options: Options) -> Results:
    """Run one of SCRIPTS, if it is there."""
    script, file = SCRIPTS[name], HERE / f"{name}.py"
    if not file.exists():
        return Results(missing=[f"{script.title}: there is no {file.name}"])
    options.progress.add_task(file.name, total=None)
    command = [sys.executable, str(file), "--markdown", *(script.quick if options.quick else script.full)]
    # The scripts choose cores of their own.
    command = ["taskset", "-c", ",".join(map(str, CORES)), *command]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=PATIENCE, check=False)
    found = tables(done.stdout)
    if not found:
        return Results(missing=[f"{script.title}: {file.name} ended with status {done.returncode}"])
    results = Results()
    script.judge(results, found)
    for number, (headings, *rows) in enumerate(found):
        results.tables.append((script.title if not number else "Its figures", headings, rows))
    return results


def tables(text: str) -> list[Table]:
    """Return the Markdown tables in a text."""
    found: list[Table] = []
    rows: Table = []
    for line in [*text.splitlines(), ""]:
        if line.lstrip().startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
                rows.append(cells)
        elif rows:
            found.append(rows)
            rows = []
    return found


def turns(cell: str) -> list[float]:
    """Return least, median and greatest of "median (least to greatest)"."""
    median, least, greatest = (float(figure.replace(",", "")) for figure in re.findall(r"[\d.,]*\d", cell)[:3])
    return [least, median, greatest]


def server_path(results: Results, found: list[Table]) -> None:
    """Judge the ratios that have a target, which stands in the last column."""
    for what, a_second, *_, wanted in found[0][1:]:
        if wanted:
            results.judge(f"{what}, a second", "≥", float(wanted.split()[1]), {"": turns(a_second)})


def watch_delay(results: Results, found: list[Table]) -> None:
    """Judge how late the last of 50 mirrors knows."""
    rows = {store: turns(p99) for store, _, p99, *_ in found[0][1:]}
    results.judge("50 watchers, 1,000 puts/s: put to visible in every mirror, p99", "≤", 200, rows, "ms")


def event_loop(results: Results, found: list[Table]) -> None:
    """Judge how long look-ups hold up asyncio's loop."""
    cases = {
        f"TLS {version}": [float(held.split("/")[1])]
        for loop, version, lookups, _, held, *_ in found[0][1:]
        if (loop, lookups) == ("asyncio", "while it rests")
    }
    what = "asyncio server, store answering in 20 ms: event loop held up by look-ups, p99"
    results.judge(what, "≤", 2, cases, "ms")


def resumptions(results: Results, found: list[Table]) -> None:
    """Judge how many sessions were lost."""
    tries = [[int(count.replace(",", "")) for count in re.findall(r"[\d,]+", row[4])[:2]] for row in found[0][1:]]
    resumed, offered = map(sum, zip(*tries, strict=True))
    what = f"lost of {offered:,} sessions with Puts in the background, client back at once"
    results.judge(what, "≤", 0, {"": [offered - resumed]})


class Script(NamedTuple):
    """How to call a script, for a quick look too, and what judges its tables."""

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
    "server_path": Script("What the server adds to a call", [], ["--rounds", "3", "--calls", "500"], server_path),
    "watch_delay": Script(
        "How late a mirror knows", [], ["--rounds", "2", "--seconds", "3", "--stores", "lmdb, 1 worker"], watch_delay
    ),
    "event_loop": Script("Event loops", [], ["--rounds", "3"], event_loop),
}
