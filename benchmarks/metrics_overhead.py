"""The cost of metrics for a Get, or of spans: `python benchmarks/metrics_overhead.py`, or with `--spans 1`.

For each gRPC transport, two servers of one process are under load in turns; they differ in `--metrics-listen` (or
`--otel`) only. A thread of this process scrapes the metrics, or a collector here receives the spans. The figures are
the server's processor time per call, because other processes distort the wall clock; ratios are those of one round. The
run takes about two minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from rich.console import Console
from rich.progress import track

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.engines import AT_ONCE, CONNECTIONS, get_request, put_request
from benchmarks.load import make_unary_calls
from benchmarks.measuring import build_table, cpu_seconds, new_console
from resumed.v1.session_store_pb2 import DESCRIPTOR
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from support.server import RunningServer

TRANSPORTS = ("grpcio", "native")
SCRAPE_SECONDS = 1.0
"""A fifteenth of Prometheus' usual interval."""
SERVICE = DESCRIPTOR.services_by_name["SessionStoreService"].full_name


@contextlib.contextmanager
def run_scraped(transport: str) -> Iterator[RunningServer]:
    """Run a server, and scrape its metrics periodically."""
    stopped = threading.Event()

    def scrape(address: str) -> None:
        while not stopped.wait(SCRAPE_SECONDS):
            with urllib.request.urlopen(f"http://{address}/metrics") as response:
                response.read()

    with running_server("--transport", transport, "--metrics-listen", "127.0.0.1:0") as server:
        (address,) = server.log_lines("listening")[0]["metrics"]
        thread = threading.Thread(target=scrape, args=(address,))
        thread.start()
        yield server
        stopped.set()
        thread.join()


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Receives spans and discards them."""

    def Export(self, request: object, context: object) -> Any:  # noqa: N802
        """See OTLP."""
        return trace_service_pb2.ExportTraceServiceResponse()


@contextlib.contextmanager
def run_traced(transport: str, share: float) -> Iterator[RunningServer]:
    """Run a server that records spans for a share of its calls."""
    collector = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), collector)  # type: ignore[no-untyped-call]
    port = collector.add_insecure_port("127.0.0.1:0")
    collector.start()
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_TRACES_SAMPLER": "traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": str(share),
    }
    with running_server("--transport", transport, "--otel", env=env) as server:
        yield server
    collector.stop(None)


def measure(server: RunningServer, keys: Sequence[bytes]) -> float:
    """Return the processor time of a Get, in seconds."""
    bodies = [get_request(key).SerializeToString() for key in keys]
    before = cpu_seconds([server.process.pid])
    make_unary_calls(server.target, f"/{SERVICE}/Get", bodies, connections=CONNECTIONS, at_once=AT_ONCE)
    return (cpu_seconds([server.process.pid]) - before) / len(bodies)


def format_spread(figures: Sequence[float], factor: float, digits: int) -> str:
    """Return the median and the quartiles: the extremes reflect the machine, not the server."""
    low, middle, high = (factor * figure for figure in statistics.quantiles(figures, n=4))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--calls", type=int, default=10_000, help="Gets in a round, at each server")
    parser.add_argument("--spans", type=float, metavar="SHARE", help="measure spans of this share of calls instead")
    parser.add_argument("--markdown", action="store_true", help="print a table for docs/")
    options = parser.parse_args()
    keys = [os.urandom(32) for _ in range(options.calls)]
    measured = "metrics" if options.spans is None else f"spans of {options.spans:.0%} of calls"
    table = build_table(
        *("transport", "a Get without, us", f"with {measured}", "with ÷ without: median (quartiles)", "wanted"),
        markdown=options.markdown,
    )
    for transport in TRANSPORTS:
        with contextlib.ExitStack() as exit_stack:
            observed = run_scraped(transport) if options.spans is None else run_traced(transport, options.spans)
            pair = [
                exit_stack.enter_context(running_server("--transport", transport)),
                exit_stack.enter_context(observed),
            ]
            for server in pair:
                bodies = [put_request(key).SerializeToString() for key in keys]
                make_unary_calls(server.target, f"/{SERVICE}/Put", bodies, connections=CONNECTIONS, at_once=AT_ONCE)
            rounds: list[list[float]] = []
            for turn in track(range(options.rounds + 1), transport, console=Console(stderr=True), transient=True):
                order = pair if turn % 2 else pair[::-1]
                found = [measure(server, keys) for server in order]
                rounds.append(found if turn % 2 else found[::-1])
        without, with_metrics = zip(*rounds[1:], strict=True)  # the first round warms up
        ratios = [slow / fast for fast, slow in zip(without, with_metrics, strict=True)]
        wanted = "≤ 1.05" if options.spans is None else ""
        table.add_row(
            transport,
            format_spread(without, 1e6, 1),
            format_spread(with_metrics, 1e6, 1),
            format_spread(ratios, 1, 3),
            wanted,
        )
    console = new_console()
    console.print(table)
    console.print(f"{options.rounds} rounds of {options.calls} calls, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
