"""Delay until a mirror has a change: `python benchmarks/watch_delay.py`.

The script stores sessions through one server at a steady rate, in Batches as frontends send them, and removes some of
them; then it purges the namespace several times. Mirrors in separate processes watch, through every server of the
store. The delay of a change begins with its call, and ends when the last mirror has the change; that of a purge ends
when the last mirror has deleted its sessions. Stores take turns in one run.
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

from rich.progress import track

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

import resumed
from benchmarks.measuring import build_table, new_console, spread
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
"""The script removes one of this number of sessions."""
PURGE_PAUSE = 0.3
"""Seconds between two purges: long enough for every mirror to receive the first one."""


class Observations(NamedTuple):
    """Times at which the last mirror had each change, numbers of mirrors that had it, and times of purges."""

    last_times: tuple[dict[bytes, float], dict[bytes, float]]
    mirrors: tuple[Counter[bytes], Counter[bytes]]
    purges: list[float]


class TimedSessionCache(SessionCache):
    """Records the time of each change."""

    def __init__(self) -> None:
        self.purges: list[float] = []
        super().__init__(LIMIT)
        self.times: tuple[dict[bytes, float], dict[bytes, float]] = {}, {}

    def clear(self) -> None:
        """Delete all sessions."""
        super().clear()
        self.purges.append(time.monotonic())

    def put(self, key: bytes, session: Any, since: int | None = None, issued: float = 0.0) -> None:
        """Store a session."""
        super().put(key, session, since, issued)
        self.times[0][key] = time.monotonic()

    def remove(self, key: bytes) -> None:
        """Delete a session."""
        super().remove(key)
        self.times[1][key] = time.monotonic()


def run_mirrors(targets: Sequence[str], control: Connection) -> None:
    """Run a mirror for each of `targets`; send their Observations when they have the expected number of changes."""
    mirrors: list[Any] = []
    for target in targets:
        mirror = Mirror(resumed.StoreClient(target, namespace=NAMESPACE))
        mirror.sessions = TimedSessionCache()
        mirror.follow()
        mirrors.append(mirror)
    await_all(mirrors, lambda mirror: mirror.live)
    for mirror in mirrors:
        mirror.sessions.purges.clear()  # a new mirror clears itself once
    control.send(None)
    puts, removals, purges = control.recv()
    with contextlib.suppress(TimeoutError):  # the parent detects missing changes by the counts
        await_all(mirrors, lambda mirror: all(map(has_reached, mirror.sessions.times, (puts, removals))))
        await_all(mirrors, lambda mirror: has_reached(mirror.sessions.purges, purges))
    each_purge = zip(*(mirror.sessions.purges for mirror in mirrors), strict=True)
    observations = Observations(({}, {}), (Counter(), Counter()), list(map(max, each_purge)))
    for mirror in mirrors:
        for last_times, count, times in zip(
            observations.last_times, observations.mirrors, mirror.sessions.times, strict=True
        ):
            count.update(times.keys())
            for key, moment in times.items():
                last_times[key] = max(moment, last_times.get(key, 0.0))
        mirror.close()
    control.send(observations)


def has_reached(times: Sized, expected: int) -> bool:
    """Return whether at least `expected` changes have times."""
    return len(times) >= expected


def await_all(mirrors: Sequence[Any], condition: Callable[[Any], bool]) -> None:
    """Wait until `condition` is true for all mirrors; raise TimeoutError after PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while not all(map(condition, mirrors)):
        if time.monotonic() > end:
            raise TimeoutError("the mirrors did not follow")
        time.sleep(0.02)


