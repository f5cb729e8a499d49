"""How many visits resume, by life, capacity, routing and regions: `python benchmarks/simulate_hits.py`.

What cannot be measured on one machine is simulated. Visits are made up once, from stated assumptions (see `visits`),
and replayed against every policy, so that policies differ and the visitors do not. A client offers the session of its
last visit and keeps it when the visit resumes; a session's life counts from its negotiation, as with `resumed`.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import math
import os
import random
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

MINUTE, HOUR, DAY = 60.0, 3_600.0, 86_400.0
LIVES = {
    "5 min": 5 * MINUTE,
    "30 min": 30 * MINUTE,
    "1 h": HOUR,
    "2 h": 2 * HOUR,
    "6 h": 6 * HOUR,
    "12 h": 12 * HOUR,
    "24 h": DAY,
    "7 d": 7 * DAY,
}
DEFAULT_LIFE, WARM_UP = 2 * HOUR, 2 * DAY

# A client comes back either within what a person calls one visit (new connections for the next pages, an app that wakes
# up), or another time: the same evening, tomorrow, next week.
SOON_SHARE, SOON_MEDIAN, SOON_SIGMA = 0.7, 4 * MINUTE, 1.5
LATER_MEDIAN, LATER_SIGMA = DAY, 1.2

# Bytes are those that memory.py measures; processor time is what engines.py measures with one worker in front of Redis,
# and a little for the second session of a Batch.
REDIS_SESSION_BYTES = 417
SERVER_MICROSECONDS = {"Get": 500, "Put": 500, "Batch of 2 Puts": 520}
REDIS_MICROSECONDS = {"Get": 35, "Put": 35, "Batch of 2 Puts": 40}
WIRE_BYTES = 500
"""Of a call and its answer, with the frames and packets around them; assumed."""
BUSY = 0.5
"""The share of a core or of a memory that is planned to be used."""
CORES, MEMORY_BYTES = 16, 64 << 30


class Visit(NamedTuple):
    """A new connection of a client."""

    time: float
    client: int


class Rate:
    """The share of visits that resumed, once the warm-up is over."""

    def __init__(self) -> None:
        self.visits = self.resumed = 0
        self._tls12_seconds = self._tls13_seconds = 0.0  # that stored sessions live, of all visits

    def count(self, visit: Visit, resumed: bool, left: float = 0) -> None:
        """Count a visit, whose session has `left` seconds to live."""
        if visit.time >= WARM_UP:
            self.visits += 1
            self.resumed += resumed
            # TLS 1.2 stores nothing for a resumption; TLS 1.3 a ticket, and two for a full handshake.
            self._tls12_seconds += 0 if resumed else left
            self._tls13_seconds += left if resumed else 2 * left

    def __str__(self) -> str:
        return f"{self.resumed / self.visits:.1%}"

    @property
    def held(self) -> tuple[float, float]:
        """The sessions that a store holds for each visit a second, of TLS 1.2 and of TLS 1.3 (Little's law)."""
        return self._tls12_seconds / self.visits, self._tls13_seconds / self.visits


def visits(clients: int, days: float, seed: int) -> list[Visit]:
    """Return all visits of `clients` in `days`, in order of time.

    The time until a client returns is a mixture of two lognormal distributions: of SOON_SHARE returns half come within
    SOON_MEDIAN, of the others within LATER_MEDIAN.
    """
    chance = random.Random(seed)
    made = []
    for client in range(clients):
        # Not all at once, and not at the beginning of a visit either.
        time = -chance.uniform(0, 2 * DAY)
        while time < days * DAY:
            if time >= 0:
                made.append(Visit(time, client))
            soon = chance.random() < SOON_SHARE
            median, sigma = (SOON_MEDIAN, SOON_SIGMA) if soon else (LATER_MEDIAN, LATER_SIGMA)
            time += chance.lognormvariate(math.log(median), sigma)
    made.sort()
    return made


def replay(trace: Iterable[Visit], life: float, place: Callable[[Visit], int]) -> Rate:
    """Return how many visits resume if a session is known only at the place where it was negotiated.

    `place` says where a visit arrives; with one place for all, that is a central store without limits.
    """
    rate = Rate()
    held: dict[int, tuple[float, int]] = {}  # by client: when its session was negotiated, and where
    for visit in trace:
        here = place(visit)
        negotiated, there = held.get(visit.client, (-math.inf, here))
        resumed = visit.time - negotiated < life and here == there
        if not resumed:
            negotiated = visit.time
            held[visit.client] = negotiated, here
        rate.count(visit, resumed, negotiated + life - visit.time)
    return rate


def replay_limited(trace: Iterable[Visit], life: float, capacity: int, eviction: str) -> tuple[Rate, int]:
    """Return how many visits resume from one store with room for `capacity` sessions, and the most that it held.

    `eviction` is what a full store does: `expiry` drops the soonest to expire, `lru` the longest unused, `random` any,
    `refuse` stores no more until one expires.
    """
    rate, most = Rate(), 0
    chance = random.Random(capacity)
    store: OrderedDict[int, float] = OrderedDict()  # by session: its end; in order of ends, with `lru` of use
    sessions: dict[int, int] = {}  # by client: its last session
    ends: list[tuple[float, int]] = []  # in order
    swept = 0
    for visit in trace:
        while swept < len(ends) and ends[swept][0] <= visit.time:
            store.pop(ends[swept][1], None)
            swept += 1
        session = sessions.get(visit.client, -1)
        resumed = session in store
        rate.count(visit, resumed)
        if resumed:
            if eviction == "lru":
                store.move_to_end(session)
            continue
        if len(store) >= capacity:
            if eviction == "refuse":
                continue
            victim = next(iter(store)) if eviction != "random" else ends[chance.randrange(swept, len(ends))][1]
            while victim not in store:
                victim = ends[chance.randrange(swept, len(ends))][1]
            del store[victim]
        session = sessions[visit.client] = len(ends)
        ends.append((visit.time + life, session))
        store[session] = visit.time + life
        if visit.time >= WARM_UP:
            most = max(most, len(store))
    return rate, most


def anywhere(places: int, seed: int) -> Callable[[Visit], int]:
    """Return a balancer that picks one of `places` at random for every connection."""
    chance = random.Random(seed)
    return lambda _: chance.randrange(places)


def sticky(places: int, seed: int, *, moves: float, restarts: float) -> Callable[[Visit], int]:
    """Return a balancer that sends a client to one place, by its address.

    Args:
        places: How many there are.
        seed: Of the randomness.
        moves: The share of visits before which a client's address changes (another network, a shared exit).
        restarts: Seconds between two restarts of a place, which loses what is in its memory.
    """
    chance = random.Random(seed)
    homes: dict[int, int] = {}

    def place(visit: Visit) -> int:
        if visit.client not in homes or chance.random() < moves:
            homes[visit.client] = chance.randrange(places)
        home = homes[visit.client]
        # A place that was restarted is another one; they take turns, as in a rolling update.
        generation = math.floor(visit.time / restarts + home / places)
        return generation * places + home

    return place


def roaming(share: float, seed: int) -> Callable[[Visit], int]:
    """Return a choice of two regions: a `share` of clients arrives in either at random, the others in their own."""
    chance = random.Random(seed)
    roams: dict[int, bool] = {}

    def place(visit: Visit) -> int:
        if roams.setdefault(visit.client, chance.random() < share):
            return chance.randrange(2)
        return visit.client % 2

    return place


def by_return(trace: Sequence[Visit]) -> Table:
    """Return what was assumed: how soon clients come back."""
    last: dict[int, float] = {}
    gaps: list[float] = []
    for visit in trace:
        if visit.client in last:
            gaps.append(visit.time - last[visit.client])
        last[visit.client] = visit.time
    gaps.sort()
    table = Table("within", *LIVES, title="Assumed: clients that return")
    table.add_row("", *(f"{bisect.bisect(gaps, life) / len(gaps):.0%}" for life in LIVES.values()))
    return table


def by_life(trace: Sequence[Visit]) -> Table:
    """Return hit rates of a central store by the life of a session, and what it holds."""
    table = Table(
        *("life", "resumed", "TLS 1.2 sessions held", "TLS 1.3 sessions held"),
        title="Life (one central store; held for each visit a second)",
    )
    for name, life in LIVES.items():
        rate = replay(trace, life, lambda _: 0)
        table.add_row(name, str(rate), *(f"{held:,.0f}" for held in rate.held))
    return table


def by_capacity(trace: Sequence[Visit], life: float, shown: str) -> Table:
    """Return hit rates of a central store that is too small, by what it does when it is full."""
    evictions = {
        "expiry": "drops the soonest to expire",
        "lru": "drops the longest unused",
        "random": "drops any",
        "refuse": "refuses Puts",
    }
    table = Table("capacity", *evictions.values(), title=f"Capacity, life {shown}, as a share of what would be held")
    most = replay_limited(trace, life, len(trace), "expiry")[1]
    for share in (0.05, 0.1, 0.25, 0.5, 0.75, 1.0):
        rates = [str(replay_limited(trace, life, max(1, int(most * share)), eviction)[0]) for eviction in evictions]
        table.add_row(f"{share:.0%}", *rates)
    return table


def by_routing(trace: Sequence[Visit], life: float, shown: str, seed: int) -> Table:
    """Return hit rates of frontends that share nothing, beside a central store."""
    table = Table(
        *("frontends", "own caches, random", "own, sticky", "own, sticky, 10 % of visits from a new address"),
        *("the same, each restarted daily", "central store"),
        title=f"Routing, life {shown}",
    )
    for places in (1, 2, 4, 16, 64):
        balancers = (
            anywhere(places, seed),
            sticky(places, seed, moves=0, restarts=math.inf),
            sticky(places, seed, moves=0.1, restarts=math.inf),
            sticky(places, seed, moves=0.1, restarts=DAY),
            lambda _: 0,
        )
        table.add_row(str(places), *(str(replay(trace, life, balancer)) for balancer in balancers))
    return table


def by_regions(trace: Sequence[Visit], seed: int) -> Table:
    """Return hit rates of two regions with a store each, by how many clients roam."""
    shares = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
    table = Table("clients that roam", *(f"life {name}" for name in ("2 h", "24 h")), title="Two regions, a store each")
    for share in shares:
        rates = [str(replay(trace, LIVES[name], roaming(share, seed))) for name in ("2 h", "24 h")]
        table.add_row(f"{share:.0%}", *rates)
    return table


def by_size(trace: Sequence[Visit], life: float, shown: str) -> Table:
    """Return what fleets of three sizes need, with one call for every message and no Batch across handshakes."""
    rate = replay(trace, life, lambda _: 0)
    resumed = rate.resumed / rate.visits
    # TLS 1.2 puts one session after a full handshake; TLS 1.3 two, in a Batch, and one after a resumption.
    calls = {
        "TLS 1.2": {"Get": resumed, "Put": 1 - resumed},
        "TLS 1.3": {"Get": resumed, "Put": resumed, "Batch of 2 Puts": 1 - resumed},
    }
    table = Table(
        *("handshakes/s", "version", "calls/s", "sessions/s stored", "sessions held", "MB/s", "Redis memory"),
        *("server cores", "Redis cores", "server machines", "Redis primaries"),
        title=f"Sizes, life {shown}, {resumed:.1%} resumed",
    )
    for handshakes, (version, made) in itertools.product((1_000, 100_000, 10_000_000), calls.items()):
        per_second = handshakes * sum(made.values())
        stored = handshakes * (made["Put"] + 2 * made.get("Batch of 2 Puts", 0))
        held = handshakes * rate.held[version == "TLS 1.3"]
        memory = held * REDIS_SESSION_BYTES
        server, redis = (
            handshakes * sum(of[call] * each for call, each in made.items()) / 1e6
            for of in (SERVER_MICROSECONDS, REDIS_MICROSECONDS)
        )
        primaries = max(memory / MEMORY_BYTES, redis) / BUSY
        table.add_row(
            *(f"{handshakes:,}", version, f"{per_second:,.0f}", f"{stored:,.0f}", f"{held / 1e6:,.1f} M"),
            *(f"{per_second * WIRE_BYTES / 1e6:,.1f}", f"{memory / 1e9:,.1f} GB", f"{server:,.1f}", f"{redis:,.2f}"),
            *(f"{math.ceil(server / BUSY / CORES):,}", f"{math.ceil(primaries):,}"),
        )
    return table


def tables(options: argparse.Namespace) -> Iterator[Table]:
    """Make up the visits and yield the tables."""
    trace = visits(options.clients, options.days, options.seed)
    yield by_return(trace)
    yield by_life(trace)
    yield by_capacity(trace, DAY, "24 h")
    yield by_routing(trace, DEFAULT_LIFE, "2 h", options.seed)
    yield by_regions(trace, options.seed)
    yield by_size(trace, DEFAULT_LIFE, "2 h")


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=20_000)
    parser.add_argument("--days", type=float, default=12.0, help=f"of which the first {WARM_UP / DAY:g} only warm up")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--markdown", action="store_true", help="print the tables as docs/scaling.md has them")
    options = parser.parse_args()
    console = Console(width=None if os.isatty(1) else 180)
    for table in tables(options):
        if options.markdown:
            console.print(f"\n**{table.title}**", markup=False)
            table.box, table.title = box.MARKDOWN, None
        console.print(table)


if __name__ == "__main__":
    main()
