"""Overhead of the server per call: `python benchmarks/server_path.py`.

The store with either gRPC transport, over TCP and over a unix socket; a grpcio handler that does nothing, on the
store's executor and on one of the standard library; and `redis-benchmark` on a Redis. Every server runs on one core,
the load generators on the others. All take turns, round by round, and ratios are those of one round, so other processes
of the machine affect both sides; a figure is the median of the rounds, with the range.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.progress import Progress

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.empty import run_empty_server
from benchmarks.engines import (
    BATCH,
    EMPTY,
    Figures,
    Subject,
    generate_requests,
    make_calls,
    redis_benchmark,
)
from benchmarks.measuring import bind_to_cores, build_table, cpu_seconds, new_console, percentiles, process_tree, spread
from resumed_server.preflight import verify_settings
from support.redis import redis_server
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rich.table import Table

TRANSPORTS = ("grpcio", "native")
UNIX = ", unix socket"
OTHER_THREADS = f"{EMPTY}, grpcio's threads"
REDIS = "redis-benchmark"
REDIS_CLIENTS = 50


class Ratio(NamedTuple):
    """A quotient of two figures, each as subject, operation, and number of look-ups in a call."""

    name: str
    numerator: tuple[str, str, int]
    denominator: tuple[str, str, int]
    target: float | None = None


RATIOS = (
    Ratio("Get, grpcio transport ÷ empty handler", ("grpcio", "Get", 1), (EMPTY, "Get", 1), 0.85),
    Ratio("empty handler, grpcio's threads ÷ the store's", (OTHER_THREADS, "Get", 1), (EMPTY, "Get", 1)),
    Ratio("Get, native transport ÷ grpcio transport", ("native", "Get", 1), ("grpcio", "Get", 1), 4),
    Ratio("Put, native transport ÷ grpcio transport", ("native", "Put", 1), ("grpcio", "Put", 1)),
    Ratio("Take, native transport ÷ grpcio transport", ("native", "Take", 1), ("grpcio", "Take", 1)),
    *(
        Ratio(
            f"look-ups, {transport} transport, Batch({BATCH}) ÷ {REDIS} GET",
            (transport, "Batch of Gets", BATCH),
            (REDIS, "GET", 1),
            1.5,
        )
        for transport in TRANSPORTS
    ),
    *(
        Ratio(
            f"{operation}, {transport} transport, unix socket ÷ TCP",
            (transport + UNIX, operation, 1),
            (transport, operation, 1),
        )
        for transport in TRANSPORTS
        for operation in ("Get", "Put")
    ),
)

_Rounds = defaultdict[tuple[str, str], Figures]


@contextlib.contextmanager
def run_servers(threads: int) -> Iterator[tuple[list[Subject], Callable[[int, _Rounds], None]]]:
    """Run all servers; yield those that speak gRPC, and a function that measures Redis."""
    with contextlib.ExitStack() as exit_stack:
        subjects = []
        for name, executor in ((EMPTY, "store"), (OTHER_THREADS, "grpcio")):
            target, process = exit_stack.enter_context(run_empty_server(threads, executor))
            subjects.append(Subject(name, target, [process]))
        directory = exit_stack.enter_context(tempfile.TemporaryDirectory())
        for transport in TRANSPORTS:
            options = ("--transport", transport, "--threads", str(threads))
            path = f"unix:{directory}/{transport}"
            for name, listen in ((transport, "127.0.0.1:0"), (transport + UNIX, path)):
                server = exit_stack.enter_context(running_server(*options, listen=listen))
                subjects.append(Subject(name, server.target, process_tree(server.process.pid)))
        redis = exit_stack.enter_context(redis_server())

        def measure_redis(calls: int, rounds: _Rounds) -> None:
            before = cpu_seconds([redis.process.pid])
            for command, rate, p50, p99 in redis_benchmark(redis.port, 1, calls, REDIS_CLIENTS):
                figures = rounds[REDIS, command]
                figures.rates.append(rate)
                figures.benchmark.append((p50, p99))
            # Both commands cost about the same, and the benchmark makes as many of each.
            rounds[REDIS, "GET"].server_cpu.append((cpu_seconds([redis.process.pid]) - before) / (2 * calls))

        yield subjects, measure_redis


def measure(options: argparse.Namespace, progress: Progress) -> _Rounds:
    """Measure all in turns: a round that warms up, then every round."""
    cores = sorted(os.sched_getaffinity(0))
    rounds: _Rounds = defaultdict(Figures)
    with contextlib.ExitStack() as exit_stack:
        with bind_to_cores({cores[0]}):
            subjects, measure_redis = exit_stack.enter_context(run_servers(options.threads))
        exit_stack.enter_context(bind_to_cores(set(cores[1:]) or set(cores)))
        task = progress.add_task("measuring", total=(options.rounds + 1) * (len(subjects) + 1))
        for turn in range(options.rounds + 1):
            target: _Rounds = rounds if turn else defaultdict(Figures)
            calls = options.calls if turn else options.calls // 5
            for subject in subjects:
                for operation, messages in generate_requests(calls):
                    if not subject.name.startswith(EMPTY) or operation == "Get":
                        make_calls(subject, operation, messages, target[subject.name, operation])
                progress.advance(task)
            measure_redis(20 * calls, target)
            progress.advance(task)
    return rounds


def table_of_figures(rounds: _Rounds, *, markdown: bool) -> Table:
    """Return a table of the figures of each operation."""
    table = build_table(
        *("", "", "calls/s", "one at a time, ms p50 / p99", "server CPU, us/call", "load generator, cores"),
        markdown=markdown,
    )
    for (name, operation), figures in rounds.items():
        alone = (
            percentiles(figures.alone)
            if figures.alone
            else f"{statistics.median(p50 for p50, _ in figures.benchmark) * 1e3:.2f} with {REDIS_CLIENTS} at once"
        )
        cpu = spread(figures.server_cpu, 1, factor=1e6) if figures.server_cpu else "-"
        load = f"{statistics.median(figures.generator_load):.2f}" if figures.generator_load else "-"
        table.add_row(name, operation, spread(figures.rates, 0), alone, cpu, load)
    return table


def table_of_ratios(rounds: _Rounds, *, markdown: bool) -> Table:
    """Return a table of the ratios: of calls per second, and of calls per second of the server's processor time."""
    table = build_table(*("", "a second", "a second of server CPU", "wanted"), markdown=markdown)
    for ratio in RATIOS:
        wanted = f"≥ {ratio.target:g}" if ratio.target else ""
        table.add_row(ratio.name, quotient(rounds, ratio, by_cpu=False), quotient(rounds, ratio, by_cpu=True), wanted)
    return table


