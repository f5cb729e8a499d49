"""What a resumption costs by where its session comes from: `python tests/performance/mirror.py`.

In turns of shuffled order: a full handshake, a resumption from a plain dictionary in the frontend, through the mirror,
and through a call. Client and frontend share one process, so the times are of both together.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

import resumed
from resumed.openssl import Binding
from support.server import running_server
from support.tls import STACKS, VERSIONS, Client, Frontend, server_context

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.tls import Stack

PATIENCE = 20.0


class Dictionary:
    """The least that a shim can do: keeps the sessions of one frontend in a dictionary."""

    namespace, lifetime, seals_ids = "local", 7200, False

    def __init__(self) -> None:
        self.sessions: dict[bytes, bytes] = {}

    def negotiated(self, session_id: bytes, serialized: bytes, _remaining: int, *, last: bool) -> None:
        """Keep a session."""
        self.sessions[session_id] = serialized

    def look_up(
        self, session_id: bytes, decode: Callable[[bytes, int], int | None], _found: object = None
    ) -> int | None:
        """Find a session."""
        serialized = self.sessions.get(session_id)
        return None if serialized is None else decode(serialized, self.lifetime)

    def ended(self, _session_ids: object, _reason: int) -> None:
        """Keep what there is."""

    def close(self, timeout: float = 0) -> None:
        """Do nothing."""


class LocalFrontend(Frontend):
    """A frontend that resumes its own sessions from a dictionary."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.context = server_context(stack)
        self.shim = Binding(self.context, Dictionary())  # type: ignore[arg-type]  # as much of a shim as is called


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=300, help="turns for each row")
    turns = parser.parse_args().turns
    table = Table("stack", "TLS", "full, ms", "dictionary", "mirror", "call", "mirror ÷ dictionary", "mirror ÷ full")
    with running_server() as server:
        for stack in STACKS:
            for version in VERSIONS:
                table.add_row(
                    stack,
                    version.name.removeprefix("TLSv").replace("_", "."),
                    *row(server.target, stack, version, turns),
                )
    Console().print(table, "p50 and, in brackets, p25 to p75")


def row(target: str, stack: Stack, version: Any, turns: int) -> list[str]:
    """Return the figures of one stack and version."""
    keyring = resumed.Keyring.from_keys([os.urandom(32)])
    client = Client(version)
    options: dict[str, Any] = {"namespace": os.urandom(8).hex(), "deadline": 1.0}
    negotiator = Frontend("pyopenssl" if stack == "ssl" else "ssl", target, keyring, **options)
    calling = Frontend(stack, target, keyring, **options)
    mirrored = Frontend(stack, target, keyring, mirror=True, **options)
    local, plain = LocalFrontend(stack), Frontend(stack, None)
    mirror = mirrored.shim._shim._mirror
    mirror.get(b"")
    times: dict[str, list[float]] = {name: [] for name in ("full", "dictionary", "mirror", "call")}

    def visit(name: str, frontend: Frontend, session: Any) -> None:
        seen = client.visit(frontend, session)
        assert seen.reused == (session is not None)
        times[name].append(seen.seconds)

    for _ in track(range(turns), f"{stack} {version.name}"):
        before = len(mirror.sessions)
        session, own = client.visit(negotiator).session, client.visit(local).session
        end = time.monotonic() + PATIENCE
        while len(mirror.sessions) == before or not negotiator.shim.flush() or not mirror.live:
            assert time.monotonic() < end
            time.sleep(0.005)
        time.sleep(0.06)  # both tickets of TLS 1.3
        steps = [
            ("full", negotiator, None),
            ("dictionary", local, own),
            ("mirror", mirrored, session),
            ("call", calling, session),
        ]
        random.shuffle(steps)
        client.visit(plain)  # whoever comes first after a pause pays for cold caches
        for step in steps:
            visit(*step)
    assert mirrored.shim.stats.hits == {"mirror": turns}, mirrored.shim.stats
    p50 = {name: statistics.median(values) for name, values in times.items()}
    cells = []
    for values in times.values():
        low, middle, high = statistics.quantiles(values, n=4)
        cells.append(f"{middle * 1e3:.2f} ({low * 1e3:.2f} to {high * 1e3:.2f})")
    return [*cells, f"{p50['mirror'] / p50['dictionary']:.2f}", f"{p50['mirror'] / p50['full']:.2f}"]


if __name__ == "__main__":
    main()
