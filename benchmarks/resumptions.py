"""Resumptions across two frontends in processes of their own: `python benchmarks/resumptions.py`.

Each try is one full handshake on the first frontend and at once a resumption on the second, which is of the other TLS
stack. All connections are cut without close_notify. Then `openssl s_client` does the same, with a new process for each
connection, and with -reconnect.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.fleet import OTHER, PATIENCE, VERSION_NAMES, Client, Fleet, milliseconds
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RECONNECTIONS = 5
"""How often `openssl s_client -reconnect` comes back."""


class Outcome:
    """Whether each try resumed, and the seconds that full and resumed handshakes took."""

    def __init__(self) -> None:
        self.resumed: list[bool] = []
        self.full_seconds: list[float] = []
        self.resumed_seconds: list[float] = []

    @property
    def shown(self) -> str:
        """How many tries resumed."""
        tries = len(self.resumed)
        return f"{sum(self.resumed):,} of {tries:,} ({sum(self.resumed) / tries:.2%})"


def crosses(outcome: Outcome, version: str, first: int, second: int) -> None:
    """Negotiate a session on one frontend and offer it to the other at once."""
    client = client_of(version)
    full = client.visit(first)
    again = client.visit(second, full.session)
    outcome.resumed.append(again.resumed)
    outcome.full_seconds.append(full.seconds)
    if again.resumed:
        outcome.resumed_seconds.append(again.seconds)


@cache
def client_of(version: str) -> Client:
    """Return the one client that speaks `version`."""
    return Client(VERSION_NAMES[version])


def s_client(port: int, version: str, *options: str) -> Iterator[bool]:
    """Connect with `openssl s_client` and yield of each of its connections whether it was resumed."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "localhost", "-ign_eof"]
    command += ["-" + version.lower().replace(" ", "").replace(".", "_"), *options]
    # The first line is answered, so tickets arrive; after the second the frontend cuts the connection.
    said = subprocess.run(
        command, input="who\nbye\n", capture_output=True, text=True, timeout=PATIENCE, check=False
    ).stdout
    for line in said.splitlines():
        if line.startswith(("New, TLSv1", "Reused, TLSv1")):
            yield line.startswith("Reused")


def s_client_crosses(outcome: Outcome, version: str, first: int, second: int) -> None:
    """Negotiate a session on one frontend and offer it to the other, from two processes."""
    with tempfile.TemporaryDirectory() as place:
        file = f"{place}/session.pem"
        assert list(s_client(first, version, "-sess_out", file)) == [False]
        outcome.resumed += s_client(second, version, "-sess_in", file)


def s_client_reconnects(outcome: Outcome, version: str, _first: int, second: int) -> None:
    """Come back to one frontend, several times at once. TLS 1.2 only: s_client awaits no TLS 1.3 tickets."""
    first, *again = s_client(second, version, "-reconnect")
    assert not first
    assert len(again) == RECONNECTIONS
    outcome.resumed += again


def main() -> int:
    """Measure, print, and return 0 if everything was resumed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=1_000, help="full handshakes and resumptions in each row")
    parser.add_argument("--at-once", type=int, default=1, help="how many clients there are at a time")
    parser.add_argument("--s-client", type=int, default=20, help="tries in each row of `openssl s_client`")
    parser.add_argument("--puts", nargs="+", default=["background", "wait"], choices=["background", "wait"])
    parser.add_argument("--versions", nargs="+", default=list(VERSION_NAMES), choices=VERSION_NAMES)
    parser.add_argument("--markdown", action="store_true", help="print the table of results/README.md")
    options = parser.parse_args()
    table = Table(
        *("client", "puts", "version", "negotiated → resumed", "resumed"),
        *("full, ms p50 / p99", "resumed, ms p50 / p99", "hits", "misses"),
        title=None if options.markdown else f"Resumptions across processes, {options.at_once} client(s) at a time",
        box=box.MARKDOWN if options.markdown else box.HEAVY_HEAD,
    )
    attempts: dict[str, tuple[int, Callable[[Outcome, str, int, int], None]]] = {
        "Python": (options.tries, crosses),
        "s_client -sess_out, -sess_in": (options.s_client, s_client_crosses),
        "s_client -reconnect": (options.s_client // RECONNECTIONS, s_client_reconnects),
    }
    rows = [
        row
        for row in itertools.product(options.puts, options.versions, OTHER.items(), attempts)
        if row[1::2] != ("TLS 1.3", "s_client -reconnect") and attempts[row[3]][0]
    ]
    lost = 0
    with contextlib.ExitStack() as held:
        fleet = Fleet(held.enter_context(tempfile.TemporaryDirectory()))
        store = held.enter_context(running_server())
        progress = held.enter_context(Progress(transient=True))
        for puts, version, (first, second), name in progress.track(rows, description="resumptions"):
            tries, attempt = attempts[name]
            # Fresh frontends for each row: what they counted is the row's.
            with (
                fleet.frontend(first, store.target, "--puts", puts) as one,
                fleet.frontend(second, store.target, "--puts", puts) as other,
                ThreadPoolExecutor(options.at_once) as clients,
            ):
                outcome = Outcome()
                running = [clients.submit(attempt, outcome, version, one, other) for _ in range(tries)]
                for done in running:
                    done.result()
                stats = client_of(version).ask(other, b"stats")
            lost += outcome.resumed.count(False)
            table.add_row(
                *(name, puts, version, second if attempt is s_client_reconnects else f"{first} → {second}"),
                *(outcome.shown, milliseconds(outcome.full_seconds)),
                *(milliseconds(outcome.resumed_seconds), counts(stats["hits"]), counts(stats["misses"])),
            )
    Console(width=None if os.isatty(1) else 220).print(table)
    return int(lost > 0)


def counts(by_reason: dict[str, int]) -> str:
    """Return counts by reason as text."""
    return ", ".join(f"{reason} {number}" for reason, number in by_reason.items()) or "-"


if __name__ == "__main__":
    sys.exit(main())