def quotient(rounds: Mapping[tuple[str, str], Figures], ratio: Ratio, *, by_cpu: bool) -> str:
    """Return the median and the range of a ratio, computed round by round."""
    (numerator, numerator_lookups), (denominator, denominator_lookups) = (
        (rounds[name, operation], lookups) for name, operation, lookups in (ratio.numerator, ratio.denominator)
    )
    quotients = [
        numerator_lookups * numerator_speed / (denominator_lookups * denominator_speed)
        for numerator_speed, denominator_speed in zip(
            speeds(numerator, by_cpu=by_cpu), speeds(denominator, by_cpu=by_cpu), strict=True
        )
    ]
    return spread(quotients)


def speeds(figures: Figures, *, by_cpu: bool) -> Sequence[float]:
    """Return the calls per second of each round, or per second of the server's processor time."""
    return [1 / cpu for cpu in figures.server_cpu] if by_cpu else figures.rates


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=5_000, help="sessions in each round of an operation")
    parser.add_argument("--threads", type=int, default=verify_settings().threads, help="number of threads for calls")
    parser.add_argument("--markdown", action="store_true", help="print the tables of results/server.md")
    options = parser.parse_args()
    started = time.monotonic()
    with Progress(transient=True) as progress:
        rounds = measure(options, progress)
    console = new_console()
    for table in (table_of_ratios, table_of_figures):
        console.print(table(rounds, markdown=options.markdown))
    console.print(f"{options.rounds} rounds in {time.monotonic() - started:.0f} s, load {os.getloadavg()[2]:.1f}")


if __name__ == "__main__":
    main()
