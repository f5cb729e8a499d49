"""Connections a second of two frontends on one core, behind a balancer that alternates, 90 % of which offer a session.

The clients' share of the other core is noted: near 1 they are the limit, and the ratio is understated.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from typing import TYPE_CHECKING

from benchmarks.bench.results import Results, ratios
from benchmarks.bench.rig import REQUEST, VERSIONS, Case, Frontend, Rig, shuffled
from benchmarks.bench.sources import OPTIONS
from benchmarks.measuring import spread
from resumed_server.cli.bench.load_generator import LoadGenerator, Plan
from support.tls import STACKS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.bench.rig import Options
    from resumed_server.cli.bench.load_generator import Tally
    from resumed_server.cli.tls_client import Endpoint
    from support.tls import Stack

SECONDS = 1.0
"""Duration of a turn; half of it for a quick look."""
SHARE = 0.9
ALONE = "no sharing"
STICKY = "one, with a dictionary"
"""One frontend alone, which resumes its own sessions: the upper bound of any sharing."""


def frontend_pairs(stores: Mapping[str, str], stack: Stack, key: str) -> dict[str, list[Frontend]]:
    """Return the frontends to measure, two of a kind where there is something to share."""
    return {
        ALONE: [Frontend(stack, key)] * 2,
        STICKY: [Frontend(stack, key, None, ("--dictionary",))],
        "mirror": [Frontend(stack, key, stores["grpcio"], (*OPTIONS, "--mirror"))] * 2,
        **{
            f"call, {transport} transport": [Frontend(stack, key, target, OPTIONS)] * 2
            for transport, target in stores.items()
        },
    }


def measure(options: Options) -> Results:
    """Measure all cases."""
    rates: dict[Case, dict[str, list[float]]] = {}
    shares: defaultdict[str, list[float]] = defaultdict(list)
    with Rig() as rig:
        stores = rig.run_stores()
        for stack, key in options.progress.track(
            list(itertools.product(STACKS, options.keys)), description="throughput"
        ):
            wanted = frontend_pairs(stores, stack, key)
            with rig.run_frontends(list(itertools.chain.from_iterable(wanted.values()))) as endpoints:
                remaining = iter(endpoints)
                kinds = {name: [next(remaining) for _ in pair] for name, pair in wanted.items()}
                for version in VERSIONS:
                    found = rates[Case(stack, key, version)] = {name: [] for name in kinds}
                    for turn, name in plan_turns(kinds, options.turns(5)):
                        tally = measure_load(kinds[name], version, SECONDS / 2 if options.quick else SECONDS)
                        if turn:
                            found[name].append(sum(map(len, tally.times.values())) / tally.wall)
                            shares[f"{name}: resumed"].append(len(tally.seconds(resumed=True)) / max(1, tally.offered))
                            shares["client's share of its core"].append(tally.cpu / tally.wall)
    return evaluate(rates, shares)


def plan_turns(kinds: Mapping[str, list[Endpoint]], number: int) -> list[tuple[int, str]]:
    """Return the turns, after one that warms up; each goes through all kinds in random order."""
    return [(turn, name) for turn in range(number + 1) for name in shuffled(kinds)]


def measure_load(endpoints: list[Endpoint], version: str, seconds: float) -> Tally:
    """Load frontends, and return the client's figures."""
    plan = Plan(tuple(endpoints), "localhost", version, REQUEST, share=SHARE, clients=128, seconds=seconds)
    tally = LoadGenerator(plan).run()
    assert not tally.failures, tally.failures
    return tally


def evaluate(rates: Mapping[Case, Mapping[str, list[float]]], shares: Mapping[str, list[float]]) -> Results:
    """Compare the figures with the target."""
    results = Results()
    what = "connections/s of two frontends, 90 % offer a session: {} ÷ no sharing, TLS 1.2, P-256"
    for name in ("mirror", "call, grpcio transport", "call, native transport"):
        tls12 = {
            str(case): ratios(found[name], found[ALONE])
            for case, found in rates.items()
            if name in found and (case.key, case.version) == ("P-256", "1.2")
        }
        if tls12:
            results.judge(what.format(f"store, {name}"), "≥", 1.5, tls12)
    names = list(next(iter(rates.values())))
    rows = [[*case[::2], case.key, *(spread(found[name], 0) for name in names)] for case, found in rates.items()]
    results.tables.append(("Connections a second", ["stack", "TLS", "key", *names], rows))
    rows = [
        [*case[::2], case.key, *(spread(ratios(found[name], found[ALONE])) for name in names[1:])]
        for case, found in rates.items()
    ]
    results.tables.append(("The same ÷ no sharing, turn by turn", ["stack", "TLS", "key", *names[1:]], rows))
    results.figures = {
        str(case): {name: statistics.median(turns) for name, turns in found.items()} for case, found in rates.items()
    }
    results.facts = {name: spread(found) for name, found in shares.items() if name != f"{ALONE}: resumed"}
    return results
