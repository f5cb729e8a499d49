"""Share of connections that resume, by lifetime, capacity, routing and regions: `python benchmarks/simulate_hits.py`.

One machine cannot measure this, so the script simulates it. It generates connections once, from stated assumptions (see
`generate_connections`), and replays them with every policy, so that only the policies differ. A client offers the
session of its last connection and keeps it if the connection resumes; a session's lifetime begins at its negotiation,
as in `resumed`.
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
LIFETIMES = {
    "5 min": 5 * MINUTE,
    "30 min": 30 * MINUTE,
    "1 h": HOUR,
    "2 h": 2 * HOUR,
    "6 h": 6 * HOUR,
    "12 h": 12 * HOUR,
    "24 h": DAY,
    "7 d": 7 * DAY,
}
DEFAULT_LIFETIME, WARM_UP = 2 * HOUR, 2 * DAY

# A client returns either soon, for further pages or because an app wakes up, or later: the same evening, on the next
# day, a week later.
SOON_SHARE, SOON_MEDIAN, SOON_SIGMA = 0.7, 4 * MINUTE, 1.5
LATER_MEDIAN, LATER_SIGMA = DAY, 1.2

# Bytes as memory.py measures them; processor time as engines.py measures it with one worker and Redis, and a little
# more for the second session of a Batch.
REDIS_SESSION_BYTES = 417
SERVER_MICROSECONDS = {"Get": 500, "Put": 500, "Batch of 2 Puts": 520}
REDIS_MICROSECONDS = {"Get": 35, "Put": 35, "Batch of 2 Puts": 40}
WIRE_BYTES = 500
"""Assumed size of a request and its response, with frames and packet headers."""
BUSY = 0.5
"""The planned utilization of a core or of memory."""
CORES, MEMORY_BYTES = 16, 64 << 30


class Connection(NamedTuple):
    """A new connection of a client."""

    time: float
    client: int


class Rate:
    """The share of connections that resumed, after the warm-up."""

    def __init__(self) -> None:
        self.connections = self.resumed = 0
        self._tls12_seconds = self._tls13_seconds = 0.0  # lifetimes of the stored sessions, of all connections

    def count(self, connection: Connection, resumed: bool, remaining: float = 0) -> None:
        """Count a connection, whose session expires in `remaining` seconds."""
        if connection.time >= WARM_UP:
            self.connections += 1
            self.resumed += resumed
            # TLS 1.2 stores nothing for a resumption, TLS 1.3 one session; a full TLS 1.3 handshake stores two.
            self._tls12_seconds += 0 if resumed else remaining
            self._tls13_seconds += remaining if resumed else 2 * remaining

    def __str__(self) -> str:
        return f"{self.resumed / self.connections:.1%}"

    @property
    def stored_sessions(self) -> tuple[float, float]:
        """Stored sessions per connection per second, with TLS 1.2 and with TLS 1.3 (Little's law)."""
        return self._tls12_seconds / self.connections, self._tls13_seconds / self.connections


def generate_connections(clients: int, days: float, seed: int) -> list[Connection]:
    """Return all connections of `clients` in `days`, in order of time.

    The time until a client returns is a mixture of two lognormal distributions: SOON_SHARE of the returns have the
    median SOON_MEDIAN, the others have LATER_MEDIAN.
    """
    generator = random.Random(seed)

    connections = []
    for client in range(clients):
        # A random start, so that clients do not begin at the same time.
        time = -generator.uniform(0, 2 * DAY)
        while time < days * DAY:
            if time >= 0:
                connections.append(Connection(time, client))
            returns_soon = generator.random() < SOON_SHARE
            median, sigma = (SOON_MEDIAN, SOON_SIGMA) if returns_soon else (LATER_MEDIAN, LATER_SIGMA)
            time += generator.lognormvariate(math.log(median), sigma)

    connections.sort()
    return connections


def replay(trace: Iterable[Connection], lifetime: float, choose_place: Callable[[Connection], int]) -> Rate:
    """Return the share of connections that resume if a session is available only at the place of its negotiation.

    `choose_place` returns the place of a connection; one place for all is a central store without limits.
    """
    rate = Rate()
    sessions_by_client: dict[int, tuple[float, int]] = {}  # by client: time and place of its session's negotiation
    for connection in trace:
        current_place = choose_place(connection)
        negotiated, previous_place = sessions_by_client.get(connection.client, (-math.inf, current_place))
        resumed = connection.time - negotiated < lifetime and current_place == previous_place
        if not resumed:
            negotiated = connection.time
            sessions_by_client[connection.client] = negotiated, current_place
        rate.count(connection, resumed, negotiated + lifetime - connection.time)
    return rate


def replay_limited(trace: Iterable[Connection], lifetime: float, capacity: int, eviction: str) -> tuple[Rate, int]:
    """Return the share of connections that resume from a store of `capacity` sessions, and its largest size.

    `eviction` is the policy of a full store: `expiry` deletes the session that expires first, `lru` the least recently
    used one, `random` any, `refuse` rejects sessions until one expires.
    """
    rate, maximum = Rate(), 0
    generator = random.Random(capacity)
    store: OrderedDict[int, float] = OrderedDict()  # expiry by session, in order of expiry; with `lru`, in order of use
    sessions: dict[int, int] = {}  # by client: its last session
    ends: list[tuple[float, int]] = []  # in order
    expired = 0
    for connection in trace:
        while expired < len(ends) and ends[expired][0] <= connection.time:
            store.pop(ends[expired][1], None)
            expired += 1
        session = sessions.get(connection.client, -1)
        resumed = session in store
        rate.count(connection, resumed)
        if resumed:
            if eviction == "lru":
                store.move_to_end(session)
            continue
        if len(store) >= capacity:
            if eviction == "refuse":
                continue
            victim = next(iter(store)) if eviction != "random" else ends[generator.randrange(expired, len(ends))][1]
            while victim not in store:
                victim = ends[generator.randrange(expired, len(ends))][1]
            del store[victim]
        session = sessions[connection.client] = len(ends)
        ends.append((connection.time + lifetime, session))
        store[session] = connection.time + lifetime
        if connection.time >= WARM_UP:
            maximum = max(maximum, len(store))
    return rate, maximum


def route_randomly(places: int, seed: int) -> Callable[[Connection], int]:
    """Return a balancer that chooses one of `places` at random for every connection."""
    generator = random.Random(seed)
    return lambda _: generator.randrange(places)


def route_by_address(places: int, seed: int, *, moves: float, restarts: float) -> Callable[[Connection], int]:
    """Return a balancer that sends a client to one place, by the client's address.

    Args:
        places: The number of places.
        seed: The seed of the random numbers.
        moves: The share of connections before which a client's address changes (another network, a shared exit).
        restarts: Seconds between two restarts of a place, each of which clears its memory.
    """
    generator = random.Random(seed)
    homes: dict[int, int] = {}

    def choose_place(connection: Connection) -> int:
        if connection.client not in homes or generator.random() < moves:
            homes[connection.client] = generator.randrange(places)
        home = homes[connection.client]
        # A restarted place counts as a new one; places restart in turns, as in a rolling update.
        generation = math.floor(connection.time / restarts + home / places)
        return generation * places + home

    return choose_place


def route_roaming_clients(share: float, seed: int) -> Callable[[Connection], int]:
    """Return a balancer for two regions: a `share` of the clients roams, the others have a fixed region."""
    generator = random.Random(seed)
    roaming_clients: dict[int, bool] = {}

    def choose_place(connection: Connection) -> int:
        if roaming_clients.setdefault(connection.client, generator.random() < share):
            return generator.randrange(2)
        return connection.client % 2

    return choose_place


def tabulate_returns(trace: Sequence[Connection]) -> Table:
    """Return the distribution of the clients' pauses, as assumed."""
    last: dict[int, float] = {}
    pauses: list[float] = []
    for connection in trace:
        if connection.client in last:
            pauses.append(connection.time - last[connection.client])
        last[connection.client] = connection.time
    pauses.sort()
    table = Table("within", *LIFETIMES, title="Assumed: clients that return")
    table.add_row("", *(f"{bisect.bisect(pauses, lifetime) / len(pauses):.0%}" for lifetime in LIFETIMES.values()))
    return table


def tabulate_lifetimes(trace: Sequence[Connection]) -> Table:
    """Return hit rates of a central store by the lifetime of sessions, and the number of stored sessions."""
    table = Table(
        *("life", "resumed", "TLS 1.2 sessions held", "TLS 1.3 sessions held"),
        title="Life (one central store; held for each visit a second)",
    )
    for name, lifetime in LIFETIMES.items():
        rate = replay(trace, lifetime, lambda _: 0)
        table.add_row(name, str(rate), *(f"{count:,.0f}" for count in rate.stored_sessions))
    return table


def tabulate_capacities(trace: Sequence[Connection], lifetime: float, lifetime_name: str) -> Table:
    """Return hit rates of a central store that is too small, by its eviction policy."""
    evictions = {
        "expiry": "drops the soonest to expire",
        "lru": "drops the longest unused",
        "random": "drops any",
        "refuse": "refuses Puts",
    }
    table = Table(
        "capacity", *evictions.values(), title=f"Capacity, life {lifetime_name}, as a share of what would be held"
    )
    maximum = replay_limited(trace, lifetime, len(trace), "expiry")[1]
    for share in (0.05, 0.1, 0.25, 0.5, 0.75, 1.0):
        rates = [
            str(replay_limited(trace, lifetime, max(1, int(maximum * share)), eviction)[0]) for eviction in evictions
        ]
        table.add_row(f"{share:.0%}", *rates)
    return table


def tabulate_routing(trace: Sequence[Connection], lifetime: float, lifetime_name: str, seed: int) -> Table:
    """Return hit rates of frontends without sharing, and of a central store."""
    table = Table(
        *("frontends", "own caches, random", "own, sticky", "own, sticky, 10 % of visits from a new address"),
        *("the same, each restarted daily", "central store"),
        title=f"Routing, life {lifetime_name}",
    )
    for places in (1, 2, 4, 16, 64):
        balancers = (
            route_randomly(places, seed),
            route_by_address(places, seed, moves=0, restarts=math.inf),
            route_by_address(places, seed, moves=0.1, restarts=math.inf),
            route_by_address(places, seed, moves=0.1, restarts=DAY),
            lambda _: 0,
        )
        table.add_row(str(places), *(str(replay(trace, lifetime, balancer)) for balancer in balancers))
    return table


def tabulate_regions(trace: Sequence[Connection], seed: int) -> Table:
    """Return hit rates of two regions with a store each, by the share of roaming clients."""
    shares = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
    table = Table("clients that roam", *(f"life {name}" for name in ("2 h", "24 h")), title="Two regions, a store each")
    for share in shares:
        rates = [str(replay(trace, LIFETIMES[name], route_roaming_clients(share, seed))) for name in ("2 h", "24 h")]
        table.add_row(f"{share:.0%}", *rates)
    return table


def tabulate_sizes(trace: Sequence[Connection], lifetime: float, lifetime_name: str) -> Table:
    """Return the resources of fleets of three sizes, with one call per message and no Batch across handshakes."""
    rate = replay(trace, lifetime, lambda _: 0)
    resumed = rate.resumed / rate.connections
    # TLS 1.2 stores one session after a full handshake; TLS 1.3 two, in a Batch, and one after a resumption.
    calls = {
        "TLS 1.2": {"Get": resumed, "Put": 1 - resumed},
        "TLS 1.3": {"Get": resumed, "Put": resumed, "Batch of 2 Puts": 1 - resumed},
    }
    table = Table(
        *("handshakes/s", "version", "calls/s", "sessions/s stored", "sessions held", "MB/s", "Redis memory"),
        *("server cores", "Redis cores", "server machines", "Redis primaries"),
        title=f"Sizes, life {lifetime_name}, {resumed:.1%} resumed",
    )
    for handshakes, (version, made) in itertools.product((1_000, 100_000, 10_000_000), calls.items()):
        per_second = handshakes * sum(made.values())
        stored = handshakes * (made["Put"] + 2 * made.get("Batch of 2 Puts", 0))
        stored_sessions = handshakes * rate.stored_sessions[version == "TLS 1.3"]
        memory = stored_sessions * REDIS_SESSION_BYTES
        server, redis = (
            handshakes * sum(of[call] * each for call, each in made.items()) / 1e6
            for of in (SERVER_MICROSECONDS, REDIS_MICROSECONDS)
        )
        primaries = max(memory / MEMORY_BYTES, redis) / BUSY
        table.add_row(
            *(f"{handshakes:,}", version, f"{per_second:,.0f}", f"{stored:,.0f}", f"{stored_sessions / 1e6:,.1f} M"),
            *(f"{per_second * WIRE_BYTES / 1e6:,.1f}", f"{memory / 1e9:,.1f} GB", f"{server:,.1f}", f"{redis:,.2f}"),
            *(f"{math.ceil(server / BUSY / CORES):,}", f"{math.ceil(primaries):,}"),
        )
    return table


def generate_tables(options: argparse.Namespace) -> Iterator[Table]:
    """Generate the connections and yield the tables."""
    trace = generate_connections(options.clients, options.days, options.seed)
    yield tabulate_returns(trace)
    yield tabulate_lifetimes(trace)
    yield tabulate_capacities(trace, DAY, "24 h")
    yield tabulate_routing(trace, DEFAULT_LIFETIME, "2 h", options.seed)
    yield tabulate_regions(trace, options.seed)
    yield tabulate_sizes(trace, DEFAULT_LIFETIME, "2 h")


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=20_000)
    parser.add_argument("--days", type=float, default=12.0, help=f"simulated days; the first {WARM_UP / DAY:g} warm up")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown, for docs/scaling.md")
    options = parser.parse_args()
    console = Console(width=None if os.isatty(1) else 180)
    for table in generate_tables(options):
        if options.markdown:
            console.print(f"\n**{table.title}**", markup=False)
            table.box, table.title = box.MARKDOWN, None
        console.print(table)


if __name__ == "__main__":
    main()
