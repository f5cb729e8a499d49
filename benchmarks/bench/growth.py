"""Look-ups and handshakes with a thousand, a hundred thousand and a million sessions in the store and in a mirror."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from benchmarks.bench.results import Results
from benchmarks.bench.rig import REQUEST, Frontend, Rig, negotiate, offer_sessions, shuffled
from benchmarks.bench.sources import OPTIONS, PUTS_ARRIVE, VISITS
from benchmarks.engine_scale import FilledEngine
from benchmarks.measuring import resident_bytes, spread
from resumed import StoreClient
from resumed._client.store import StoredSession
from resumed._policy.mirror import SessionCache
from resumed_server.cli.tls_client import Client

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.bench.rig import Options

COUNTS = (1_000, 100_000, 1_000_000)
VALUE_BYTES = 203
"""Size of a sealed TLS 1.3 session."""
LOOKUPS = 200
"""Number of look-ups in each turn."""
TTL = 86_400.0
"""Seconds."""
MEASURED = ("Get, us", "full, ms", "resumed via one call, ms", "look-up in the mirror, us")


def measure(options: Options) -> Results:
    """Measure stores of each size."""
    counts = COUNTS[:2] if options.quick else COUNTS
    figures: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    with Rig() as rig, contextlib.ExitStack() as exit_stack:
        sizes = {f"{count:,}": SizedStore(rig, exit_stack, count, options) for count in counts}
        client = Client("localhost", "1.2", REQUEST)
        for turn in options.progress.track(range(options.turns(12) + 1), description="growth"):
            for name in shuffled(sizes):
                for kind, figure in sizes[name].take_turn(client).items():
                    if turn:
                        figures[name, kind].append(figure)
    results = Results()
    memory = sizes[f"{counts[-1]:,}"].mirror_bytes
    results.judge("mirror memory for each session over its value", "≤", 200, {"": [memory - VALUE_BYTES]}, "bytes")
    rows = [[name, *(spread(figures[name, kind]) for kind in MEASURED)] for name in sizes]
    results.tables.append(
        ("p50 by the number of sessions, grpcio transport, ssl, TLS 1.2, P-256", ["sessions", *MEASURED], rows)
    )
    results.figures = {kind: {name: statistics.median(figures[name, kind]) for name in sizes} for kind in MEASURED}
    return results


class SizedStore:
    """A store with `count` sessions, two frontends, and a mirror with as many sessions."""

    def __init__(self, rig: Rig, exit_stack: contextlib.ExitStack, count: int, options: Options) -> None:
        directory = rig.directory / f"store-{count}"
        filled = FilledEngine(directory, count, options.progress, value=VALUE_BYTES)
        filled.engine.close()
        target = rig.run_store("grpcio", "--storage", f"lmdb://{directory}", "--capacity", "4GiB")
        self._keys = random.sample(filled.keys, min(count, 1 << 16))
        self._store = StoreClient(target, namespace="shop", deadline=1.0)
        exit_stack.callback(self._store.close)
        self._frontends = exit_stack.enter_context(rig.run_frontends([Frontend("ssl", "P-256", target, OPTIONS)] * 2))
        self._mirror = SessionCache(1 << 40)
        before = resident_bytes()
        for key in filled.keys:
            self._mirror.put(bytes(bytearray(key)), StoredSession(os.urandom(VALUE_BYTES), TTL))
        self.mirror_bytes = (resident_bytes() - before) / count
        """Bytes of memory per session in the mirror."""

    def take_turn(self, client: Client) -> dict[str, float]:
        """Return the median of each of MEASURED."""
        # Copies: the key of a handshake is in the processor's cache, but one of a million keys in a list is not.
        keys = [bytes(bytearray(key)) for key in random.choices(self._keys, k=LOOKUPS)]
        full = negotiate(client, self._frontends[0], VISITS)
        time.sleep(PUTS_ARRIVE)
        again = [
            visit
            for visit in offer_sessions(client, self._frontends[1], [each.session for each in full])
            if visit.resumed
        ]
        medians = (
            median_microseconds(self._store.get, keys),
            statistics.median(visit.response_seconds for visit in full) * 1e3,
            statistics.median(visit.response_seconds for visit in again) * 1e3,
            median_microseconds(self._mirror.get, keys),
        )
        return dict(zip(MEASURED, medians, strict=True))


def median_microseconds(look_up: Callable[[bytes], object], keys: list[bytes]) -> float:
    """Look each key up, and return the median duration in microseconds."""
    seconds = []
    for key in keys:
        started = time.perf_counter()
        found = look_up(key)
        seconds.append(time.perf_counter() - started)
        assert found
    return statistics.median(seconds) * 1e6
