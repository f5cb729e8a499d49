"""Apache with each of its session caches, compared with frontends with the shim: two of a kind share sessions.

Clients negotiate at one frontend and resume at the other. Times run from the client's first packet to the end of the
handshake, because the responses of Apache and of the frontends differ.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from benchmarks.bench.apache import list_missing, run_apache, run_memcached
from benchmarks.bench.results import Results, ratios
from benchmarks.bench.rig import CLIENTS, VERSIONS, Frontend, Rig, negotiate, offer_sessions, shuffled
from benchmarks.bench.sources import OPTIONS, PUTS_ARRIVE, VISITS
from benchmarks.measuring import bind_to_cores, spread
from resumed_server.cli.tls_client import Client
from support.redis import redis_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.bench.rig import Options
    from resumed_server.cli.tls_client import Endpoint

MEMCACHE = "Apache, mod_socache_memcache"
OURS = "resumed: ssl, mirror"


class Figures:
    """The figures of one kind of frontend, of all turns, in milliseconds."""

    def __init__(self) -> None:
        self.full: list[float] = []
        self.resumed: list[float] = []
        self.hits = self.offers = 0


def measure(options: Options) -> Results:
    """Measure TLS 1.2 and 1.3, with both kinds of keys."""
    if absent := list_missing():
        return Results(missing=[f"Apache and its caches: {', '.join(absent)} missing; make peers"])
    found: dict[tuple[str, str], dict[str, Figures]] = {}
    with Rig() as rig, contextlib.ExitStack() as exit_stack:
        stores = rig.run_stores()
        with bind_to_cores({CLIENTS}):
            caches = {
                "no cache": "none",
                "mod_socache_shmcb": "shmcb:{directory}/cache(512000)",
                "mod_socache_memcache": f"memcache:{exit_stack.enter_context(run_memcached())}",
                "mod_socache_redis": f"redis:127.0.0.1:{exit_stack.enter_context(redis_server()).port}",
            }
        cases = list(itertools.product(options.keys, VERSIONS))
        for key, version in options.progress.track(cases, description="peers"):
            with run_pairs(rig, stores, caches, key, version) as kinds:
                found[key, version] = take_turns(Client("localhost", version), kinds, options.turns(24))
    return evaluate(found)


@contextlib.contextmanager
def run_pairs(
    rig: Rig, stores: Mapping[str, str], caches: Mapping[str, str], key: str, version: str
) -> Iterator[dict[str, list[Endpoint]]]:
    """Run two frontends of each kind."""
    ours: dict[str, tuple[str, tuple[str, ...]]] = {OURS: (stores["grpcio"], (*OPTIONS, "--mirror"))}
    ours |= {f"resumed: ssl, call, {transport} transport": (target, OPTIONS) for transport, target in stores.items()}
    wanted = [Frontend("ssl", key, target, chosen) for target, chosen in ours.values() for _ in range(2)]
    with rig.run_frontends(wanted) as endpoints, contextlib.ExitStack() as exit_stack:
        kinds = {}
        for name, cache in caches.items():
            kinds[f"Apache, {name}"] = [
                exit_stack.enter_context(
                    rig.run_on_frontends_core(
                        run_apache(
                            rig.directory / f"{cache.split(':')[0]}-{key}-{version}-{number}",
                            rig.certificate(key),
                            version,
                            cache,
                        )
                    )
                )
                for number in range(2)
            ]
        remaining = iter(endpoints)
        yield kinds | {name: [next(remaining), next(remaining)] for name in ours}


def take_turns(client: Client, kinds: Mapping[str, list[Endpoint]], turns: int) -> dict[str, Figures]:
    """Measure all kinds in turns of shuffled order."""
    figures: defaultdict[str, Figures] = defaultdict(Figures)
    for turn in range(turns + 1):
        sessions = {}
        for name in shuffled(kinds):
            visits = negotiate(client, kinds[name][0], VISITS)
            sessions[name] = [visit.session for visit in visits]
            figures[name].full.append(statistics.median(visit.seconds for visit in visits) * 1e3)
        time.sleep(PUTS_ARRIVE)
        for name in shuffled(kinds):
            visits = offer_sessions(client, kinds[name][1], sessions[name])
            seconds = [visit.seconds for visit in visits if visit.resumed]
            figures[name].hits += len(seconds)
            figures[name].offers += len(visits)
            if seconds:
                figures[name].resumed.append(statistics.median(seconds) * 1e3)
        if not turn:
            figures.clear()
    return {name: figures[name] for name in kinds}


def evaluate(found: Mapping[tuple[str, str], Mapping[str, Figures]]) -> Results:
    """Compare the figures with the target."""
    results = Results()
    cases = {
        f"{key}, TLS {version}": ratios(kinds[OURS].resumed, kinds[MEMCACHE].resumed)
        for (key, version), kinds in found.items()
        if version == "1.2" and len(kinds[MEMCACHE].resumed) == len(kinds[OURS].resumed)
    }
    results.judge("resumed via mirror ÷ Apache with mod_socache_memcache resumed, p50, TLS 1.2", "≤", 1.0, cases)
    for (key, version), kinds in found.items():
        rows = [
            [name, f"{each.hits / each.offers:.1%}", spread(each.full), spread(each.resumed)]
            for name, each in kinds.items()
        ]
        title = f"TLS {version}, {key}: resumed at the other one of two, and milliseconds at p50"
        results.tables.append((title, ["frontends", "resumed", "full", "resumed, ms"], rows))
        results.figures[f"TLS {version}, {key}"] = {
            name: [statistics.median(each.full), statistics.median(each.resumed) if each.resumed else None]
            for name, each in kinds.items()
        }
    return results
