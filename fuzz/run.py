"""Fuzzes all targets in turns and prints the results: `python fuzz/run.py --minutes 60`.

Exits 1 if a target crashed, hung or broke its contract; the input is stored, and its path printed. Everything runs on
loopback. Inputs with new coverage go to .build/fuzz, where the next run begins.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from fuzz.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Callable

    from fuzz.target import Target

HERE = Path(__file__).parent
BUILD = HERE.parent / ".build" / "fuzz"
FRONTS = ("grpcio", "native")
HANG = 20
"""Seconds that one input may take. Most take less than a millisecond."""
MEMORY = 1_024
"""MiB that a fuzzing process may take."""
LONGEST_TURN = 120.0
_EDGES = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")
_ITERATIONS = re.compile(r"stat::number_of_executed_units: (\d+)")


@dataclass
class Tally:
    """Results of one target so far."""

    iterations: int = 0
    seconds: float = 0.0
    coverage: str = ""
    failures: list[str] = field(default_factory=list)


def fuzz_target(target: Target, seconds: float, tally: Tally) -> None:
    """Let atheris fuzz a target for a turn."""
    corpus, found = BUILD / target.name, BUILD / "found"
    corpus.mkdir(parents=True, exist_ok=True)
    found.mkdir(exist_ok=True)
    before = set(found.iterdir())
    options = [
        f"-max_total_time={max(1, round(seconds))}",
        f"-timeout={HANG}",
        f"-rss_limit_mb={MEMORY}",
        f"-max_len={target.longest}",
        f"-artifact_prefix={found}/{target.name}-",
        "-print_final_stats=1",
    ]
    command = [sys.executable, str(HERE / "one.py"), target.name, *options, str(corpus), str(target.corpus)]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if edges := _EDGES.findall(ended.stderr):
        tally.coverage = "{} edges, {} features, {} inputs".format(*edges[-1])
    if iterations := _ITERATIONS.search(ended.stderr):
        tally.iterations += int(iterations[1])
    kept = sorted(set(found.iterdir()) - before)
    if kept or ended.returncode:
        (log := found / f"{target.name}-{time.time_ns()}.log").write_text(ended.stderr)
        tally.failures.append(f"{target.name}: {' '.join(map(str, kept)) or ended.returncode}, see {log}")


def keep(target: Target) -> None:
    """Add to a target's corpus its seeds, and the found inputs that add coverage."""
    target.corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (target.corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    found = BUILD / target.name
    found.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "one.py"), target.name, "-merge=1", f"-max_len={target.longest}"]
    subprocess.run([*command, str(target.corpus), str(found)], capture_output=True, check=True)


def fuzz_wire(front: str, seconds: float, tally: Tally) -> None:
    """Let a server of this front be fuzzed over the wire for a turn."""
    command = [sys.executable, str(HERE / "wire.py"), "--transport", front, "--seconds", str(seconds)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        outcome = json.loads(ended.stdout)
    except ValueError:
        tally.failures.append(f"wire {front}: {ended.stderr[-2_000:]}")
        return
    tally.iterations += outcome["inputs"]
    sizes = outcome["size"]
    grown = ", ".join(f"{name} {warm:,} to {last:,}" for name, (warm, last) in sizes.items())
    tally.coverage = f"{len(outcome['answers'])} kinds of answers; {grown}"
    if outcome["failure"]:
        tally.failures.append(f"wire {front}: {outcome['failure']}")


def turns() -> dict[str, Callable[[float, Tally], None]]:
    """Return what can be fuzzed, by name."""
    found: dict[str, Callable[[float, Tally], None]] = {}
    for target in TARGETS.values():
        found[target.name] = partial(fuzz_target, target)
    for front in FRONTS:
        found[f"wire_{front}"] = partial(fuzz_wire, front)
    return found


def line_coverage(names: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the coverage of each source file by all inputs together, and a line for each input that still fails."""
    targets = [TARGETS[name] for name in names if name in TARGETS]
    if not targets:
        return [], []
    command = [sys.executable, str(HERE / "replay.py"), *(target.name for target in targets)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    failures = ended.stderr.splitlines() if ended.returncode else []
    # A target may have logged lines before the JSON; a replay that crashed has printed none.
    lines = ended.stdout.splitlines()[-1:] if ended.returncode in {0, 1} else []
    return [(name, share) for line in lines for name, share in json.loads(line).items()], failures


def report(console: Console, tallies: dict[str, Tally]) -> list[str]:
    """Print the summary; return the inputs that still fail."""
    table = Table("target", "iterations", "a second", "coverage", "failures")
    for name, tally in tallies.items():
        rate = f"{tally.iterations / tally.seconds:,.0f}"
        table.add_row(name, f"{tally.iterations:,}", rate, tally.coverage, str(len(tally.failures)))
    total = sum(tally.iterations for tally in tallies.values())
    table.add_row("all", f"{total:,}", "", "", str(sum(len(tally.failures) for tally in tallies.values())))
    console.print(table)
    coverage, failures = line_coverage(list(tallies))
    for name, reached in coverage:
        console.print(f"{name:<45} {reached}")
    return failures


def main() -> int:
    """Fuzz, print, and return 1 if something broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="for all together")
    parser.add_argument("--only", action="append", metavar="NAME", help="targets whose names have this in them")
    parser.add_argument("--keep", action="store_true", help="fuzz nothing; add to the corpora what was found before")
    parser.add_argument("--list", action="store_true", help="show the names of the targets and what they promise")
    options = parser.parse_args()
    console = Console(width=None if os.isatty(1) else 160, highlight=False)
    chosen = {
        name: turn for name, turn in turns().items() if not options.only or any(part in name for part in options.only)
    }
    if options.list or not chosen:
        for name, target in TARGETS.items():
            console.print(f"{name}: {(target.prepare.__doc__ or '').splitlines()[0]}")
        return int(not chosen)
    if options.keep:
        for name in TARGETS.keys() & chosen.keys():
            keep(TARGETS[name])
        return 0
    tallies = {name: Tally() for name in chosen}
    share = options.minutes * 60 / len(chosen)
    rounds = max(1, round(share / LONGEST_TURN))
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=rounds * len(chosen))
        for number in range(1, rounds + 1):
            for name, turn in chosen.items():
                progress.update(task, description=f"round {number} of {rounds}: {name}")
                tally, started = tallies[name], time.monotonic()
                turn(share / rounds, tally)
                tally.seconds += time.monotonic() - started
                progress.advance(task)
                failed = f", {len(tally.failures)} FAILURES" if tally.failures else ""
                said = f"{number}/{rounds} {name}: {tally.iterations:,} iterations, {tally.coverage}{failed}"
                progress.console.print(said, soft_wrap=True)
    failures = report(console, tallies)
    failures += [failure for tally in tallies.values() for failure in tally.failures]
    for failure in failures:
        console.print(failure, style="bold red", markup=False)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
