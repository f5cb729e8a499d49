"""Made-up session ids: a flood of them, and those of TLS 1.3 clients for middleboxes (RFC 8446, appendix D.4)."""

from __future__ import annotations

import os
import socket
import statistics
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

from OpenSSL import SSL

from benchmarks.bench.results import Results, ratios
from benchmarks.bench.rig import REQUEST, Frontend, Rig, negotiate, shuffled
from benchmarks.fleet import Client as LineClient
from benchmarks.measuring import spread
from resumed_server.cli.tls_client import Client
from support.tls import STACKS, VERSIONS

if TYPE_CHECKING:
    from typing_extensions import Self

    from benchmarks.bench.rig import Options
    from resumed_server.cli.tls_client import Endpoint
    from support.tls import Stack

RATE = 100_000
"""Made-up ids per second."""
NEW_CLIENTS = 2_000
VISITS = 40


def measure(options: Options) -> Results:
    """Measure both stacks."""
    results, rows = Results(), []
    added: dict[str, list[float]] = {}
    calls: dict[str, list[float]] = {}
    steps: list[Stack] = list(STACKS)
    with Rig() as rig:
        store = rig.run_store()
        for stack in options.progress.track(steps, description="made-up ids"):
            with rig.run_frontends(
                [
                    Frontend(stack, "P-256", store),
                    Frontend(stack, "P-256", store, ("--made-up-ids", str(RATE))),
                    Frontend(stack, "P-256"),
                    Frontend(stack, "P-256", store, ("--tls12-only",)),
                ]
            ) as (calm, offered, plain, limited):
                before, began = read_stats(offered), time.monotonic()
                times = measure_honest_clients({"calm": calm, "offered": offered}, options.turns(24))
                after = read_stats(offered)
                rate = (count_foreign_ids(after) - count_foreign_ids(before)) / (time.monotonic() - began)
                added[stack] = ratios(times["offered"], times["calm"])
                calls[stack] = [float(sum(after["lookup_seconds"]))]
                cells = [f"{rate:,.0f}", f"{calls[stack][0]:.0f}", spread(added[stack])]
                rows.append([stack, "offered to the callback", *cells])
                with Flood([calm, plain]) as flood:
                    times = measure_honest_clients({"shim": calm, "no shim": plain}, options.turns(12))
                over, stats = ratios(times["shim"], times["no shim"]), read_stats(calm)
                lookups = f"{sum(stats['lookup_seconds'])} of {count_foreign_ids(stats):,}"
                rows.append([stack, "in ClientHellos", f"{flood.rate:,.0f}", lookups, spread(over)])
                calls[f"{stack}, new TLS 1.3 clients"] = [
                    float(visit_as_new_clients(limited, options.turns(NEW_CLIENTS)))
                ]
    what = f"{RATE:,} made-up ids a second offered to the get callback"
    results.judge(
        f"{what}: calls at the store", "≤", 0, {name: figures for name, figures in calls.items() if "new" not in name}
    )
    results.judge(f"{what}: honest handshakes ÷ without, p50", "≤", 1.10, added)
    results.judge(
        "TLS 1.3 clients new to a server limited to TLS 1.2: calls at the store",
        "≤",
        0,
        {name: figures for name, figures in calls.items() if "new" in name},
    )
    headings = ["stack", "made-up ids", "a second", "calls at the store", "honest handshake, p50 ÷ without"]
    results.tables.append(("Made-up ids while honest clients negotiate", headings, rows))
    results.facts = {"first visits of TLS 1.3 clients": options.turns(NEW_CLIENTS)}
    return results


def measure_honest_clients(endpoints: dict[str, Endpoint], turns: int) -> dict[str, list[float]]:
    """Return the median of each turn of full handshakes, in milliseconds."""
    client = Client("localhost", "1.2", REQUEST)
    times: dict[str, list[float]] = {name: [] for name in endpoints}
    for turn in range(turns + 1):
        for name in shuffled(endpoints):
            visits = negotiate(client, endpoints[name], VISITS)
            if turn:
                times[name].append(statistics.median(visit.response_seconds for visit in visits) * 1e3)
    return times


def read_stats(endpoint: Endpoint) -> dict[str, Any]:
    """Return the statistics of a frontend's installation."""
    return LineClient(VERSIONS[0]).ask(endpoint.address[1], b"stats")


def count_foreign_ids(stats: dict[str, Any]) -> int:
    """Return the number of ids that the fleet had not issued."""
    count: int = stats["misses"].get("foreign-id", 0)
    return count


def visit_as_new_clients(endpoint: Endpoint, number: int) -> int:
    """Connect new clients that offer TLS 1.3 and therefore a made-up id; return the number of calls at the store."""
    client = Client("localhost", None, REQUEST)
    for _ in range(number):
        assert client.visit(endpoint).version == "TLSv1.2"
    stats = read_stats(endpoint)
    assert count_foreign_ids(stats) >= number, "the clients sent no ids"
    calls: int = sum(stats["lookup_seconds"])
    return calls


class Flood:
    """A thread that sends ClientHellos with made-up ids to frontends in turns, as fast as they respond."""

    def __init__(self, endpoints: list[Endpoint]) -> None:
        self._endpoints = endpoints
        self._hello = client_hello()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.rate = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        sent, started = 0, time.monotonic()
        while not self._over.is_set():
            for endpoint in self._endpoints:
                with socket.create_connection(endpoint.address) as connection:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.sendall(self._hello[0] + os.urandom(32) + self._hello[1])
                    connection.recv(4096)
                sent += 1
        self.rate = sent / (time.monotonic() - started) / len(self._endpoints)


def client_hello() -> tuple[bytes, bytes]:
    """Return a TLS 1.2 ClientHello: its bytes before and after a session id of 32 bytes (RFC 5246, section 7.4.1.2)."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    connection = SSL.Connection(context, None)
    connection.set_connect_state()
    try:
        connection.do_handshake()
    except SSL.WantReadError:
        hello = connection.bio_read(65_536)
    versions_and_random, rest = hello[9:43], hello[44:]
    assert not hello[43], "the hello has an id already"
    body = len(versions_and_random) + 1 + 32 + len(rest)
    record = struct.pack(">BHHBBH", 22, 0x301, body + 4, 1, body >> 16, body & 0xFFFF)
    return record + versions_and_random + b"\x20", rest
