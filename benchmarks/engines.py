"""Throughput and latency of each engine through a running server: `python benchmarks/engines.py`.

For every engine, with one worker and with two: calls per second under load, the latencies of sequential calls (the wait
of a frontend) and of concurrent ones, and the processor time per call of the server and of Redis. An empty grpcio
handler and `redis-benchmark` on the same Redis serve as references. All take turns, round by round, so that other
processes of the machine affect all of them; a figure is the median of the rounds, with the range.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.progress import Progress

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.empty import SERVICE, run_empty_server
from benchmarks.load import make_unary_calls
from benchmarks.measuring import build_table, cpu_seconds, new_console, percentiles, process_tree, spread
from resumed.v1 import session_store_pb2 as pb
from resumed_server.preflight import verify_settings
from support.redis import redis_server, valkey_server
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from google.protobuf.message import Message
    from rich.table import Table

VALUE_BYTES = 203
"""Size of a sealed TLS 1.3 session (see memory.py)."""
BATCH = 100
CONNECTIONS, AT_ONCE = 8, 4
"""Connections of the calls under load, and concurrent calls on each connection."""
EMPTY = "empty handler"
ENGINES = ("lmdb", "redis-server", "valkey-server")
METHODS = {"Put": "Put", "Get": "Get", "Take": "Take", "Batch of Puts": "Batch", "Batch of Gets": "Batch"}


class Subject(NamedTuple):
    """A server to measure: its address, its processes, and those of its engine."""

    name: str
    target: str
    processes: Sequence[int]
    engine: Sequence[int] = ()


class Figures:
    """The figures of one operation on one subject, of all rounds."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.server_cpu: list[float] = []
        self.engine_cpu: list[float] = []
        self.generator_load: list[float] = []
        """Share of a core that the load generator used: near 1 the generator is the bottleneck."""
        self.busy: list[float] = []
        self.alone: list[float] = []
        self.benchmark: list[tuple[float, float]] = []
        """p50 and p99 in seconds, if redis-benchmark measured them."""

    def row(self) -> list[str]:
        """Return the cells of a table."""
        return [
            spread(self.rates, 0),
            percentiles(self.alone),
            percentiles(self.busy)
            if self.busy
            else " / ".join(f"{statistics.median(column) * 1e3:.2f}" for column in zip(*self.benchmark, strict=True)),
            spread(self.server_cpu, 0, factor=1e6) if self.server_cpu else "-",
            spread(self.engine_cpu, 0, factor=1e6) if any(self.engine_cpu) else "-",
        ]


def put_request(key: bytes) -> pb.PutRequest:
    """Return a Put of a session with the size of a fleet's sessions."""
    request = pb.PutRequest(namespace="shop", key=key, value=os.urandom(VALUE_BYTES))
    request.ttl.FromSeconds(7_200)
    return request


def get_request(key: bytes) -> pb.GetRequest:
    """Return a Get of a session."""
    return pb.GetRequest(namespace="shop", key=key)


def take_request(key: bytes) -> pb.TakeRequest:
    """Return a Take of a session."""
    return pb.TakeRequest(namespace="shop", key=key)


def batch_requests(operations: Sequence[pb.BatchOperation]) -> list[Message]:
    """Return Batches of `operations`."""
    return [pb.BatchRequest(operations=operations[start : start + BATCH]) for start in range(0, len(operations), BATCH)]


def generate_requests(calls: int) -> Iterator[tuple[str, list[Message]]]:
    """Yield the requests of one round by operation, in an order in which each finds its session."""
    keys, more = ([os.urandom(32) for _ in range(count)] for count in (calls, 4 * calls))
    yield "Put", [put_request(key) for key in keys]
    yield "Get", [get_request(key) for key in random.sample(keys, calls)]
    yield "Take", [take_request(key) for key in random.sample(keys, calls)]
    yield "Batch of Puts", batch_requests([pb.BatchOperation(put=put_request(key)) for key in more])
    yield "Batch of Gets", batch_requests([pb.BatchOperation(get=get_request(key)) for key in more])


def make_calls(subject: Subject, operation: str, messages: Sequence[Message], figures: Figures) -> None:
    """Make nine tenths of the calls concurrently and the rest sequentially; check every response."""
    method = METHODS[operation]
    bodies = [message.SerializeToString() for message in messages]
    cut = len(bodies) * 9 // 10
    server_before, engine_before, client_before = (
        cpu_seconds(subject.processes),
        cpu_seconds(subject.engine),
        time.process_time(),
    )
    busy = make_unary_calls(
        subject.target,
        f"/{SERVICE}/{method}",
        bodies[:cut],
        connections=CONNECTIONS,
        at_once=1 if method == "Batch" else AT_ONCE,
    )
    figures.server_cpu.append((cpu_seconds(subject.processes) - server_before) / cut)
    figures.engine_cpu.append((cpu_seconds(subject.engine) - engine_before) / cut)
    figures.rates.append(cut / busy.seconds)
    figures.generator_load.append((time.process_time() - client_before) / busy.seconds)
    figures.busy += busy.latencies
    alone = make_unary_calls(subject.target, f"/{SERVICE}/{method}", bodies[cut:], connections=1, at_once=1)
    figures.alone += alone.latencies
    if not subject.name.startswith(EMPTY):
        for response in busy.responses + alone.responses:
            assert is_success(method, response), f"{subject.name}: {operation} failed"


