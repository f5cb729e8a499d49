"""Duration and memory of the snapshot of lasting removals: `python benchmarks/removals.py`.

A server on each engine has some lasting removals among twice as many sessions. Watchers of removals then begin, one
after the other and several at a time, in this process. "First" is the time until the first watcher has all removals;
"growth" is that of the server's resident memory over all watchers.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.duration_pb2 import Duration
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.measuring import resident_bytes
from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from support.redis import valkey_cluster, valkey_server
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.server import RunningServer

NAMESPACE, BATCH, LIFETIME = "shop", 256, Duration(seconds=3_600)
OPTIONS = [("grpc.use_local_subchannel_pool", 1)]
STORES: dict[str, Any] = {"lmdb": None, "valkey": valkey_server, "cluster": valkey_cluster}


@contextlib.contextmanager
def run_store(name: str) -> Iterator[RunningServer]:
    """Run a server with a new storage."""
    with contextlib.ExitStack() as exit_stack:
        storage = STORES[name]
        url = f"{exit_stack.enter_context(storage()).url}?timeout_ms=5000" if storage else "lmdb:"
        yield exit_stack.enter_context(running_server("--storage", url))


def fill(stub: SessionStoreServiceStub, removals: int) -> None:
    """Store twice as many sessions as removals, and make the removals."""
    for start in range(0, removals, BATCH):
        numbers = range(start, min(start + BATCH, removals))
        operations = []
        for number in numbers:
            for half in range(2):
                put = pb.PutRequest(namespace=NAMESPACE, key=b"s%031d" % (2 * number + half), value=bytes(235))
                put.ttl.CopyFrom(LIFETIME)
                operations.append(pb.BatchOperation(put=put))
            remove = pb.RemoveRequest(namespace=NAMESPACE, key=b"r%031d" % number, ttl=LIFETIME)
            operations.append(pb.BatchOperation(remove=remove))
        for part in range(0, len(operations), BATCH):
            stub.Batch(pb.BatchRequest(operations=operations[part : part + BATCH]))


def snapshot_seconds(target: str, removals: int) -> float:
    """Return the time until a new watcher has all removals."""
    with grpc.insecure_channel(target, options=OPTIONS) as channel:
        started, received = time.perf_counter(), 0
        for response in SessionStoreServiceStub(channel).Watch(
            pb.WatchRequest(namespace=NAMESPACE, removals_only=True)
        ):
            received += len(response.events)
            if response.live:
                break
        seconds = time.perf_counter() - started
    assert received == removals, f"{received} of {removals} removals"
    return seconds


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--removals", type=int, default=100_000)
    parser.add_argument("--together", type=int, default=8, help="watchers that begin at the same time")
    parser.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES))
    options = parser.parse_args()
    table = Table(
        "store", "first, s", "median of 5, s", f"{options.together} at once, s", "growth, MiB", box=box.MARKDOWN
    )
    for name in options.stores:
        with run_store(name) as server, grpc.insecure_channel(server.target, options=OPTIONS) as channel:
            fill(SessionStoreServiceStub(channel), options.removals)
            before = resident_bytes(server.process.pid) / 2**20
            alone = [snapshot_seconds(server.target, options.removals) for _ in range(5)]
            with ThreadPoolExecutor(options.together) as threads:
                targets = [server.target] * options.together
                together = list(threads.map(lambda target: snapshot_seconds(target, options.removals), targets))
            growth = resident_bytes(server.process.pid) / 2**20 - before
            figures = (alone[0], statistics.median(alone), max(together), growth)
            table.add_row(name, *(f"{figure:.2f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
