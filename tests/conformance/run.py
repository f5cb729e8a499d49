"""Holds every frontend to behaviour.toml, and prints a matrix for each mode: `make frontends`.

Exits 1 if a cell is not as it must be. --write puts the matrices into docs/languages.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from conformance import scenarios
from conformance.client import Client
from conformance.fleet import BUILD, MODES, ROOT, VERSIONS, Behaviour, Stack, table
from support.server import running_server

if TYPE_CHECKING:
    import ssl

PAGE = ROOT / "docs" / "languages.md"
BEGIN, END = "<!-- matrix: written by `make frontends` -->", "<!-- end of the matrix -->"
_FORMATS = "A format in a cell: the session is serialized in a way of its own, which the other stack cannot read."
NAMES = {version: name for name, version in VERSIONS.items()}
_WITH_TICKETS = 'With `sessions="tickets"`, where clients keep the sessions:'

console = Console(stderr=True)


class Matrix:
    """What became of each scenario with each frontend."""

    def __init__(self, stacks: list[Stack]) -> None:
        self.stacks = stacks
        self.reasons: list[str] = []
        self.failures = 0

    def cell(self, stack: Stack, scenario: str, outcomes: dict[str, str]) -> str:
        """Return a cell of the table; results common to all versions of TLS appear once."""
        if scenario in stack.cannot:
            return f"[{self._number(stack.cannot[scenario])}]"
        failed = [f"{version}: {complaint}" for version, complaint in outcomes.items() if complaint]
        self.failures += len(failed)
        return "; ".join(["**failed**", *failed]) if failed else "yes"

    def _number(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason) + 1


def attempt(scenario: str, *arguments: object) -> str:
    """Run a scenario; return its failures, or nothing."""
    try:
        getattr(scenarios, scenario)(*arguments)
    except Exception as error:  # noqa: BLE001  # the other frontends are still tested
        if os.environ.get("VERBOSE"):
            traceback.print_exc()
        return f"{type(error).__name__} {error}".splitlines()[0][:120].replace("|", "/")
    return ""


def common(*stacks: Stack) -> list[ssl.TLSVersion]:
    """Return the versions of TLS in which all of these share their sessions."""
    return [version for name, version in VERSIONS.items() if all(name in stack.versions for stack in stacks)]


def run(
    behaviours: list[Behaviour], stacks: list[Stack], vectors: dict[str, str], target: str, at_once: int
) -> tuple[str, int]:
    """Run everything but the vectors; return the matrix as Markdown, and how many cells are not as they must be."""
    matrix = Matrix(stacks)
    pairs = [(a, b) for a, b in permutations(stacks, 2) if a.format == b.format]
    with ThreadPoolExecutor(at_once) as pool:
        cells = {
            (row.scenario, stack.name, version): pool.submit(attempt, row.scenario, stack, target, Client(version))
            for row in behaviours
            for stack in stacks
            for version in common(stack)
            if row.scenario not in stack.cannot
        }
        across = {
            (a.name, b.name, version): pool.submit(attempt, "across", a, b, target, Client(version))
            for a, b in pairs
            for version in common(a, b)
        }
    lines = [
        "| Callback | Situation | What must happen | " + " | ".join(stack.name for stack in stacks) + " |",
        "|---" * (3 + len(stacks)) + "|",
    ]
    for row in behaviours:
        outcomes = {
            stack.name: {
                NAMES[version]: cells[row.scenario, stack.name, version].result()
                for version in common(stack)
                if row.scenario not in stack.cannot
            }
            for stack in stacks
        }
        shown = " | ".join(matrix.cell(stack, row.scenario, outcomes[stack.name]) for stack in stacks)
        lines.append(f"| {row.callback} | {row.situation} | {row.must} | {shown} |")
    passed = [vectors[stack.name] for stack in stacks]
    matrix.failures += passed.count("**failed**")
    lines.append("| | the vectors of sealing and ids | they pass | " + " | ".join(passed) + " |")
    if matrix.reasons:
        lines += ["", *(f"[{number}] {reason}.  " for number, reason in enumerate(matrix.reasons, 1))]
    lines += ["", "The stack in the column resumes sessions of the stack in the row, and the reverse:", ""]
    lines += ["| | " + " | ".join(stack.name for stack in stacks) + " |", "|---" * (1 + len(stacks)) + "|"]
    for giver in stacks:
        shown_row = []
        for taker in stacks:
            if giver is taker:
                shown_row.append("yes" if "another_process" not in giver.cannot else "no")
            elif giver.format != taker.format:
                shown_row.append(f"`{giver.format}`")
            else:
                complaints = {
                    NAMES[version]: across[giver.name, taker.name, version].result() for version in common(giver, taker)
                }
                shown_row.append(matrix.cell(giver, "across", complaints))
        lines.append(f"| {giver.name} | " + " | ".join(shown_row) + " |")
    lines += [
        "",
        _FORMATS,
    ]
    return "\n".join(lines), matrix.failures


def vector_cell(stack: Stack) -> str:
    """Run the vectors of a language."""
    if not stack.vectors:
        return f"as {stack.sealing}"
    try:
        stack.run(stack.vectors)
    except subprocess.CalledProcessError:
        return "**failed**"
    return "yes"


def main() -> int:
    """Build, run, print."""
    parser = argparse.ArgumentParser(prog="make frontends", description=__doc__)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="frontends")
    parser.add_argument("--scenario", nargs="*", metavar="NAME", help="rows")
    parser.add_argument("--mode", choices=MODES, action="append", help="both, if not given")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="scenarios at once (2)")
    parser.add_argument("--write", action="store_true", help="put the matrix into docs/languages.md")
    parser.add_argument("--no-build", action="store_true", help="what was built before")
    arguments = parser.parse_args()
    behaviours, stacks = table()
    if arguments.only:
        stacks = [stack for stack in stacks if stack.name in arguments.only]
    if arguments.scenario is not None:
        behaviours = [row for row in behaviours if row.scenario in arguments.scenario]
    for stack in [stack for stack in stacks if not stack.available]:
        console.print(f"left out: {stack.name} needs {stack.needs}")
    stacks = [stack for stack in stacks if stack.available]
    BUILD.mkdir(parents=True, exist_ok=True)
    built: list[list[str]] = []
    for stack in stacks if not arguments.no_build else []:
        if stack.build and stack.build not in built:
            console.print(f"building {stack.name}")
            stack.run(stack.build)
            built.append(stack.build)
    started = time.monotonic()
    vectors = {stack.name: vector_cell(stack) for stack in stacks}
    matrices, failures = [], 0
    for mode in arguments.mode or MODES:
        rows = [row for row in behaviours if mode in row.modes]
        frontends = [frontend for stack in stacks if (frontend := stack.in_mode(mode))]
        with running_server() as store:
            matrix, failed = run(rows, frontends, vectors, store.target, arguments.at_once)
        matrices.append(matrix)
        failures += failed
    matrix = f"\n\n{_WITH_TICKETS}\n\n".join(matrices)
    sys.stdout.write(f"{matrix}\n")
    console.print(f"{failures} failed, {time.monotonic() - started:.0f} s")
    if arguments.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n\n{matrix}\n\n{END}{after}", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
