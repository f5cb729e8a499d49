"""The cost of a Take that waits for a replica: `python benchmarks/wait.py`.

Two engines on one Valkey with a replica, one with `wait_replicas=1`, take turns; every Take finds its session.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from pathlib import Path

from rich.progress import track

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.measuring import build_table, new_console, spread
from resumed_server.storage.engine import Put
from resumed_server.storage.registry import open_engine
from support.redis import valkey_server
from support.waiting import until

OPTIONS = {"does not wait": "wait_replicas=0", "waits for a replica": "wait_replicas=1"}
BATCH = 200


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--takes", type=int, default=1_000, help="number of Takes in each round")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown, for docs/reliability.md")
    options = parser.parse_args()
    p50s: dict[str, list[float]] = {name: [] for name in OPTIONS}
    p99s: dict[str, list[float]] = {name: [] for name in OPTIONS}
    with contextlib.ExitStack() as exit_stack:
        primary = exit_stack.enter_context(valkey_server())
        replica = exit_stack.enter_context(valkey_server("--replicaof", f"127.0.0.1 {primary.port}"))
        until(lambda: replica.client.info("replication")["master_link_status"] == "up")
        engines = {
            name: exit_stack.enter_context(
                contextlib.closing(open_engine(f"{primary.url}?timeout_ms=5000&{query}", capacity=0))
            )
            for name, query in OPTIONS.items()
        }
        for _ in track(range(options.rounds), transient=True):
            for name, engine in engines.items():
                keys = [os.urandom(32) for _ in range(options.takes)]
                for start in range(0, len(keys), BATCH):
                    engine.batch([Put("shop", key, bytes(200), 600.0) for key in keys[start : start + BATCH]])
                seconds = []
                for key in keys:
                    started = time.perf_counter()
                    assert engine.take("shop", key)
                    seconds.append(time.perf_counter() - started)
                percentiles = statistics.quantiles(seconds, n=100)
                p50s[name].append(percentiles[49] * 1e3)
                p99s[name].append(percentiles[98] * 1e3)
    table = build_table("Take", "ms p50", "ms p99", markdown=options.markdown)
    for name in OPTIONS:
        table.add_row(name, spread(p50s[name]), spread(p99s[name]))
    new_console().print(table)


if __name__ == "__main__":
    main()
