"""The cost of a look-up for its caller, with several clients: `python benchmarks/client_path.py`.

Turns of shuffled order, on one store: the client of this project, a stub of grpcio, and pyqwest if it is installed. The
store is another process. Times run from the call to the decoded response; processor time is that of the caller.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.measuring import spread
from resumed import StoreClient
from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS = 500
"""Number of calls in one turn."""
NAMESPACE, VALUE = "shop", os.urandom(203)


def build_lookups(target: str, key: bytes) -> dict[str, Callable[[], object]]:
    """Return a function for a look-up with each client, by the client's name."""
    store = StoreClient(target, namespace=NAMESPACE, deadline=10)
    store.put(key, VALUE, 1_000)
    request = pb.GetRequest(namespace=NAMESPACE, key=key)
    stub = SessionStoreServiceStub(grpc.insecure_channel(target))
    lookups: dict[str, Callable[[], object]] = {
        "resumed": lambda: store.get(key),
        "grpcio": lambda: stub.Get(request, timeout=10),
    }
    try:
        pyqwest = importlib.import_module("pyqwest")
    except ImportError:
        return lookups
    if not target.startswith("unix:"):
        http = pyqwest.SyncClient(pyqwest.SyncHTTPTransport(http_version=pyqwest.HTTPVersion.HTTP2))
        url = f"http://{target}/resumed.v1.SessionStoreService/Get"
        headers = {"content-type": "application/grpc", "te": "trailers"}

        def get() -> object:
            encoded = request.SerializeToString()
            body = struct.pack(">?L", False, len(encoded)) + encoded  # not compressed
            return pb.GetResponse.FromString(http.post(url, headers=headers, content=body).content[5:])

        lookups["pyqwest"] = get
    return lookups


def measure_rows(where: str, target: str, rounds: int) -> list[list[str]]:
    """Measure and return a row for each client."""
    calls = build_lookups(target, os.urandom(32))
    times: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    for _ in track(range(rounds), where, console=Console(stderr=True), transient=True):
        for name in random.sample(list(calls), len(calls)):
            call, durations, began = calls[name], [], time.process_time()
            for _ in range(CALLS):
                started = time.perf_counter()
                call()
                durations.append(time.perf_counter() - started)
            times[name].append(statistics.median(durations))
            processor[name].append((time.process_time() - began) / CALLS)
    return [[where, name, spread(times[name], 0, factor=1e6), spread(processor[name], 0, factor=1e6)] for name in calls]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--markdown", action="store_true", help="print a table for docs/")
    options = parser.parse_args()
    heads = ("over", "client", "a Get, us p50", "processor time, us a call")
    lines = []
    with tempfile.TemporaryDirectory() as directory:
        for where, listen in (("TCP", "127.0.0.1:0"), ("unix socket", f"unix:{directory}/store.sock")):
            with running_server(listen=listen) as server:
                lines += measure_rows(where, server.target, options.rounds)
    if options.markdown:
        sys.stdout.writelines(f"| {' | '.join(line)} |\n" for line in [heads, ["---"] * len(heads), *lines])
        return
    table = Table(*heads, title=f"Median and range of {options.rounds} rounds of {CALLS} calls")
    for line in lines:
        table.add_row(*line)
    Console().print(table)


if __name__ == "__main__":
    main()
