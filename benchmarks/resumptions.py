"""Resumptions across two frontends in processes of their own: `python benchmarks/resumptions.py`.

Each try is one full handshake on the first frontend and at once a resumption on the second, which is of the other TLS
stack. All connections are cut without close_notify. Then `openssl s_client` does the same, with a new process for each
connection, and with -reconnect.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.fleet import OTHER_STACK, PATIENCE, VERSION_NAMES, Client, Fleet
from benchmarks.measuring import build_table, new_console, percentiles
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RECONNECTIONS = 5
"""Number of reconnections of `openssl s_client -reconnect`."""


class Outcome:
    """Whether each try resumed, and the seconds that full and resumed handshakes took."""

    def __init__(self) -> None:
        self.resumed: list[bool] = []
        self.full_seconds: list[float] = []
        self.resumed_seconds: list[float] = []

    @property
    def summary(self) -> str:
        """The number of tries that resumed, as text."""
        tries = len(self.resumed)
        return f"{sum(self.resumed):,} of {tries:,} ({sum(self.resumed) / tries:.2%})"


def resume_across(outcome: Outcome, version: str, first: int, second: int) -> None:
    """Negotiate a session on one frontend and offer it to the other at once."""
    client = cached_client(version)
    full = client.visit(first)
    again = client.visit(second, full.session)
    outcome.resumed.append(again.resumed)
    outcome.full_seconds.append(full.seconds)
    if again.resumed:
        outcome.resumed_seconds.append(again.seconds)


@cache
def cached_client(version: str) -> Client:
    """Return the client for `version`."""
    return Client(VERSION_NAMES[version])


def run_s_client(port: int, version: str, *options: str) -> Iterator[bool]:
    """Connect with `openssl s_client`, and yield whether each of its connections resumed."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "localhost", "-ign_eof"]
    command += ["-" + version.lower().replace(" ", "").replace(".", "_"), *options]
    # The frontend answers the first line, so tickets arrive; after the second one it cuts the connection.
    output = subprocess.run(
        command, input="who\nbye\n", capture_output=True, text=True, timeout=PATIENCE, check=False
    ).stdout
    for line in output.splitlines():
        if line.startswith(("New, TLSv1", "Reused, TLSv1")):
            yield line.startswith("Reused")


def resume_across_with_s_client(outcome: Outcome, version: str, first: int, second: int) -> None:
    """Negotiate a session on one frontend and offer it to the other, from two processes."""
    with tempfile.TemporaryDirectory() as place:
        file = f"{place}/session.pem"
        assert list(run_s_client(first, version, "-sess_out", file)) == [False]
        outcome.resumed += run_s_client(second, version, "-sess_in", file)


def reconnect_with_s_client(outcome: Outcome, version: str, _first: int, second: int) -> None:
    """Reconnect to one frontend several times at once, in TLS 1.2: s_client does not wait for TLS 1.3 tickets."""
    first, *again = run_s_client(second, version, "-reconnect")
    assert not first
    assert len(again) == RECONNECTIONS
    outcome.resumed += again


def main() -> int:
    """Measure, print, and return 0 if every offered session resumed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=1_000, help="full handshakes and resumptions in each row")
    parser.add_argument("--at-once", type=int, default=1, help="number of concurrent clients")
    parser.add_argument("--s-client", type=int, default=20, help="tries in each row of `openssl s_client`")
    parser.add_argument("--puts", nargs="+", default=["background", "wait"], choices=["background", "wait"])
    parser.add_argument("--versions", nargs="+", default=list(VERSION_NAMES), choices=VERSION_NAMES)
    parser.add_argument("--markdown", action="store_true", help="print the table of results/README.md")
    options = parser.parse_args()
    table = build_table(
        *("client", "puts", "version", "negotiated → resumed", "resumed"),
        *("full, ms p50 / p99", "resumed, ms p50 / p99", "hits", "misses"),
        title=f"Resumptions across processes, {options.at_once} client(s) at a time",
        markdown=options.markdown,
    )
    attempts: dict[str, tuple[int, Callable[[Outcome, str, int, int], None]]] = {
        "Python": (options.tries, resume_across),
        "s_client -sess_out, -sess_in": (options.s_client, resume_across_with_s_client),
        "s_client -reconnect": (options.s_client // RECONNECTIONS, reconnect_with_s_client),
    }
    rows = [
        row
        for row in itertools.product(options.puts, options.versions, OTHER_STACK.items(), attempts)
        if row[1::2] != ("TLS 1.3", "s_client -reconnect") and attempts[row[3]][0]
    ]
    lost = 0
    with contextlib.ExitStack() as exit_stack:
        fleet = Fleet(exit_stack.enter_context(tempfile.TemporaryDirectory()))
        store = exit_stack.enter_context(running_server())
        progress = exit_stack.enter_context(Progress(transient=True))
        for puts, version, (first, second), name in progress.track(rows, description="resumptions"):
            tries, attempt = attempts[name]
            # Each row has new frontends, so their counters are those of the row.
            with (
                fleet.frontend(first, store.target, "--puts", puts) as first_port,
                fleet.frontend(second, store.target, "--puts", puts) as second_port,
                ThreadPoolExecutor(options.at_once) as clients,
            ):
                outcome = Outcome()
                running = [clients.submit(attempt, outcome, version, first_port, second_port) for _ in range(tries)]
                for done in running:
                    done.result()
                stats = cached_client(version).ask(second_port, b"stats")
            lost += outcome.resumed.count(False)
            table.add_row(
                *(name, puts, version, second if attempt is reconnect_with_s_client else f"{first} → {second}"),
                *(outcome.summary, percentiles(outcome.full_seconds)),
                *(percentiles(outcome.resumed_seconds), format_counts(stats["hits"]), format_counts(stats["misses"])),
            )
    new_console().print(table)
    return int(lost > 0)


def format_counts(by_reason: dict[str, int]) -> str:
    """Return counts by reason as text."""
    return ", ".join(f"{reason} {number}" for reason, number in by_reason.items()) or "-"


if __name__ == "__main__":
    sys.exit(main())
