"""The cost of tickets of the fleet for nginx: `python benchmarks/nginx_tickets.py`.

Two pairs of nginx, each with one worker: one pair with libresumed-preload and RESUMED_SESSIONS=tickets, the other one
without the library and with a ticket key that both have (ssl_session_ticket_key). They make the same handshakes in
turns: full, and resumed at the other nginx of the pair. The table shows the processor time of the workers per handshake
(user and system, all threads, from schedstat) and the client's time, as medians of many short rounds, and the ratios
with the quartiles of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import resumed
from preload.servers import Server, serving, settings
from resumed_server.cli.tls_client import Client, Endpoint
from support.server import running_server
from support.tls import CA

if TYPE_CHECKING:
    from collections.abc import Sequence

    from OpenSSL import SSL

VERSIONS = ("1.2", "1.3")
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


class Pair:
    """Two nginx servers that share their tickets, and a client for each version."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers, self._workers = servers, list[str]()
        self._endpoints = [Endpoint.resolve("127.0.0.1", server.port) for server in servers]
        self._clients = {version: Client("localhost", version, REQUEST) for version in VERSIONS}

    def await_agreement(self) -> None:
        """Wait until both servers resume their own sessions, and find their workers."""
        for version, client in self._clients.items():
            for endpoint in self._endpoints:
                end = time.monotonic() + 30
                while not client.visit(endpoint, client.visit(endpoint).session).resumed:
                    assert time.monotonic() < end, f"no resumption in TLS {version}"
        for pid in (server.process.pid for server in self._servers):
            self._workers += Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()[:1]

    def _processor(self) -> float:
        threads = itertools.chain.from_iterable(Path(f"/proc/{worker}/task").iterdir() for worker in self._workers)
        return sum(int((thread / "schedstat").read_text(encoding="ascii").split()[0]) for thread in threads) / 1e9

    def seconds(self, version: str, number: int, *, reused: bool) -> tuple[float, float]:
        """Make handshakes; return the processor time and the client's median time, per handshake."""
        client = self._clients[version]
        session: SSL.Session | None = client.visit(self._endpoints[0]).session if reused else None
        processor, times = self._processor(), []
        for turn in range(number):
            began = time.perf_counter()
            # nginx 1.22 itself sends no new ticket in TLS 1.3, so the client offers the same one again.
            visit = client.visit(self._endpoints[(turn + 1) % 2 if reused else turn % 2], session)
            times.append(time.perf_counter() - began)
            assert visit.resumed == reused
        return (self._processor() - processor) / number, statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--handshakes", type=int, default=20, help="in each round, of each kind, with each pair")
    options = parser.parse_args()
    table = Table("TLS", "handshake", "measured", "own tickets, ms", "of the fleet, ms", "ratio")
    with tempfile.TemporaryDirectory(prefix="resumed-tickets-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o755)
        certificate, key, keyring = (directory / file for file in ("server.pem", "ticket.key", "fleet.keys"))
        certificate.write_bytes(CA.issue_cert("localhost").private_key_and_cert_chain_pem.bytes())
        key.write_bytes(os.urandom(80))
        keyring.touch(0o600)
        keyring.write_text(resumed.Keyring.generate() + "\n", encoding="ascii")
        store = stack.enter_context(running_server())
        of_fleet = settings(store.target, "cost", keyring, sessions="tickets", tickets_tls12="1")
        pairs = []
        for environment, more in ({}, f"ssl_session_ticket_key {key};"), (of_fleet, ""):
            servers = [
                stack.enter_context(serving("nginx", certificate, environment, workers=1, more=more)) for _ in range(2)
            ]
            pairs.append(Pair(servers))
            pairs[-1].await_agreement()
        for version in VERSIONS:
            for reused in False, True:
                rounds: tuple[list[tuple[float, float]], ...] = ([], [])
                for turn in range(options.rounds + 1):
                    for which in (0, 1) if turn % 2 else (1, 0):
                        seconds = pairs[which].seconds(version, options.handshakes, reused=reused)
                        if turn:  # the first round warms up
                            rounds[which].append(seconds)
                for kind, source in enumerate(("processor", "client")):
                    own, fleet = ([each[kind] for each in side] for side in rounds)
                    low, _, high = statistics.quantiles([b / a for a, b in zip(own, fleet, strict=True)], n=4)
                    own_median, fleet_median = statistics.median(own), statistics.median(fleet)
                    table.add_row(
                        version, "resumed" if reused else "full", source, f"{own_median * 1e3:.3f}",
                        f"{fleet_median * 1e3:.3f}", f"{fleet_median / own_median:.3f} ({low:.2f} to {high:.2f})",
                    )  # fmt: skip
    console = Console(width=100)
    console.print(table)
    console.print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
