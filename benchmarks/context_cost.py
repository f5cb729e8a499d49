"""The cost of the context fingerprint for a handshake of `ssl`: `python benchmarks/context_cost.py`.

The figures are the server's processor time for handshakes with the fingerprint and with a constant instead, in turns,
in one thread, with sessions in a dictionary. The ratio is that of the medians, with the quartiles of the turns' ratios.
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

from benchmarks.handshake_parts import SealedIds, make_handshake
from resumed._openssl import CallbackBinding
from resumed._policy.fingerprint import FINGERPRINT_BYTES
from support.tls import CA, VERSIONS, client_context, server_context

if TYPE_CHECKING:
    from collections.abc import Callable


class ConstantContexts:
    """A substitute for Contexts: every connection has the same fingerprint."""

    def fingerprint(self, _ssl: int, _mode: int) -> bytes:
        """Return the constant."""
        return bytes(FINGERPRINT_BYTES)

    def agrees(self, _ssl: int, _mode: int, _fingerprint: bytes) -> bool:
        """Return True."""
        return True


def leave_unchanged(_context: ssl.SSLContext) -> None:
    """Set no option."""


def set_servername_callback(context: ssl.SSLContext) -> None:
    """Set a servername callback, which causes one more check of resumed connections."""
    context.sni_callback = lambda *_: None


def request_certificates(context: ssl.SSLContext) -> None:
    """Require client certificates, with the system's trust store and one more authority."""
    context.load_default_certs(ssl.Purpose.CLIENT_AUTH)
    CA.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED


KINDS: dict[str, Callable[[ssl.SSLContext], None]] = {
    "plain": leave_unchanged,
    "by name": set_servername_callback,
    "verifying": request_certificates,
}


def build_server(kind: Callable[[ssl.SSLContext], None], *, checked: bool) -> tuple[ssl.SSLContext, CallbackBinding]:
    """Return a context with callbacks, with or without the real fingerprint."""
    context, policy = server_context("ssl"), SealedIds()
    kind(context)
    untyped_policy: Any = policy
    binding = CallbackBinding(context, untyped_policy)
    if not checked:
        binding._checks.contexts = ConstantContexts()  # type: ignore[assignment]
    return context, binding


def measure(name: str, version: ssl.TLSVersion, turns: int) -> dict[str, list[str]]:
    """Return the microseconds without the fingerprint and the ratio, of full and of resumed handshakes."""
    client = client_context(version)
    CA.issue_cert("client.example").configure_cert(client)
    servers = {checked: build_server(KINDS[name], checked=checked) for checked in (True, False)}
    sessions = {
        checked: make_handshake(context, client, None, time.thread_time)[1].session
        for checked, (context, _) in servers.items()
    }
    seconds: dict[tuple[bool, str], list[float]] = {
        (checked, which): [] for checked in servers for which in ("full", "resumed")
    }
    for _ in track(range(turns), description=f"{name}, {version.name}", transient=True):
        for checked in random.sample(list(servers), len(servers)):
            context = servers[checked][0]
            seconds[checked, "full"].append(make_handshake(context, client, None, time.thread_time)[0])
            resumed_seconds, resumed_client = make_handshake(context, client, sessions[checked], time.thread_time)
            assert resumed_client.session_reused
            seconds[checked, "resumed"].append(resumed_seconds)
    rows = {}
    for which in ("full", "resumed"):
        with_fingerprint, without = seconds[True, which], seconds[False, which]
        low, _, high = statistics.quantiles([a / b for a, b in zip(with_fingerprint, without, strict=True)], n=4)
        ratio = statistics.median(with_fingerprint) / statistics.median(without)
        rows[which] = [f"{statistics.median(without) * 1e6:.0f}", f"{ratio:.3f} ({low:.2f} to {high:.2f})"]
    return rows


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2_000, help="of each kind of handshake (default %(default)s)")
    turns = parser.parse_args().turns
    table = Table("context", "version", "handshake", "without, us", "with : without")

    for name in KINDS:
        for version in VERSIONS:
            for which, figures in measure(name, version, turns).items():
                table.add_row(name, version.name, which, *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