def is_success(method: str, response: bytes) -> bool:
    """Return whether a call succeeded: a miss, or an error in a Batch, would distort the figures."""
    if method == "Put":
        return pb.PutResponse.FromString(response).HasField("ttl")
    if method == "Get":
        return pb.GetResponse.FromString(response).HasField("session")
    if method == "Take":
        return pb.TakeResponse.FromString(response).HasField("session")
    results = pb.BatchResponse.FromString(response).results
    return len(results) == BATCH and all(
        result.HasField("put") or (result.HasField("get") and result.get.HasField("session")) for result in results
    )


def redis_benchmark(
    port: int, pipeline: int, count: int, clients: int = CONNECTIONS * AT_ONCE
) -> Iterator[tuple[str, float, float, float]]:
    """Yield the name, calls per second, and p50 and p99 in seconds, of SET and of GET."""
    command = ["redis-benchmark", "-p", str(port), "--dbnum", "1", "-t", "set,get", "-d", str(VALUE_BYTES), "--csv"]
    command += ["-n", str(count), "-r", str(count), "-c", str(clients), "-P", str(pipeline)]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for line in csv.DictReader(report.splitlines()):
        yield line["test"], float(line["rps"]), float(line["p50_latency_ms"]) / 1e3, float(line["p99_latency_ms"]) / 1e3


class Bench:
    """The subjects, and the figures of each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.subjects: list[Subject] = []
        self.redis: dict[str, int] = {}
        self.figures: defaultdict[tuple[str, str], Figures] = defaultdict(Figures)

    @contextlib.contextmanager
    def run(self) -> Iterator[Bench]:
        """Run all subjects during the context."""
        with contextlib.ExitStack() as exit_stack:
            target, process = exit_stack.enter_context(run_empty_server(verify_settings().threads))
            self.subjects.append(Subject(EMPTY, target, [process]))
            for engine, workers in itertools.product(self.options.engines, self.options.workers):
                url, storage = self._store(engine, exit_stack)
                server = exit_stack.enter_context(running_server("--storage", url, workers=workers))
                name = f"{engine}, {workers} worker{'s' if workers > 1 else ''}"
                self.subjects.append(Subject(name, server.target, process_tree(server.process.pid), storage))
            yield self

    def _store(self, engine: str, exit_stack: contextlib.ExitStack) -> tuple[str, list[int]]:
        """Start a storage; return its URL and its processes."""
        if engine == "lmdb":
            return f"lmdb://{exit_stack.enter_context(tempfile.TemporaryDirectory())}", []
        server = exit_stack.enter_context({"redis-server": redis_server, "valkey-server": valkey_server}[engine]())
        self.redis[engine] = server.port
        return f"{server.url}?timeout_ms=5000", [server.process.pid]

    def measure(self, progress: Progress) -> None:
        """Measure all subjects in turns: a round that warms up, then every round."""
        options = self.options
        steps = len(self.subjects) + 2 * len(self.redis)
        task = progress.add_task("measuring", total=(options.rounds + 1) * steps)
        for turn in range(options.rounds + 1):
            figures = self.figures if turn else defaultdict(Figures)
            for subject in self.subjects:
                for operation, messages in generate_requests(options.calls if turn else options.calls // 5):
                    if subject.name != EMPTY or operation == "Get":
                        make_calls(subject, operation, messages, figures[subject.name, operation])
                progress.advance(task)
            for (engine, port), pipeline in itertools.product(self.redis.items(), (1, BATCH)):
                self._redis_benchmark(engine, port, pipeline, figures)
                progress.advance(task)

    def _redis_benchmark(self, engine: str, port: int, pipeline: int, figures: dict[tuple[str, str], Figures]) -> None:
        name = f"redis-benchmark on {engine}" + (f", -P {pipeline}" if pipeline > 1 else "")
        for operation, rate, p50, p99 in redis_benchmark(port, pipeline, self.options.calls * 20):
            operation_figures = figures[name, operation]
            operation_figures.rates.append(rate)
            operation_figures.benchmark.append((p50, p99))

    def table(self, *, markdown: bool) -> Table:
        """Return the figures as a table."""
        table = build_table(
            *("", "", "calls/s", "one at a time, ms p50 / p99", "busy, ms p50 / p99"),
            *("server CPU, us/call", "Redis CPU, us/call"),
            markdown=markdown,
            title=f"Engines, {self.options.rounds} rounds, {os.cpu_count()} cores",
        )
        for (name, operation), figures in self.figures.items():
            table.add_row(name, operation, *figures.row())
        return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=5_000, help="sessions in each round of an operation")
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown, for docs/engines.md")
    options = parser.parse_args()
    with Progress(transient=True) as progress, Bench(options).run() as bench:
        bench.measure(progress)
    new_console().print(bench.table(markdown=options.markdown))


if __name__ == "__main__":
    main()