def store_and_remove(target: str, rate: int, batch: int, seconds: float) -> tuple[dict[bytes, float], ...]:
    """Store `rate` sessions per second in Batches, and remove some; return the start times of the calls by key."""
    began: tuple[dict[bytes, float], dict[bytes, float]] = {}, {}
    store = resumed.StoreClient(target, namespace=NAMESPACE, deadline=PATIENCE)
    start = time.monotonic()
    keys_to_remove: list[bytes] = []
    for number in range(int(rate * seconds / batch)):
        time.sleep(max(0.0, start + number * batch / rate - time.monotonic()))
        keys = [os.urandom(32) for _ in range(batch)]
        operations: list[resumed.Put | resumed.Remove] = [
            resumed.Put(key, os.urandom(VALUE_BYTES), LIFETIME) for key in keys
        ]
        operations += [resumed.Remove(key) for key in keys_to_remove]
        began[0].update(dict.fromkeys(keys, time.monotonic()))
        began[1].update(dict.fromkeys(keys_to_remove, time.monotonic()))
        assert not any(isinstance(result, Exception) for result in store.batch(operations))
        # Some of the sessions that were stored about a second ago.
        candidates = list(began[0])[-rate : -rate + batch] if len(began[0]) > rate else []
        keys_to_remove = candidates[: max(1, batch // REMOVED)] if candidates else []
    store.close()
    return began


def purge(target: str, count: int) -> list[float]:
    """Purge `count` times, check that look-ups miss afterwards, and return the start times of the calls."""
    began = []
    with (
        resumed.Admin(target, deadline=PATIENCE) as admin,
        contextlib.closing(resumed.StoreClient(target, namespace=NAMESPACE, deadline=PATIENCE)) as store,
    ):
        for _ in range(count):
            time.sleep(
                PURGE_PAUSE * (0.8 + 0.4 * random.random())
            )  # not in step with the interval at which servers read the log
            key = os.urandom(32)
            store.put(key, os.urandom(VALUE_BYTES), LIFETIME)
            began.append(time.monotonic())
            admin.purge(NAMESPACE)
            assert store.get(key) is None
    return began


def measure_delays(targets: Sequence[str], options: argparse.Namespace) -> tuple[list[float], list[float], list[float]]:
    """Return the delays of all stored sessions, of all removed ones, and of all purges, in seconds."""
    context = multiprocessing.get_context("spawn")
    watcher_targets = [targets[number % len(targets)] for number in range(options.watchers)]
    with contextlib.ExitStack() as exit_stack:
        controls = []
        for number in range(PROCESSES):
            control, peer = context.Pipe()
            process = context.Process(target=run_mirrors, args=(watcher_targets[number::PROCESSES], peer), daemon=True)
            process.start()
            exit_stack.callback(process.join, PATIENCE)
            controls.append(control)
        for control in controls:
            control.recv()
        began = store_and_remove(targets[0], options.rate, options.batch, options.seconds)
        purge_times = purge(targets[0], options.purges)
        for control in controls:
            control.send((*map(len, began), len(purge_times)))
        observations = [control.recv() for control in controls]
    delays: list[list[float]] = []
    for kind, moments in enumerate(began):
        missing = [key for key in moments if sum(each.mirrors[kind][key] for each in observations) != options.watchers]
        assert not missing, f"{len(missing)} changes did not reach every mirror"
        delays.append(
            [max(each.last_times[kind][key] for each in observations) - moment for key, moment in moments.items()]
        )
    last_times = map(max, zip(*(each.purges for each in observations), strict=True))
    return delays[0], delays[1], [moment - began for moment, began in zip(last_times, purge_times, strict=True)]


@contextlib.contextmanager
def run_on_lmdb(workers: int) -> Iterator[list[str]]:
    """Run one server on LMDB, and yield its target."""
    with running_server(workers=workers) as server:
        yield [server.target]


@contextlib.contextmanager
def run_on_redis(running: Callable[[], AbstractContextManager[Any]]) -> Iterator[list[str]]:
    """Run two servers on a new Redis, and yield their targets."""
    with contextlib.ExitStack() as exit_stack:
        url = f"{exit_stack.enter_context(running()).url}?timeout_ms=5000"
        yield [exit_stack.enter_context(running_server("--storage", url)).target for _ in range(2)]


STORES: dict[str, Callable[[], AbstractContextManager[list[str]]]] = {
    "lmdb, 1 worker": partial(run_on_lmdb, 1),
    "lmdb, 2 workers": partial(run_on_lmdb, 2),
    "Valkey, 2 servers": partial(run_on_redis, valkey_server),
    "Valkey cluster, 2 servers": partial(run_on_redis, valkey_cluster),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--watchers", type=int, default=50)
    parser.add_argument("--rate", type=int, default=1_000, help="sessions stored a second")
    parser.add_argument("--batch", type=int, default=10, help="sessions in a Batch")
    parser.add_argument("--seconds", type=float, default=15.0, help="duration of a round")
    parser.add_argument("--purges", type=int, default=30, help="number of purges in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stores", nargs="+", default=list(STORES), choices=STORES, metavar="STORE")
    parser.add_argument("--markdown", action="store_true", help="print the table of results/measurements.md")
    options = parser.parse_args()
    table = build_table(
        *("store", "stored, ms p50", "p99", "removed, ms p50", "p99", "purged, ms p50", "p99", "wanted, p99"),
        title=f"{options.watchers} mirrors, {options.rate:,} sessions a second",
        markdown=options.markdown,
    )
    figures: dict[str, list[list[float]]] = {name: [[] for _ in range(6)] for name in options.stores}
    for _ in track(range(options.rounds), "rounds", transient=True):
        for name in options.stores:
            with STORES[name]() as targets:
                delays = measure_delays(targets, options)
            for kind, times in enumerate(delays):
                percentiles = statistics.quantiles(times, n=100, method="inclusive")
                figures[name][2 * kind].append(percentiles[49])
                figures[name][2 * kind + 1].append(percentiles[98])
    for name, columns in figures.items():
        table.add_row(name, *(spread(column, 0, factor=1e3) for column in columns), f"≤ {WANTED * 1e3:.0f}")
    new_console().print(table)


if __name__ == "__main__":
    main()
