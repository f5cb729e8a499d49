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

from benchmarks.bench.apache import list_missing, run_memcached
from benchmarks.bench.programs import BARE, CALL, MIRROR, OWN, STACKS, TICKETS, Environment
from benchmarks.bench.results import Results, ratios
from benchmarks.bench.rig import CLIENTS, FRONTENDS, VERSIONS, Rig, negotiate, offer_sessions, shuffled
from benchmarks.bench.sources import PUTS_ARRIVE, VISITS
from benchmarks.measuring import bind_to_cores, p99, spread
from resumed_server.cli.bench.load_generator import LoadGenerator, Plan
from resumed_server.cli.tls_client import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from benchmarks.bench.programs import Server, Stack
    from benchmarks.bench.rig import Options

SECONDS = 0.5
"""Duration of a turn under load."""
CLIENTS_UNDER_LOAD = 256
"""Number of clients under load: before one returns, every mirror has received its session."""
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
"""The kind of frontend of each column of the tables, and whether the column shows its resumptions."""

Case = tuple[str, tuple[str, bool]]
"""The name of a stack, and a value of COLUMNS."""


@dataclass
class Figures:
    """The figures of one case, of all turns."""

    medians: list[float] = field(default_factory=list)
    """Milliseconds: the median of each turn."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of each handshake, of all turns together."""
    rates: list[float] = field(default_factory=list)
    """Connections per second, of each turn."""
    costs: list[float] = field(default_factory=list)
    """Milliseconds of processor time per connection, of each turn."""


class FrontendsByKind:
    """The running frontends, by stack and kind."""

    def __init__(self, stacks: list[Stack]) -> None:
        self.stacks = stacks
        self.by_kind: dict[tuple[str, str], list[Server]] = {}


class Pairs(FrontendsByKind):
    """Running frontends, two of each kind that shares sessions."""

    @contextlib.contextmanager
    def run(self, environment: Environment) -> Iterator[None]:
        """Run all frontends during the context."""
        with contextlib.ExitStack() as exit_stack:
            with bind_to_cores({FRONTENDS}):
                for stack, number in itertools.product(self.stacks, (1, 2)):
                    # One frontend of the first kind is enough: BARE shares nothing. Section `tickets` measures TICKETS.
                    for kind in [each for each in stack.kinds[number - 1 :] if each != TICKETS]:
                        server = exit_stack.enter_context(stack.run(kind, environment))
                        self.by_kind.setdefault((stack.name, kind), []).append(server)
            yield

    def cases(self) -> list[Case]:
        """Return all cases that the running frontends allow."""
        return [(name, which) for name, kind in self.by_kind for which in COLUMNS.values() if which[0] == kind]


def measure(options: Options) -> Results:
    """Measure TLS 1.2 and 1.3."""
    results = Results()
    stacks = []
    for stack in STACKS:
        if absent := stack.find_obstacle():
            results.missing.append(f"{stack.name}: {absent} (make bench-frontends)")
        else:
            stacks.append(stack)
    if programs := list_missing():
        results.missing.append(f"anything: {', '.join(programs)} missing (make peers)")
        return results
    found: dict[str, dict[Case, Figures]] = {}
    pairs, lost = Pairs(stacks), 0
    shares: list[float] = []
    with Rig() as rig, contextlib.ExitStack() as exit_stack:
        with bind_to_cores({CLIENTS}):
            cache = exit_stack.enter_context(run_memcached())
        ticket_key = rig.directory / "ticket.key"
        ticket_key.write_bytes(os.urandom(80))
        environment = Environment(rig.certificate("P-256"), rig.keyring("P-256"), ticket_key, rig.run_store(), cache)
        exit_stack.enter_context(pairs.run(environment))
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
                    rate, cost, share = measure_load(pairs, case, version, SECONDS / 2 if options.quick else SECONDS)
                    if turn:
                        figures[case].rates.append(rate)
                        figures[case].costs.append(cost)
                        shares.append(share)
    results.tables = [table for version in found for table in build_tables(stacks, version, found[version])]
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
    """Measure each kind of frontend once, one visit at a time; return the number of offers without resumption."""
    clients = {stack.name: Client("localhost", version, stack.request) for stack in pairs.stacks}
    sessions, lost = {}, 0
    for name, kind in shuffled(pairs.by_kind):
        visits = negotiate(clients[name], pairs.by_kind[name, kind][0].endpoint, VISITS)
        sessions[name, kind] = [visit.session for visit in visits]
        note(figures[name, (kind, False)], [visit.response_seconds for visit in visits])
    time.sleep(PUTS_ARRIVE)
    for name, kind in shuffled(pairs.by_kind):
        visits = offer_sessions(clients[name], pairs.by_kind[name, kind][-1].endpoint, sessions[name, kind])
        resumed = [visit.response_seconds for visit in visits if visit.resumed]
        assert resumed, f"{name}, {kind}: nothing was resumed"
        lost += len(visits) - len(resumed)
        note(figures[name, (kind, True)], resumed)
    return lost


def note(figures: Figures, seconds: list[float]) -> None:
    """Add the seconds of one turn."""
    figures.medians.append(statistics.median(seconds) * 1e3)
    figures.seconds += seconds


def measure_load(
    pairs: FrontendsByKind, case: Case, version: str, seconds: float, share: float | None = None
) -> tuple[float, float, float]:
    """Load frontends; return connections per second, CPU milliseconds per connection, and the client's CPU share."""
    name, (kind, resumed) = case
    servers = pairs.by_kind[name, kind]
    request = next(stack.request for stack in pairs.stacks if stack.name == name)
    endpoints = tuple(server.endpoint for server in servers)
    plan = Plan(
        endpoints,
        "localhost",
        version,
        request,
        share=float(resumed) if share is None else share,
        clients=CLIENTS_UNDER_LOAD,
        seconds=seconds,
    )

    def processor_seconds() -> float:
        return sum(server.processor_seconds() for server in servers)

    before: list[float] = []
    tally = LoadGenerator(plan).run(lambda: before.append(processor_seconds()))
    assert not tally.failures, tally.failures
    connections = sum(map(len, tally.times.values()))
    return (
        connections / tally.wall,
        (processor_seconds() - before[0]) / max(1, connections) * 1e3,
        tally.cpu / tally.wall,
    )


def judge(results: Results, found: Mapping[str, Mapping[Case, Figures]]) -> None:
    """Compare the figures with the target."""
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


def build_tables(
    stacks: list[Stack], version: str, figures: Mapping[Case, Figures]
) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield the tables of one version of TLS: title, headings, rows."""
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
