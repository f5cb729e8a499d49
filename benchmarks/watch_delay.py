"""How late a mirror knows what happened: `python benchmarks/watch_delay.py`.

Sessions are stored at a steady rate, in Batches as frontends send them, and some are removed again, through one server;
after that the namespace is purged some times. Mirrors in processes of their own follow, through every server of the
store. The delay of a change begins when its call does, and ends when the last mirror has it: of a purge, when the last
one has forgotten what it had. Stores take turns in one run.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

import resumed
from resumed._policy.mirror import Mirror, SessionCache
from support.redis import valkey_cluster, valkey_server
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence, Sized
    from contextlib import AbstractContextManager
    from multiprocessing.connection import Connection
    from typing import Any

NAMESPACE, VALUE_BYTES, LIFETIME = "shop", 203, 600.0
LIMIT = 1 << 30
WANTED = 0.2
"""Seconds, p99."""
PATIENCE = 30.0
PROCESSES = 2
REMOVED = 10
"""Of so many sessions, one is removed again."""
PURGE_PAUSE = 0.3
"""Seconds between two purges, each of which all mirrors know before the next one."""


class Seen(NamedTuple):
    """When the last mirror knew of each session stored or removed, and how many did; and when of each purge."""

    last: tuple[dict[bytes, float], dict[bytes, float]]
    mirrors: tuple[Counter[bytes], Counter[bytes]]
    purges: list[float]


class TimedSessions(SessionCache):
    """Notes when it is told."""

    def __init__(self) -> None:
        self.purges: list[float] = []
        super().__init__(LIMIT)
        self.times: tuple[dict[bytes, float], dict[bytes, float]] = {}, {}

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        self.purges.append(time.monotonic())

    def put(self, key: bytes, session: Any, since: int | None = None, issued: float = 0.0) -> None:
        """Keep a session."""
        super().put(key, session, since, issued)
        self.times[0][key] = time.monotonic()

    def remove(self, key: bytes) -> None:
        """Forget a session."""
        super().remove(key)
        self.times[1][key] = time.monotonic()


def follow(targets: Sequence[str], control: Connection) -> None:
    """Follow with one mirror for each of `targets` until told to stop; then tell what they saw."""
    mirrors: list[Any] = []
    for target in targets:
        mirror = Mirror(resumed.StoreClient(target, namespace=NAMESPACE))
        mirror.sessions = TimedSessions()
        mirror.get(b"")
        mirrors.append(mirror)
    await_all(mirrors, lambda mirror: mirror.live)
    for mirror in mirrors:
        mirror.sessions.purges.clear()  # it begins empty
    control.send(None)
    puts, removals, purges = control.recv()
    with contextlib.suppress(TimeoutError):  # what is missing then is told by the counts
        await_all(mirrors, lambda mirror: all(map(len_reached, mirror.sessions.times, (puts, removals))))
        await_all(mirrors, lambda mirror: len_reached(mirror.sessions.purges, purges))
    each_purge = zip(*(mirror.sessions.purges for mirror in mirrors), strict=True)
    seen = Seen(({}, {}), (Counter(), Counter()), list(map(max, each_purge)))
    for mirror in mirrors:
        for last, count, times in zip(seen.last, seen.mirrors, mirror.sessions.times, strict=True):
            count.update(times.keys())
            for key, moment in times.items():
                last[key] = max(moment, last.get(key, 0.0))
        mirror.close()
    control.send(seen)


def len_reached(times: Sized, expected: int) -> bool:
    """Return whether so many changes were seen."""
    return len(times) >= expected


def await_all(mirrors: Sequence[Any], condition: Callable[[Any], bool]) -> None:
    """Wait until something is true of all mirrors; raise TimeoutError if it never is."""
    end = time.monotonic() + PATIENCE
    while not all(map(condition, mirrors)):
        if time.monotonic() > end:
            raise TimeoutError("the mirrors did not follow")
        time.sleep(0.02)


def store_and_remove(target: str, rate: int, batch: int, seconds: float) -> tuple[dict[bytes, float], ...]:
    """Store `rate` sessions a second in Batches, remove some; return when the calls that did began, by key."""
    began: tuple[dict[bytes, float], dict[bytes, float]] = {}, {}
    store = resumed.StoreClient(target, namespace=NAMESPACE, deadline=PATIENCE)
    start = time.monotonic()
    doomed: list[bytes] = []
    for number in range(int(rate * seconds / batch)):
        time.sleep(max(0.0, start + number * batch / rate - time.monotonic()))
        keys = [os.urandom(32) for _ in range(batch)]
        operations: list[resumed.Put | resumed.Remove] = [
            resumed.Put(key, os.urandom(VALUE_BYTES), LIFETIME) for key in keys
        ]
        operations += [resumed.Remove(key) for key in doomed]
        began[0].update(dict.fromkeys(keys, time.monotonic()))
        began[1].update(dict.fromkeys(doomed, time.monotonic()))
        assert not any(isinstance(result, Exception) for result in store.batch(operations))
        # Of what was stored a second ago or so, every tenth.
        gone = list(began[0])[-rate : -rate + batch] if len(began[0]) > rate else []
        doomed = gone[: max(1, batch // REMOVED)] if gone else []
    store.close()
    return began


def purge(target: str, count: int) -> list[float]:
    """Purge some times; return when the calls that did began. What was purged is not there any more for look-ups."""
    began = []
    with (
        resumed.Admin(target, deadline=PATIENCE) as admin,
        contextlib.closing(resumed.StoreClient(target, namespace=NAMESPACE, deadline=PATIENCE)) as store,
    ):
        for _ in range(count):
            time.sleep(PURGE_PAUSE * (0.8 + 0.4 * random.random()))  # in no step with how often the log is read
            key = os.urandom(32)
            store.put(key, os.urandom(VALUE_BYTES), LIFETIME)
            began.append(time.monotonic())
            admin.purge(NAMESPACE)
            assert store.get(key) is None
    return began


def measured(targets: Sequence[str], options: argparse.Namespace) -> tuple[list[float], list[float], list[float]]:
    """Return the delays of all sessions stored, of all removed, and of all purges."""
    context = multiprocessing.get_context("spawn")
    where = [targets[number % len(targets)] for number in range(options.watchers)]
    with contextlib.ExitStack() as held:
        controls = []
        for number in range(PROCESSES):
            control, theirs = context.Pipe()
            process = context.Process(target=follow, args=(where[number::PROCESSES], theirs), daemon=True)
            process.start()
            held.callback(process.join, PATIENCE)
            controls.append(control)
        for control in controls:
            control.recv()
        began = store_and_remove(targets[0], options.rate, options.batch, options.seconds)
        purged = purge(targets[0], options.purges)
        for control in controls:
            control.send((*map(len, began), len(purged)))
        seen = [control.recv() for control in controls]
    delays: list[list[float]] = []
    for kind, moments in enumerate(began):
        missing = [key for key in moments if sum(each.mirrors[kind][key] for each in seen) != options.watchers]
        assert not missing, f"{len(missing)} changes did not reach every mirror"
        delays.append([max(each.last[kind][key] for each in seen) - moment for key, moment in moments.items()])
    last = map(max, zip(*(each.purges for each in seen), strict=True))
    return delays[0], delays[1], [moment - began for moment, began in zip(last, purged, strict=True)]


@contextlib.contextmanager
def on_lmdb(workers: int) -> Iterator[list[str]]:
    """One server."""
    with running_server(workers=workers) as server:
        yield [server.target]


@contextlib.contextmanager
def on_redis(running: Callable[[], AbstractContextManager[Any]]) -> Iterator[list[str]]:
    """Two servers on a Redis of their own."""
    with contextlib.ExitStack() as held:
        url = f"{held.enter_context(running()).url}?timeout_ms=5000"
        yield [held.enter_context(running_server("--storage", url)).target for _ in range(2)]


STORES: dict[str, Callable[[], AbstractContextManager[list[str]]]] = {
    "lmdb, 1 worker": partial(on_lmdb, 1),
    "lmdb, 2 workers": partial(on_lmdb, 2),
    "Valkey, 2 servers": partial(on_redis, valkey_server),
    "Valkey cluster, 2 servers": partial(on_redis, valkey_cluster),
}


def shown(rounds: Sequence[float]) -> str:
    """Return the median of the rounds, with the range, in milliseconds."""
    low, middle, high = (each(rounds) * 1e3 for each in (min, statistics.median, max))
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--watchers", type=int, default=50)
    parser.add_argument("--rate", type=int, default=1_000, help="sessions stored a second")
    parser.add_argument("--batch", type=int, default=10, help="sessions in a Batch")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of a round")
    parser.add_argument("--purges", type=int, default=30, help="in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stores", nargs="+", default=list(STORES), choices=STORES, metavar="STORE")
    parser.add_argument("--markdown", action="store_true", help="print the table of results/measurements.md")
    options = parser.parse_args()
    table = Table(
        *("store", "stored, ms p50", "p99", "removed, ms p50", "p99", "purged, ms p50", "p99", "wanted, p99"),
        title=None if options.markdown else f"{options.watchers} mirrors, {options.rate:,} sessions a second",
        box=box.MARKDOWN if options.markdown else box.HEAVY_HEAD,
    )
    figures: dict[str, list[list[float]]] = {name: [[] for _ in range(6)] for name in options.stores}
    for _ in track(range(options.rounds), "rounds", transient=True):
        for name in options.stores:
            with STORES[name]() as targets:
                delays = measured(targets, options)
            for kind, times in enumerate(delays):
                percentiles = statistics.quantiles(times, n=100, method="inclusive")
                figures[name][2 * kind].append(percentiles[49])
                figures[name][2 * kind + 1].append(percentiles[98])
    for name, columns in figures.items():
        table.add_row(name, *map(shown, columns), f"≤ {WANTED * 1e3:.0f}")
    Console(width=None if os.isatty(1) else 140).print(table)


if __name__ == "__main__":
    main()
