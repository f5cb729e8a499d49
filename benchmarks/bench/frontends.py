"""Handshakes of frontends in every language: full, and resumed locally, by mirror, call, or the stack's own sharing.

In turns of shuffled order, as in `sources`: a few full handshakes at one frontend, and as many resumptions at the other
one, or at the same one where the stack resumes only its own. Then each kind under load, in turns as well.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.bench.apache import memcached, missing
from benchmarks.bench.programs import BARE, CALL, MIRROR, OWN, STACKS, TICKETS, Surroundings
from benchmarks.bench.results import Results, ratios, spread
from benchmarks.bench.rig import CLIENTS, FRONTENDS, VERSIONS, Rig, come_back, negotiate, on_core, shuffled
from benchmarks.bench.sources import PUTS_ARRIVE, VISITS
from benchmarks.fleet import p99
from resumed_server.cli.bench.load_generator import Crowd, Plan
from resumed_server.cli.tls_client import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from benchmarks.bench.programs import Server, Stack
    from benchmarks.bench.rig import Options

SECONDS = 0.5
"""Of each turn under load."""
GUESTS = 256
"""Clients under load: before one comes back, a mirror has heard of its session."""
LIMIT = 0.9
C_FRONTENDS = ("nginx", "Apache")
MIRRORED, SHARED = (MIRROR, True), (OWN, True)
COLUMNS = {
    "full, no shim": (BARE, False),
    "full, shim": (CALL, False),
    "resumed locally": (BARE, True),
    "resumed, mirror": MIRRORED,
    "resumed, call": (CALL, True),
    "resumed, shared by the stack": SHARED,
}
"""What a column of the tables shows: which kind of frontend, and whether its resumptions."""

Case = tuple[str, tuple[str, bool]]
"""A stack's name, and what one of COLUMNS shows."""


@dataclass
class Figures:
    """What the turns gave of one case."""

    medians: list[float] = field(default_factory=list)
    """Milliseconds, of each turn."""
    seconds: list[float] = field(default_factory=list)
    """Of all handshakes."""
    rates: list[float] = field(default_factory=list)
    """Connections a second, of each turn."""
    costs: list[float] = field(default_factory=list)
    """Milliseconds of processor time for each connection, of each turn."""


class Pairs:
    """The frontends that run, by stack and kind: two of a kind where they share sessions."""

    def __init__(self, stacks: list[Stack]) -> None:
        self.stacks = stacks
        self.by_kind: dict[tuple[str, str], list[Server]] = {}

    @contextlib.contextmanager
    def running(self, around: Surroundings) -> Iterator[None]:
        """Run them all."""
        with contextlib.ExitStack() as held:
            with on_core(FRONTENDS):
                for stack, number in itertools.product(self.stacks, (1, 2)):
                    # The first is BARE, which has nothing to share; tickets have a section of their own.
                    for kind in [each for each in stack.kinds[number - 1 :] if each != TICKETS]:
                        server = held.enter_context(stack.running(kind, around))
                        self.by_kind.setdefault((stack.name, kind), []).append(server)
            yield

    def cases(self) -> list[Case]:
        """Return what there is to measure."""
        return [(name, which) for name, kind in self.by_kind for which in COLUMNS.values() if which[0] == kind]


def measure(options: Options) -> Results:
    """Measure TLS 1.2 and 1.3."""
    results = Results()
    stacks = []
    for stack in STACKS:
        if absent := stack.missing():
            results.missing.append(f"{stack.name}: {absent} (make bench-frontends)")
        else:
            stacks.append(stack)
    if peers := missing():
        results.missing.append(f"anything: {', '.join(peers)} missing (make peers)")
        return results
    found: dict[str, dict[Case, Figures]] = {}
    pairs, lost = Pairs(stacks), 0
    shares: list[float] = []
    with Rig() as rig, contextlib.ExitStack() as held:
        with on_core(CLIENTS):
            cache = held.enter_context(memcached())
        ticket_key = rig.directory / "ticket.key"
        ticket_key.write_bytes(os.urandom(80))
        around = Surroundings(rig.certificate("P-256"), rig.keyring("P-256"), ticket_key, rig.store(), cache)
        held.enter_context(pairs.running(around))
        for version in VERSIONS:
            figures: defaultdict[Case, Figures] = defaultdict(Figures)
            found[version] = figures
            turns = range(options.turns(24) + 1)
            for turn in options.progress.track(turns, description=f"frontends, TLS {version}"):
                lost += take_turn(pairs, version, figures)
                if not turn:
                    figures.clear()
            turns = range(options.turns(4) + 1)
            for turn in options.progress.track(turns, description=f"frontends, TLS {version}, load"):
                for case in shuffled(pairs.cases()):
                    rate, cost, share = load(pairs, case, version, SECONDS / 2 if options.quick else SECONDS)
                    if turn:
                        figures[case].rates.append(rate)
                        figures[case].costs.append(cost)
                        shares.append(share)
    results.tables = [table for version in found for table in tables(stacks, version, found[version])]
    judge(results, found)
    results.figures = {
        f"TLS {version}": {
            stack.name: {
                column: statistics.median(figures[stack.name, which].medians)
                for column, which in COLUMNS.items()
                if (stack.name, which) in figures
            }
            for stack in stacks
        }
        for version, figures in found.items()
    }
    results.facts = {"full handshakes where a session was offered": lost, "client's share of its core": spread(shares)}
    return results


