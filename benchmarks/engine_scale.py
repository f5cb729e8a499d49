"""The embedded engine with a million sessions: `python benchmarks/engine_scale.py`.

Sessions are as a fleet stores them: keys of 32 random bytes, sealed values of about 230 bytes. Both sides of a ratio
are measured in turns in one run; a figure is the median of the turns, with the range.
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

from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from resumed_server.storage.engine import Get, Put
from resumed_server.storage.expiry import Sweeper
from resumed_server.storage.lmdb.engine import LmdbEngine
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FEW = 1_000
VALUE_BYTES = 230
KEY_BYTES = 32
BATCH = 100
BURST = 16
CAPACITY = 4 << 30
SOON, LATE = 3_600.0, 86_400.0
TARGETS = {"get": 1.3, "overhead": 400.0, "sweep": 3.0, "open": 1.0}


class Clock:
    """The time, which can be put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        """Return the present."""
        return time.time() + self.ahead


class Filled:
    """An engine in `directory` with `count` sessions, of which `keys` live long; the others expire at one moment."""

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
        """Open the engine; for a second time once it was closed."""
        self.engine = LmdbEngine(self.directory, capacity=CAPACITY, clock=self.clock)

    def overhead(self) -> float:
        """Return the bytes on disk for each session, over its key and value."""
        used = (self.directory / "data.mdb").stat().st_blocks * 512
        return used / self.count - KEY_BYTES - self.value

    def look_up(self, count: int) -> list[float]:
        """Return the microseconds that each of `count` look-ups took."""
        # Copies: a key that comes with a call is in the processor's cache, one of a million in a list is not.
        chosen = [bytes(bytearray(key)) for key in random.choices(self.keys, k=count)]
        return [timed(self.engine.get, "shop", key) for key in chosen]

    def look_up_in_bursts(self, seconds: float) -> list[float]:
        """Return the microseconds of each look-up, in bursts with a wait between, as calls come in."""
        until, took = time.monotonic() + seconds, []
        while time.monotonic() < until:
            took += self.look_up(BURST)
            time.sleep(random.uniform(0.0002, 0.002))
        return took


def timed(call: Callable[..., object], *arguments: object) -> float:
    """Return how many microseconds `call` takes."""
    started = time.perf_counter()
    call(*arguments)
    return (time.perf_counter() - started) * 1e6


def p99(figures: Sequence[float]) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(figures, n=100)[98]


def shown(figures: Sequence[float], unit: str = "") -> str:
    """Return the median and the range."""
    return f"{statistics.median(figures):,.2f}{unit} ({min(figures):,.2f} to {max(figures):,.2f})"


class Report:
    """A table of figures, and whether all targets were reached."""

    def __init__(self) -> None:
        self.table = Table("", "measured", "target", title="The embedded engine")
        self.missed = 0

    def add(self, name: str, figure: str, value: float | None = None, target: float | None = None) -> None:
        """Add a figure; `value` must not be above `target`."""
        missed = value is not None and target is not None and value > target
        self.missed += missed
        self.table.add_row(
            name, figure, "" if target is None else f"{'[red]missed' if missed else 'within'} {target:g}"
        )


def measure_get(report: Report, few: Filled, many: Filled, turns: int) -> None:
    """Look up among few and among many sessions, in turns."""
    medians: tuple[list[float], list[float]] = ([], [])
    for filled in (few, many):
        filled.look_up(20_000)  # the page cache warms up
    for _ in range(turns):
        for filled, found in zip((few, many), medians, strict=True):
            found.append(statistics.median(filled.look_up(20_000)))
    ratios = [slow / fast for fast, slow in zip(*medians, strict=True)]
    for filled, found in zip((few, many), medians, strict=True):
        report.add(f"get p50, {filled.count:,} sessions", shown(found, " us"))
    report.add("get p50, ratio", shown(ratios), statistics.median(ratios), TARGETS["get"])


def measure_wire(report: Report, few: Filled, many: Filled, turns: int) -> None:
    """Look up through a running server each, in turns, as frontends do: the same ratio, as anybody meets it."""
    medians: tuple[list[float], list[float]] = ([], [])
    with contextlib.ExitStack() as held:
        gets = []
        for filled in (few, many):
            filled.engine.close()
            store = ("--storage", f"lmdb://{filled.directory}", "--capacity", f"{CAPACITY >> 20}MiB")
            server = held.enter_context(running_server(*store))
            gets.append(SessionStoreServiceStub(held.enter_context(grpc.insecure_channel(server.target))).Get)
        for turn in range(turns + 1):
            for filled, get, found in zip((few, many), gets, medians, strict=True):
                requests = [pb.GetRequest(namespace="shop", key=key) for key in random.choices(filled.keys, k=2_000)]
                took = [timed(get, request) for request in requests]
                if turn:  # the first one warms up
                    found.append(statistics.median(took))
                assert get(requests[0]).HasField("session")
    for filled, found in zip((few, many), medians, strict=True):
        filled.open()
        report.add(f"Get p50 over the wire, {filled.count:,} sessions", shown(found, " us"))
    ratios = [slow / fast for fast, slow in zip(*medians, strict=True)]
    report.add("Get p50 over the wire, ratio", shown(ratios), statistics.median(ratios), TARGETS["get"])


