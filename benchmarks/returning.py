"""What stored sessions cost a frontend: clients that come back at once, and full handshakes under load.

`python benchmarks/returning.py --markdown`, after `make bench-frontends`; `--before TREE` has the frontends of another
tree of this repository, built as well, take turns with those of this one. No process is bound to a core.

A client makes a full handshake at one frontend and comes back at once to the other one. Then 8 connections at a time
make full handshakes, at frontends without the library and with it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.bench.programs import BARE, CALL, MIRROR, ROOT, STACKS, TICKETS, Environment
from benchmarks.bench.results import ratios
from benchmarks.bench.rig import VERSIONS, Rig, shuffled
from benchmarks.measuring import build_table, new_console, spread
from resumed_server.cli.bench.load_generator import LoadGenerator, Plan
from resumed_server.cli.tls_client import Client
from support.server import running_server

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.bench.programs import Server, Stack

CONNECTIONS = 8
WARM_UP = 5
"""Visits of each turn that do not count."""


@dataclasses.dataclass
class Pair:
    """Two frontends of a stack, which share sessions if they have the library, and what their turns gave."""

    stack: Stack
    library: str
    """Whose it is and how it shares sessions; empty for one without it."""
    servers: list[Server]
    full: list[float] = dataclasses.field(default_factory=list)
    """Milliseconds at p50, of each turn."""
    resumed: list[float] = dataclasses.field(default_factory=list)
    offered: int = 0
    kept: int = 0
    """How many of the sessions offered were resumed."""
    rates: list[float] = dataclasses.field(default_factory=list)
    """Full handshakes a second, of each turn."""
    costs: list[float] = dataclasses.field(default_factory=list)
    """Milliseconds of processor time for each, of each turn."""

    def come_back(self, version: str, visits: int) -> None:
        """Let one client take a turn."""
        client = Client("localhost", version, self.stack.request)
        full, resumed = [], []
        for number in range(WARM_UP + visits):
            first = client.visit(self.servers[0].endpoint)
            second = client.visit(self.servers[-1].endpoint, first.session) if self.library else None
            if number < WARM_UP:
                continue
            full.append(first.response_seconds * 1e3)
            if second:
                self.offered += 1
                self.kept += second.resumed
                resumed.append(second.response_seconds * 1e3)
        self.full.append(statistics.median(full))
        if resumed:
            self.resumed.append(statistics.median(resumed))

    def work(self, version: str, seconds: float) -> None:
        """Make full handshakes for a time."""
        endpoint = (self.servers[0].endpoint,)
        plan = Plan(endpoint, "localhost", version, self.stack.request, 0.0, connections=CONNECTIONS, seconds=seconds)
        before: list[float] = []
        tally = LoadGenerator(plan).run(lambda: before.append(self.servers[0].processor_seconds()))
        count = sum(map(len, tally.times.values()))
        self.rates.append(count / tally.wall)
        self.costs.append((self.servers[0].processor_seconds() - before[0]) / max(1, count) * 1e3)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, metavar="TREE", help="another tree, whose frontends are built")
    parser.add_argument("--stacks", nargs="+", default=[stack.name for stack in STACKS], metavar="NAME")
    parser.add_argument("--kinds", nargs="+", default=[CALL], choices=[CALL, MIRROR, TICKETS])
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--transport", default="grpcio", choices=["grpcio", "native"], help="of the store")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--visits", type=int, default=20, help="of the returning client, in each turn")
    parser.add_argument("--seconds", type=float, default=0.6, help="under load, in each turn")
    parser.add_argument("--markdown", action="store_true", help="print tables as benchmarks/results has them")
    options = parser.parse_args()
    trees = {"now": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    cases = [("", ROOT, BARE), *((tree, root, kind) for kind in options.kinds for tree, root in trees.items())]
    console = new_console()
    with Rig() as rig, running_server("--transport", options.transport) as store:
        environment = Environment(rig.certificate("P-256"), rig.keyring("P-256"), Path(), store.target, "")
        for version in options.versions:
            with contextlib.ExitStack() as stack:
                pairs = []
                for name in options.stacks:
                    for tree, root, kind in cases:
                        program = next(each for each in STACKS if each.name == name).in_tree(root)
                        if kind in program.kinds:
                            servers = [stack.enter_context(program.run(kind, environment)) for _ in range(2)]
                            pairs.append(Pair(program, tree and f"{kind}, {tree}", servers))
                for turn in range(options.turns + 1):
                    for pair in shuffled(pairs):
                        pair.come_back(version, options.visits)
                    for pair in shuffled(pairs):
                        pair.work(version, options.seconds)
                    if not turn:
                        pairs[:] = [Pair(pair.stack, pair.library, pair.servers) for pair in pairs]
                console.print(table(version, pairs, markdown=options.markdown))


def table(version: str, pairs: list[Pair], *, markdown: bool) -> Table:
    """Return the table of one version of TLS."""
    headings = ("full ms", "resumed ms", "resumed ÷ full", "resumed of", "full/s", "÷ without", "cpu ms", "÷ without")
    shown = build_table(f"TLS {version}", "library", *headings, markdown=markdown)
    bare = {pair.stack.name: pair for pair in pairs if not pair.library}
    by_stack: defaultdict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_stack[pair.stack.name].append(pair)
    for name, group in by_stack.items():
        for pair in group:
            without = bare[name]
            shown.add_row(
                name,
                pair.library or "without",
                spread(pair.full),
                spread(pair.resumed) if pair.resumed else "",
                spread(ratios(pair.resumed, pair.full)) if pair.resumed else "",
                f"{pair.kept} of {pair.offered}" if pair.offered else "",
                spread(pair.rates, 0),
                spread(ratios(pair.rates, without.rates)) if pair.library else "",
                spread(pair.costs),
                spread(ratios(pair.costs, without.costs)) if pair.library else "",
            )
    return shown


if __name__ == "__main__":
    main()