def take_turn(pairs: Pairs, version: str, figures: Mapping[Case, Figures]) -> int:
    """Let all take a turn, one visit at a time; return how many sessions were offered in vain."""
    clients = {stack.name: Client("localhost", version, stack.ask) for stack in pairs.stacks}
    sessions, lost = {}, 0
    for name, kind in shuffled(pairs.by_kind):
        visits = negotiate(clients[name], pairs.by_kind[name, kind][0].endpoint, VISITS)
        sessions[name, kind] = [visit.session for visit in visits]
        note(figures[name, (kind, False)], [visit.answered for visit in visits])
    time.sleep(PUTS_ARRIVE)
    for name, kind in shuffled(pairs.by_kind):
        visits = come_back(clients[name], pairs.by_kind[name, kind][-1].endpoint, sessions[name, kind])
        resumed = [visit.answered for visit in visits if visit.resumed]
        assert resumed, f"{name}, {kind}: nothing was resumed"
        lost += len(visits) - len(resumed)
        note(figures[name, (kind, True)], resumed)
    return lost


def note(figures: Figures, seconds: list[float]) -> None:
    """Note what one turn gave."""
    figures.medians.append(statistics.median(seconds) * 1e3)
    figures.seconds += seconds


def load(
    pairs: Pairs, case: Case, version: str, seconds: float, share: float | None = None
) -> tuple[float, float, float]:
    """Keep frontends busy: connections a second, processor time for each in milliseconds, how busy the client was."""
    name, (kind, resumed) = case
    servers = pairs.by_kind[name, kind]
    ask = next(stack.ask for stack in pairs.stacks if stack.name == name)
    endpoints = tuple(server.endpoint for server in servers)
    plan = Plan(
        endpoints,
        "localhost",
        version,
        ask,
        share=float(resumed) if share is None else share,
        clients=GUESTS,
        seconds=seconds,
    )

    def used() -> float:
        return sum(server.processor_seconds() for server in servers)

    before: list[float] = []
    tally = Crowd(plan).run(lambda: before.append(used()))
    assert not tally.failures, tally.failures
    connections = sum(map(len, tally.times.values()))
    return connections / tally.wall, (used() - before[0]) / max(1, connections) * 1e3, tally.cpu / tally.wall


def judge(results: Results, found: Mapping[str, Mapping[Case, Figures]]) -> None:
    """Compare with the target."""
    cases = {
        f"{name}, TLS {version}": ratios(figures[name, MIRRORED].medians, figures["Apache", SHARED].medians)
        for version, figures in found.items()
        for name in C_FRONTENDS
        if (name, MIRRORED) in figures and ("Apache", SHARED) in figures
    }
    what = "C frontends, resumed via mirror ÷ Apache with mod_socache_memcache resumed, p50"
    results.judge(what, "≤", LIMIT, cases)
    if cases:
        rows = [[case, spread(turns)] for case, turns in cases.items()]
        results.tables.append(("Resumed via mirror ÷ Apache with memcached, turn by turn", ["frontend", "ratio"], rows))


def tables(
    stacks: list[Stack], version: str, figures: Mapping[Case, Figures]
) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield the tables of one version of TLS."""
    shown: dict[str, Callable[[Figures], str]] = {
        "milliseconds at p50": lambda each: spread(each.medians),
        "milliseconds at p99, of all turns together": lambda each: f"{p99(each.seconds) * 1e3:.2f}",
        "connections a second": lambda each: spread(each.rates, 0),
        "milliseconds of processor time of the frontend for each connection": lambda each: spread(each.costs),
    }
    for what, cell in shown.items():
        rows = [
            [
                f"{stack.name} ({stack.own})" if stack.own else stack.name,
                *(
                    cell(figures[stack.name, which]) if (stack.name, which) in figures else "-"
                    for which in COLUMNS.values()
                ),
            ]
            for stack in stacks
        ]
        yield f"TLS {version}, P-256: {what}", ["frontend (its own way to share)", *COLUMNS], rows
