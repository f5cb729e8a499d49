"""What the context fingerprint costs a handshake of `ssl`: `python benchmarks/context_cost.py`.

The server's processor time of handshakes with the fingerprint and with a constant in its place, in turns, in one
thread; sessions are kept in a dictionary. The ratio is that of the medians, with the quartiles of the ratios of turns.
"""

from __future__ import annotations

import argparse
import random
import ssl
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.handshake_parts import SealedIds, handshake
from resumed._openssl import CallbackBinding
from resumed._policy.fingerprint import FINGERPRINT_BYTES
from support.tls import CA, VERSIONS, client_context, server_context

if TYPE_CHECKING:
    from collections.abc import Callable


class Constant:
    """Stands in for Contexts: every connection has the same fingerprint."""

    def fingerprint(self, _ssl: int, _mode: int) -> bytes:
        """Return it."""
        return bytes(FINGERPRINT_BYTES)

    def agrees(self, _ssl: int, _mode: int, _fingerprint: bytes) -> bool:
        """Agree."""
        return True


def plain(_context: ssl.SSLContext) -> None:
    """Set nothing."""


def by_name(context: ssl.SSLContext) -> None:
    """Set a servername callback, so that resumed connections are checked once more."""
    context.sni_callback = lambda *_: None


def verifying(context: ssl.SSLContext) -> None:
    """Ask for certificates, with the system's trust store and one authority more."""
    context.load_default_certs(ssl.Purpose.CLIENT_AUTH)
    CA.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED


KINDS: tuple[Callable[[ssl.SSLContext], None], ...] = (plain, by_name, verifying)


def server(kind: Callable[[ssl.SSLContext], None], *, judged: bool) -> tuple[ssl.SSLContext, CallbackBinding]:
    """Return a context with callbacks."""
    context, kept = server_context("ssl"), SealedIds()
    kind(context)
    untyped: Any = kept
    binding = CallbackBinding(context, untyped)
    if not judged:
        binding._checks._contexts = Constant()  # type: ignore[assignment]
    return context, binding


def measure(kind: Callable[[ssl.SSLContext], None], version: ssl.TLSVersion, turns: int) -> dict[str, list[str]]:
    """Return the microseconds without, and the ratio, of full and resumed handshakes."""
    client = client_context(version)
    CA.issue_cert("client.example").configure_cert(client)
    servers = {judged: server(kind, judged=judged) for judged in (True, False)}
    sessions = {
        judged: handshake(context, client, None, time.thread_time)[1].session
        for judged, (context, _) in servers.items()
    }
    seconds: dict[tuple[bool, str], list[float]] = {
        (judged, which): [] for judged in servers for which in ("full", "resumed")
    }
    for _ in track(range(turns), description=f"{kind.__name__}, {version.name}", transient=True):
        for judged in random.sample(list(servers), len(servers)):
            context = servers[judged][0]
            seconds[judged, "full"].append(handshake(context, client, None, time.thread_time)[0])
            took, resumed = handshake(context, client, sessions[judged], time.thread_time)
            assert resumed.session_reused
            seconds[judged, "resumed"].append(took)
    rows = {}
    for which in ("full", "resumed"):
        one, other = seconds[True, which], seconds[False, which]
        low, _, high = statistics.quantiles([a / b for a, b in zip(one, other, strict=True)], n=4)
        ratio = statistics.median(one) / statistics.median(other)
        rows[which] = [f"{statistics.median(other) * 1e6:.0f}", f"{ratio:.3f} ({low:.2f} to {high:.2f})"]
    return rows


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2_000, help="of each kind of handshake (default %(default)s)")
    turns = parser.parse_args().turns
    table = Table("context", "version", "handshake", "without, us", "with : without")
    for kind in KINDS:
        for version in VERSIONS:
            for which, figures in measure(kind, version, turns).items():
                table.add_row(kind.__name__.replace("_", " "), version.name, which, *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
