"""Memory of a mirror per session, beside its value: `python benchmarks/mirror_memory.py`.

Each figure comes from a separate process: "allocated" is the memory of Python's allocator (tracemalloc), "resident" the
growth of the process. "Turned over" is the state after another session has replaced every session.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import multiprocessing
import os
import statistics
import sys
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import track

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.measuring import build_table, new_console, resident_bytes
from resumed._client.store import StoredSession
from resumed._policy.mirror import _EXPIRY_BYTES, _OVERHEAD, SessionCache

if TYPE_CHECKING:
    from collections.abc import Callable

VALUE_BYTES, LIFETIME = 203, 7_200.0
WANTED = 200
TURNS = 1


def allocated_bytes() -> int:
    """Return the memory of Python's objects in bytes."""
    return tracemalloc.get_traced_memory()[0]


def fill_mirror(count: int, turns: int) -> SessionCache:
    """Return a mirror with `count` sessions, each of which has replaced `turns` others."""
    sessions = SessionCache(1 << 40)
    for turn in range(turns + 1):
        for number in range(count):
            if turn:
                sessions.remove(derive_key(turn - 1, number))
            sessions.put(derive_key(turn, number), StoredSession(os.urandom(VALUE_BYTES), LIFETIME))
    return sessions


def derive_key(turn: int, number: int) -> bytes:
    """Return the store key of a session, as a new object at each call."""
    return hashlib.sha256(b"%d %d" % (turn, number)).digest()


def overhead(measure: Callable[[], int], count: int, turns: int) -> float:
    """Return the bytes of a session beside its value."""
    if measure is allocated_bytes:
        tracemalloc.start()
    fill_mirror(100, 0)  # allocates the objects that all mirrors share
    gc.collect()
    before = measure()
    sessions = fill_mirror(count, turns)
    gc.collect()
    used = measure() - before
    assert len(sessions) == count
    return used / count - VALUE_BYTES


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--markdown", action="store_true", help="print the table of results/measurements.md")
    options = parser.parse_args()
    table = build_table(
        *("sessions", "", "allocated", "resident", "counted as", "wanted"),
        title="Bytes of a session in a mirror, beside its value",
        markdown=options.markdown,
    )
    cases = [(count, turns) for count in options.sessions for turns in (0, TURNS)]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for count, turns in track(cases, "filling", transient=True):
            rounds = [
                [pool.apply(overhead, (measure, count, turns)) for _ in range(options.rounds)]
                for measure in (allocated_bytes, resident_bytes)
            ]
            cells = [f"{statistics.median(each):.0f} ({min(each):.0f} to {max(each):.0f})" for each in rounds]
            table.add_row(
                f"{count:,}", "turned over" if turns else "new", *cells, f"{_OVERHEAD + _EXPIRY_BYTES}", f"≤ {WANTED}"
            )
    new_console().print(table)


if __name__ == "__main__":
    main()
