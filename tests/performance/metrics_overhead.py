"""What metrics cost a Get: `python tests/performance/metrics_overhead.py`.

For each front two servers of one process, alike but for `--metrics-listen`, are kept busy in turns, and the one that is
measured is scraped meanwhile. What counts is the processor time that the server took for a call, since the wall clock
belongs to everybody; ratios are made within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from performance.engines import AT_ONCE, CONNECTIONS, cpu_seconds, get, put, spread
from performance.load import drive
from resumed.v1.session_store_pb2 import DESCRIPTOR
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from support.server import RunningServer

FRONTS = ("grpcio", "native")
SCRAPE_SECONDS = 1.0
"""Fifteen times as often as Prometheus does."""
SERVICE = DESCRIPTOR.services_by_name["SessionStoreService"].full_name


@contextlib.contextmanager
def scraped(server: RunningServer) -> Iterator[None]:
    """Ask a server for its metrics, as long as the context lasts."""
    (address,) = server.log_lines("listening")[0]["metrics"] or [None]
    stopped = threading.Event()

    def scrape() -> None:
        while not stopped.wait(SCRAPE_SECONDS):
            with urllib.request.urlopen(f"http://{address}/metrics") as answer:
                answer.read()

    thread = threading.Thread(target=scrape)
    if address:
        thread.start()
    yield
    stopped.set()
    if address:
        thread.join()


def measure(server: RunningServer, keys: Sequence[bytes]) -> float:
    """Return the processor time of a Get, in seconds."""
    bodies = [get(key).SerializeToString() for key in keys]
    before = cpu_seconds([server.process.pid])
    with scraped(server):
        drive(server.target, f"/{SERVICE}/Get", bodies, connections=CONNECTIONS, at_once=AT_ONCE)
    return (cpu_seconds([server.process.pid]) - before) / len(bodies)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=20_000, help="Gets of a round and server")
    parser.add_argument("--markdown", action="store_true", help="print a table for docs/")
    options = parser.parse_args()
    keys = [os.urandom(32) for _ in range(options.calls)]
    table = Table(
        *("front", "a Get without metrics, us", "with", "with ÷ without", "wanted"),
        box=box.MARKDOWN if options.markdown else box.HEAVY_HEAD,
    )
    with contextlib.ExitStack() as held:
        for front in FRONTS:
            pair = [
                held.enter_context(running_server("--front", front, *metrics))
                for metrics in ((), ("--metrics-listen", "127.0.0.1:0"))
            ]
            for server in pair:
                bodies = [put(key).SerializeToString() for key in keys]
                drive(server.target, f"/{SERVICE}/Put", bodies, connections=CONNECTIONS, at_once=AT_ONCE)
            taken: list[list[float]] = []
            for turn in track(range(options.rounds + 1), front, console=Console(stderr=True), transient=True):
                order = pair if turn % 2 else pair[::-1]
                found = [measure(server, keys) for server in order]
                taken.append(found if turn % 2 else found[::-1])
            without, having = zip(*taken[1:], strict=True)  # the first is to warm up
            ratios = [more / less for less, more in zip(without, having, strict=True)]
            table.add_row(front, spread(without, 1e6, 1), spread(having, 1e6, 1), spread(ratios, 1, 3), "≤ 1.05")
    console = Console(width=None if os.isatty(1) else 120)
    console.print(table)
    console.print(f"{options.rounds} rounds of {options.calls} calls, load {os.getloadavg()[2]:.1f}")


if __name__ == "__main__":
    main()
