"""Duration of handshakes by the source of the session: none, a dictionary, the mirror, a call.

Turns have a shuffled order. Each consists of a few full handshakes at one frontend and, after the Puts, as many
resumptions at the other. Times run from the client's first packet to the first byte of the frontend's response.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from benchmarks.bench.results import Results, ratios
from benchmarks.bench.rig import REQUEST, TRANSPORTS, VERSIONS, Case, Frontend, Rig, negotiate, offer_sessions, shuffled
from benchmarks.measuring import spread
from resumed_server.cli.tls_client import Client
from support.tls import STACKS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.bench.rig import Options
    from resumed_server.cli.tls_client import Endpoint
    from support.tls import Stack

PUTS_ARRIVE = 0.25
"""Seconds after which a negotiated session is in the store and in every mirror."""
VISITS = 25
"""Number of visits of each kind in each turn."""
OPTIONS = ("--deadline", "1")
"""A long deadline, so that a late response appears in the times and not as a full handshake."""
FIRST = Case("ssl", "P-256", "1.2")

Figures = defaultdict[str, list[float]]
"""The median of each turn in milliseconds, by kind of handshake."""


def frontend_pairs(stores: Mapping[str, str], stack: Stack, key: str) -> dict[str, list[Frontend]]:
    """Return the frontends to measure, two of a kind where they share sessions."""
    return {
        "no shim": [Frontend(stack, key)],
        "dictionary": [Frontend(stack, key, None, ("--dictionary",))],
        "mirror": [Frontend(stack, key, stores["grpcio"], (*OPTIONS, "--mirror"))] * 2,
        **{
            f"call, {transport} transport": [Frontend(stack, key, target, OPTIONS)] * 2
            for transport, target in stores.items()
        },
    }


def measure(options: Options) -> Results:
    """Measure all cases."""
    results, figures, lost = Results(), {}, 0
    with Rig() as rig:
        stores = rig.run_stores()
        for stack, key in options.progress.track(list(itertools.product(STACKS, options.keys)), description="sources"):
            wanted = frontend_pairs(stores, stack, key)
            with rig.run_frontends(list(itertools.chain.from_iterable(wanted.values()))) as endpoints:
                remaining = iter(endpoints)
                kinds = {name: [next(remaining) for _ in pair] for name, pair in wanted.items()}
                for version in VERSIONS:
                    case = Case(stack, key, version)
                    figures[case], missed = take_turns(Client("localhost", version, REQUEST), kinds, options.turns(24))
                    lost += missed
    judge(results, figures)
    results.facts = {"full handshakes where a session was offered": lost}
    return results


def take_turns(client: Client, kinds: Mapping[str, list[Endpoint]], turns: int) -> tuple[Figures, int]:
    """Return the median of each turn by kind of handshake, and the number of offers without resumption."""
    figures, lost = Figures(list), 0
    for turn in range(turns + 1):
        sessions = {}
        for name in shuffled(kinds):
            visits = negotiate(client, kinds[name][0], VISITS)
            sessions[name] = [visit.session for visit in visits]
            figures[f"full, {name}"].append(statistics.median(visit.response_seconds for visit in visits) * 1e3)
        time.sleep(PUTS_ARRIVE)
        for name in shuffled(kinds):
            if name != "no shim":
                visits = offer_sessions(client, kinds[name][-1], sessions[name])
                resumed = [visit.response_seconds for visit in visits if visit.resumed]
                lost += len(visits) - len(resumed)
                assert resumed, f"{name}: nothing was resumed"
                figures[f"resumed, {name}"].append(statistics.median(resumed) * 1e3)
        if not turn:
            figures.clear()
    return figures, lost


def judge(results: Results, figures: Mapping[Case, Figures]) -> None:
    """Compare the figures with the targets."""

    def over(one: str, other: str, wanted: Mapping[Case, Figures] = figures) -> dict[str, list[float]]:
        return {str(case): ratios(found[one], found[other]) for case, found in wanted.items() if one in found}

    full = "full, no shim"
    tls12 = {case: found for case, found in figures.items() if (case.key, case.version) == ("P-256", "1.2")}
    results.judge(
        "resumed via mirror ÷ from a local dictionary, p50", "≤", 1.15, over("resumed, mirror", "resumed, dictionary")
    )
    results.judge("resumed via mirror ÷ full, p50, TLS 1.2, P-256", "≤", 0.35, over("resumed, mirror", full, tls12))
    for transport, limit in (("grpcio", 0.75), ("native", 0.60)):
        what = f"resumed via one call, {transport} transport ÷ full, p50, TLS 1.2, P-256"
        results.judge(what, "≤", limit, over(f"resumed, call, {transport} transport", full, tls12))
    results.judge("full with the shim, Puts in the background ÷ full without", "≤", 1.10, over("full, mirror", full))
    names = ("dictionary", "mirror", *(f"call, {transport} transport" for transport in TRANSPORTS))
    kinds = [full, "full, mirror", *(f"resumed, {name}" for name in names if f"resumed, {name}" in figures[FIRST])]
    headings = ["stack", "TLS", "key", *(kind.replace("full, mirror", "full, shim") for kind in kinds)]
    rows = [
        [case.stack, case.version, case.key, *(spread(found[kind]) for kind in kinds)]
        for case, found in figures.items()
    ]
    results.tables.append(("Milliseconds at p50: the median of the turns, and their range", headings, rows))
    headings = [
        "stack",
        "TLS",
        "key",
        *(f"{kind.removeprefix('resumed, ')} ÷ full" for kind in kinds[2:]),
        "mirror ÷ dictionary",
    ]
    rows = []
    for case, found in figures.items():
        cells = [spread(ratios(found[kind], found[full])) for kind in kinds[2:]]
        own = spread(ratios(found["resumed, mirror"], found["resumed, dictionary"]))
        rows.append([case.stack, case.version, case.key, *cells, own])
    results.tables.append(("Resumed ÷ full without the shim, turn by turn", headings, rows))
    results.figures = {
        str(case): {kind.replace("full, mirror", "full, shim"): statistics.median(found[kind]) for kind in kinds}
        for case, found in figures.items()
    }
