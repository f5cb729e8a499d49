"""The LMDB engine with a million sessions: `python benchmarks/engine_scale.py`.

Sessions resemble those of a fleet: keys of 32 random bytes, sealed values of about 230 bytes. One run measures both
sides of a ratio in turns; a figure is the median of the turns, with the range.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.measuring import p99, spread
from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from resumed_server.storage.engine import Get, Put
from resumed_server.storage.expiry import Sweeper
from resumed_server.storage.lmdb.engine import LmdbEngine
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Callable

FEW = 1_000
VALUE_BYTES = 230
KEY_BYTES = 32
BATCH = 100
BURST = 16
CAPACITY = 4 << 30
SOON, LATE = 3_600.0, 86_400.0
TARGETS = {"get": 1.3, "overhead": 400.0, "sweep": 3.0, "open": 1.0}


class Clock:
    """A clock that is `ahead` seconds ahead of the system's."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        """Return the clock's Unix time."""
        return time.time() + self.ahead


class FilledEngine:
    """An engine with `count` sessions, `soon` of which expire at the same time; `keys` are those of the others."""

    def __init__(
        self, directory: Path, count: int, progress: Progress, *, soon: int = 0, value: int = VALUE_BYTES
    ) -> None:
        self.clock = Clock()
        self.directory, self.count, self.value = directory, count, value
        self.open()
        self.keys: list[bytes] = []
        task = progress.add_task(f"storing {count:,} sessions", total=count)
        early = set(random.sample(range(count), soon))
        for start in range(0, count, BATCH):
            puts = []
            for number in range(start, min(start + BATCH, count)):
                key = os.urandom(KEY_BYTES)
                if number not in early:
                    self.keys.append(key)
                puts.append(Put("shop", key, os.urandom(value), SOON if number in early else LATE + number / 100))
            self.engine.batch(puts)
            progress.advance(task, len(puts))

    def open(self) -> None:
        """Open the engine, for the first time or after it was closed."""
        self.engine = LmdbEngine(self.directory, capacity=CAPACITY, clock=self.clock)

    def overhead(self) -> float:
        """Return the bytes on disk per session, beyond its key and value."""
        used = (self.directory / "data.mdb").stat().st_blocks * 512
        return used / self.count - KEY_BYTES - self.value

    def look_up(self, count: int) -> list[float]:
        """Return the duration of each of `count` look-ups in microseconds."""
        # Copies: the key of a call is in the processor's cache, but one of a million keys in a list is not.
        sample = [bytes(bytearray(key)) for key in random.choices(self.keys, k=count)]
        return [measure_microseconds(self.engine.get, "shop", key) for key in sample]

    def look_up_in_bursts(self, seconds: float) -> list[float]:
        """Return the microseconds of each look-up, in bursts with pauses, as calls arrive at a server."""
        end, durations = time.monotonic() + seconds, []
        while time.monotonic() < end:
            durations += self.look_up(BURST)
            time.sleep(random.uniform(0.0002, 0.002))
        return durations


def measure_microseconds(call: Callable[..., object], *arguments: object) -> float:
    """Return the duration of `call` in microseconds."""
    started = time.perf_counter()
    call(*arguments)
    return (time.perf_counter() - started) * 1e6


class Report:
    """A table of figures, and the number of missed targets."""

    def __init__(self) -> None:
        self.table = Table("", "measured", "target", title="The LMDB engine")
        self.missed = 0

    def add(self, name: str, figure: str, value: float | None = None, target: float | None = None) -> None:
        """Add a figure; it misses the target if `value` is above `target`."""
        missed = value is not None and target is not None and value > target
        self.missed += missed
        self.table.add_row(
            name, figure, "" if target is None else f"{'[red]missed' if missed else 'within'} {target:g}"
        )


def measure_get(report: Report, few: FilledEngine, many: FilledEngine, turns: int) -> None:
    """Look up among few and among many sessions, in turns."""
    medians: tuple[list[float], list[float]] = ([], [])
    for database in (few, many):
        database.look_up(20_000)  # the page cache warms up
    for _ in range(turns):
        for database, column in zip((few, many), medians, strict=True):
            column.append(statistics.median(database.look_up(20_000)))
    ratios = [slow / fast for fast, slow in zip(*medians, strict=True)]
    for database, column in zip((few, many), medians, strict=True):
        report.add(f"get p50, {database.count:,} sessions", spread(column, unit=" us"))
    report.add("get p50, ratio", spread(ratios), statistics.median(ratios), TARGETS["get"])


def measure_wire(report: Report, few: FilledEngine, many: FilledEngine, turns: int) -> None:
    """Look up through two running servers, in turns: the ratio that a frontend observes."""
    medians: tuple[list[float], list[float]] = ([], [])
    with contextlib.ExitStack() as exit_stack:
        gets = []
        for database in (few, many):
            database.engine.close()
            store = ("--storage", f"lmdb://{database.directory}", "--capacity", f"{CAPACITY >> 20}MiB")
            server = exit_stack.enter_context(running_server(*store))
            gets.append(SessionStoreServiceStub(exit_stack.enter_context(grpc.insecure_channel(server.target))).Get)
        for turn in range(turns + 1):
            for database, get, column in zip((few, many), gets, medians, strict=True):
                requests = [pb.GetRequest(namespace="shop", key=key) for key in random.choices(database.keys, k=2_000)]
                durations = [measure_microseconds(get, request) for request in requests]
                if turn:  # the first one warms up
                    column.append(statistics.median(durations))
                assert get(requests[0]).HasField("session")
    for database, column in zip((few, many), medians, strict=True):
        database.open()
        report.add(f"Get p50 over the wire, {database.count:,} sessions", spread(column, unit=" us"))
    ratios = [slow / fast for fast, slow in zip(*medians, strict=True)]
    report.add("Get p50 over the wire, ratio", spread(ratios), statistics.median(ratios), TARGETS["get"])


def measure_operations(report: Report, many: FilledEngine, turns: int) -> None:
    """Time every operation on many sessions."""
    engine, value = many.engine, os.urandom(VALUE_BYTES)
    durations: dict[str, list[float]] = {"put": [], "take": [], "remove": [], "put x100": [], "get x100": []}
    for _ in range(turns * 200):
        key, other = os.urandom(KEY_BYTES), os.urandom(KEY_BYTES)
        durations["put"].append(measure_microseconds(engine.put, "shop", key, value, LATE))
        engine.put("shop", other, value, LATE)
        durations["take"].append(measure_microseconds(engine.take, "shop", key))
        durations["remove"].append(measure_microseconds(engine.remove, "shop", other))
    for _ in range(turns * 10):
        puts = [Put("shop", os.urandom(KEY_BYTES), value, LATE) for _ in range(100)]
        gets = [Get("shop", key) for key in random.choices(many.keys, k=100)]
        durations["put x100"].append(measure_microseconds(engine.batch, puts))
        durations["get x100"].append(measure_microseconds(engine.batch, gets))
    for name, figures in durations.items():
        report.add(f"{name}, median and p99", f"{statistics.median(figures):,.1f} us, {p99(figures):,.1f} us")


def measure_open(report: Report, many: FilledEngine, turns: int) -> None:
    """Close and open a database of many sessions, as a restart does."""
    durations = []
    for _ in range(turns):
        many.engine.close()
        started = time.perf_counter()
        many.open()
        many.look_up(1)
        durations.append(time.perf_counter() - started)
    report.add(f"open with {many.count:,} sessions", spread(durations, unit=" s"), max(durations), TARGETS["open"])


def measure_sweep(report: Report, many: FilledEngine, turns: int, seconds: float) -> None:
    """Advance the clock until half of the sessions expire, and look up the others with and without the sweeper."""
    many.clock.ahead = SOON
    quiet, sweeping, deleted = [], [], 0
    sweep = many.engine.sweep

    def count_swept(limit: int) -> int:
        nonlocal deleted
        deleted += (number := sweep(limit))
        return number

    many.engine.sweep = count_swept  # type: ignore[method-assign]
    for _ in range(turns):
        quiet.append(p99(many.look_up_in_bursts(seconds)))
        sweeper = Sweeper(many.engine)
        sweeper.start()
        sweeping.append(p99(many.look_up_in_bursts(seconds)))
        sweeper.stop()
    ratios = [busy / calm for calm, busy in zip(quiet, sweeping, strict=True)]
    report.add("look-up p99, quiet", spread(quiet, unit=" us"))
    report.add("look-up p99, sweeping", spread(sweeping, unit=" us"))
    report.add("look-up p99, ratio", spread(ratios), statistics.median(ratios), TARGETS["sweep"])
    report.add("swept during look-ups", f"{deleted / turns / seconds:,.0f} entries/s")


def main() -> int:
    """Measure, print, and return 0 if no target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=1_000_000, help="number of sessions of the large database")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="duration of the look-ups in each turn, with and without a sweep"
    )
    parser.add_argument("--directory", type=Path, help="directory of the databases (default: the temporary directory)")
    options = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(dir=options.directory) as place, Progress(transient=True) as progress:
        few = FilledEngine(Path(place) / "few", FEW, progress)
        many = FilledEngine(Path(place) / "many", options.sessions, progress, soon=options.sessions // 2)
        large = FilledEngine(Path(place) / "large", max(options.sessions // 20, 1), progress, value=1_000)
        for database, target in ((many, TARGETS["overhead"]), (large, None)):
            name = f"bytes over key and value, {database.count:,} of {database.value}"
            report.add(name, f"{database.overhead():,.0f}", database.overhead(), target)
        measure_get(report, few, many, options.turns)
        measure_wire(report, few, many, options.turns)
        measure_open(report, many, options.turns)
        measure_sweep(report, many, options.turns, options.seconds)
        measure_operations(report, many, options.turns)
        for database in (few, many, large):
            database.engine.close()
    Console().print(report.table)
    return int(report.missed > 0)


if __name__ == "__main__":
    sys.exit(main())
