"""Handshakes of frontends that share tickets of the fleet, beside those with the stack's own tickets, and without.

As in production, no process is bound to a core, and clients return at once or after a pause. Turns have a
shuffled order. Each consists of a few full handshakes at one frontend and as many resumptions at the other one, or at
the same one with the stack's own tickets.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.bench.frontends import FrontendsByKind, measure_load
from benchmarks.bench.programs import BARE, STACKS, TICKETS, Environment
from benchmarks.bench.results import Results, ratios
from benchmarks.bench.rig import CORES, VERSIONS, Rig, negotiate, offer_sessions, shuffled
from benchmarks.measuring import spread
from resumed_server.cli.tls_client import Client
from support.server import running_server
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.bench.programs import Server, Stack
    from benchmarks.bench.rig import Options

VISITS = 20
IDLE_VISITS = 4
IDLE_SECONDS = 0.15
SECONDS = 1.0
"""Duration of a turn under load."""
RETURNING = 0.9
"""The share of clients that return, under load."""
COLUMNS = ("full, without", "full, tickets", "resumed, own ticket", "resumed, tickets")


class Case(NamedTuple):
    """A case of a measurement."""

    stack: str
    version: str
    key: str
    idle: bool

    def __str__(self) -> str:
        return f"{self.stack}, TLS {self.version}, {self.key}{', after 150 ms' if self.idle else ''}"


Figures = defaultdict[str, list[float]]
"""The median of each turn in milliseconds, by column."""


@contextlib.contextmanager
def run_frontends(stacks: list[Stack], environment: Environment) -> Iterator[FrontendsByKind]:
    """Run the frontends, and wait until tickets of the fleet resume in TLS 1.2 and 1.3."""
    frontends = FrontendsByKind(stacks)
    with contextlib.ExitStack() as exit_stack:
        for stack in stacks:
            for kind in (BARE, TICKETS, TICKETS):
                server = exit_stack.enter_context(stack.run(kind, environment))
                frontends.by_kind.setdefault((stack.name, kind), []).append(server)
        for stack in stacks:
            for version in VERSIONS:
                client = Client("localhost", version, stack.request)
                for server in frontends.by_kind[stack.name, TICKETS]:
                    until(lambda: client.visit(server.endpoint, client.visit(server.endpoint).session).resumed)  # noqa: B023
        yield frontends


def measure(options: Options) -> Results:
    """Measure all stacks that have tickets of the fleet."""
    results, lost = Results(), 0
    figures: dict[Case, Figures] = {}
    rates: dict[tuple[str, str, str], list[float]] = {}
    stacks = []
    for stack in STACKS:
        if absent := stack.find_obstacle():
            results.missing.append(f"{stack.name}: {absent} (make bench-frontends)")
        elif TICKETS in stack.kinds:
            stacks.append(stack)
    previous_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    try:
        for key in options.keys:
            with Rig() as rig, running_server() as store:
                environment = Environment(rig.certificate(key), rig.keyring(key), rig.directory, store.target, "")
                with run_frontends(stacks, environment) as frontends:
                    turns = options.turns(18) + 1
                    for turn in options.progress.track(range(turns), description=f"tickets, {key}"):
                        lost += take_turn(frontends, key, figures)
                        if not turn:
                            figures = {case: each for case, each in figures.items() if case.key != key}
                    if key == options.keys[0]:
                        turns = options.turns(6) + 1
                        for turn in options.progress.track(range(turns), description=f"tickets, {key}, load"):
                            take_turn_under_load(frontends, rates if turn else {})
    finally:
        os.sched_setaffinity(0, previous_cores)
    judge(results, figures, rates)
    results.facts = {"full handshakes where a session was offered": lost}
    return results


def take_turn(frontends: FrontendsByKind, key: str, figures: dict[Case, Figures]) -> int:
    """Measure each kind once, one visit at a time; return the number of tickets that did not resume."""
    lost = 0
    for stack in shuffled(frontends.stacks):
        for version in shuffled(VERSIONS):
            client = Client("localhost", version, stack.request)
            for idle in shuffled((False, True)):
                found = figures.setdefault(Case(stack.name, version, key, idle), Figures(list))
                for kind, names in shuffled([(BARE, COLUMNS[::2]), (TICKETS, COLUMNS[1::2])]):
                    servers = frontends.by_kind[stack.name, kind]
                    lost += measure_visits(client, servers, names, found, idle=idle)
    return lost


def measure_visits(client: Client, servers: list[Server], names: tuple[str, str], found: Figures, *, idle: bool) -> int:
    """Negotiate at the first server, and resume at the last; return the number of tickets that did not resume."""
    full, resumed = names
    if not idle:
        visits = negotiate(client, servers[0].endpoint, VISITS)
        found[full].append(statistics.median(each.response_seconds for each in visits) * 1e3)
        returning = offer_sessions(client, servers[-1].endpoint, [each.session for each in visits])
    else:
        visits, returning = [], []
        for _ in range(IDLE_VISITS):
            time.sleep(IDLE_SECONDS)
            visits.append(client.visit(servers[0].endpoint))
            time.sleep(IDLE_SECONDS)
            returning.append(client.visit(servers[-1].endpoint, visits[-1].session))
        found[full].append(statistics.median(each.response_seconds for each in visits) * 1e3)
    answered = [each.response_seconds for each in returning if each.resumed]
    found[resumed].append(statistics.median(answered) * 1e3)
    return len(returning) - len(answered)


def take_turn_under_load(frontends: FrontendsByKind, rates: dict[tuple[str, str, str], list[float]]) -> None:
    """Load each kind for a while, and record the connections per second."""
    for version in VERSIONS:
        for name, kind in shuffled(frontends.by_kind):
            rate, _, _ = measure_load(frontends, (name, (kind, True)), version, SECONDS, share=RETURNING)
            rates.setdefault((name, version, kind), []).append(rate)


def judge(results: Results, figures: Mapping[Case, Figures], rates: Mapping[tuple[str, str, str], list[float]]) -> None:
    """Compare the figures with the targets."""
    full, full_tickets, own, tickets = COLUMNS
    python = ("ssl", "pyOpenSSL")

    def over(one: str, other: str, *, of_python: bool, version: str = "", key: str = "") -> dict[str, list[float]]:
        return {
            str(case): ratios(found[one], found[other])
            for case, found in figures.items()
            if (case.stack in python) is of_python and version in {"", case.version} and key in {"", case.key}
        }

    def compare(
        what: str, limit: float, one: str, other: str, *, of_python: bool, version: str = "", key: str = ""
    ) -> None:
        results.judge(what, "≤", limit, over(one, other, of_python=of_python, version=version, key=key))

    for version, limit in (("1.2", 0.35), ("1.3", 0.70)):
        what = f"resumed by tickets ÷ full without, p50, Python, TLS {version}, P-256"
        compare(what, limit, tickets, full, of_python=True, version=version, key="P-256")
    for version, limit in (("1.2", 1.4), ("1.3", 1.2)):
        compare(
            f"resumed by tickets ÷ own ticket, p50, Python, TLS {version}",
            limit,
            tickets,
            own,
            of_python=True,
            version=version,
        )
    compare("resumed by tickets ÷ own ticket, p50, other stacks", 1.05, tickets, own, of_python=False)
    compare("full with tickets ÷ full without, p50, Python", 1.08, full_tickets, full, of_python=True)
    compare("full with tickets ÷ full without, p50, other stacks", 1.03, full_tickets, full, of_python=False)
    served = {
        f"{name}, TLS {version}": ratios(turns, rates[name, version, BARE])
        for (name, version, kind), turns in rates.items()
        if kind == TICKETS
    }
    what = "connections/s of two frontends with tickets ÷ one with its own, nine of ten clients return"
    results.judge(what, "≥", 0.9, served)
    headings = ["stack", "TLS", "key", "pause", *COLUMNS, "tickets ÷ full", "tickets ÷ own ticket", "full ÷ full"]
    rows = [
        [
            *(case.stack, case.version, case.key, "150 ms" if case.idle else "none"),
            *(spread(found[column]) for column in COLUMNS),
            *(
                spread(ratios(found[one], found[other]))
                for one, other in ((tickets, full), (tickets, own), (full_tickets, full))
            ),
        ]
        for case, found in figures.items()
    ]
    results.tables.append(("Milliseconds at p50: the median of the turns, and their range", headings, rows))
    rows = [
        [
            name,
            version,
            *(spread(rates[name, version, kind], 0) for kind in (BARE, TICKETS)),
            spread(served[f"{name}, TLS {version}"]),
        ]
        for (name, version, kind) in rates
        if kind == TICKETS
    ]
    headings = ["stack", "TLS", "one frontend, own tickets", "two frontends, tickets of the fleet", "ratio"]
    results.tables.append(("Connections a second, nine of ten clients return", headings, rows))
    results.figures = {
        str(case): {column: statistics.median(found[column]) for column in COLUMNS} for case, found in figures.items()
    }