def measure_operations(report: Report, many: Filled, turns: int) -> None:
    """Time every operation on many sessions."""
    engine, value = many.engine, os.urandom(VALUE_BYTES)
    took: dict[str, list[float]] = {"put": [], "take": [], "remove": [], "put x100": [], "get x100": []}
    for _ in range(turns * 200):
        key, other = os.urandom(KEY_BYTES), os.urandom(KEY_BYTES)
        took["put"].append(timed(engine.put, "shop", key, value, LATE))
        engine.put("shop", other, value, LATE)
        took["take"].append(timed(engine.take, "shop", key))
        took["remove"].append(timed(engine.remove, "shop", other))
    for _ in range(turns * 10):
        puts = [Put("shop", os.urandom(KEY_BYTES), value, LATE) for _ in range(100)]
        gets = [Get("shop", key) for key in random.choices(many.keys, k=100)]
        took["put x100"].append(timed(engine.batch, puts))
        took["get x100"].append(timed(engine.batch, gets))
    for name, figures in took.items():
        report.add(f"{name}, median and p99", f"{statistics.median(figures):,.1f} us, {p99(figures):,.1f} us")


def measure_open(report: Report, many: Filled, turns: int) -> None:
    """Close and open a database of many sessions, as a restart does."""
    took = []
    for _ in range(turns):
        many.engine.close()
        started = time.perf_counter()
        many.open()
        many.look_up(1)
        took.append(time.perf_counter() - started)
    report.add(f"open with {many.count:,} sessions", shown(took, " s"), max(took), TARGETS["open"])


def measure_sweep(report: Report, many: Filled, turns: int, seconds: float) -> None:
    """Let half of the sessions expire, and look up the others with and without the sweeper, in turns."""
    many.clock.ahead = SOON
    quiet, sweeping, swept = [], [], 0
    sweep = many.engine.sweep

    def counted(limit: int) -> int:
        nonlocal swept
        swept += (number := sweep(limit))
        return number

    many.engine.sweep = counted  # type: ignore[method-assign]
    for _ in range(turns):
        quiet.append(p99(many.look_up_in_bursts(seconds)))
        sweeper = Sweeper(many.engine)
        sweeper.start()
        sweeping.append(p99(many.look_up_in_bursts(seconds)))
        sweeper.stop()
    ratios = [busy / calm for calm, busy in zip(quiet, sweeping, strict=True)]
    report.add("look-up p99, quiet", shown(quiet, " us"))
    report.add("look-up p99, sweeping", shown(sweeping, " us"))
    report.add("look-up p99, ratio", shown(ratios), statistics.median(ratios), TARGETS["sweep"])
    report.add("swept meanwhile", f"{swept / turns / seconds:,.0f} entries/s")


def main() -> int:
    """Measure, print, and return 0 if all targets are reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=1_000_000, help="how many are many")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of look-ups in each turn with and without a sweep")
    parser.add_argument("--directory", type=Path, help="where to store (default: the temporary directory)")
    options = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(dir=options.directory) as place, Progress(transient=True) as progress:
        few = Filled(Path(place) / "few", FEW, progress)
        many = Filled(Path(place) / "many", options.sessions, progress, soon=options.sessions // 2)
        large = Filled(Path(place) / "large", max(options.sessions // 20, 1), progress, value=1_000)
        for filled, target in ((many, TARGETS["overhead"]), (large, None)):
            name = f"bytes over key and value, {filled.count:,} of {filled.value}"
            report.add(name, f"{filled.overhead():,.0f}", filled.overhead(), target)
        measure_get(report, few, many, options.turns)
        measure_wire(report, few, many, options.turns)
        measure_open(report, many, options.turns)
        measure_sweep(report, many, options.turns, options.seconds)
        measure_operations(report, many, options.turns)
        for filled in (few, many, large):
            filled.engine.close()
    Console().print(report.table)
    return int(report.missed > 0)


if __name__ == "__main__":
    sys.exit(main())
