"""Resumptions in a namespace that needs more operations than its limit: `python benchmarks/scarcity.py`.

Clients return to one of two frontends at a steady rate. A TLS 1.2 visit that resumes makes one call at the store (a
Get), a TLS 1.3 visit two (a Get, and the Put of the next session), so TLS 1.3 clients return half as often.
"""

from __future__ import annotations

import argparse
import random
import ssl
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.fleet import Client
from chaos.rig import Place, Rig

if TYPE_CHECKING:
    from benchmarks.fleet import Handshake

CLIENTS = 100
NEED = 80
"""Operations per second that the visits need to resume always."""
OPERATIONS = {ssl.TLSVersion.TLSv1_2: 1, ssl.TLSVersion.TLSv1_3: 2}


def measure_share(limit: int, version: ssl.TLSVersion, seconds: float) -> tuple[float, str]:
    """Return the share of visits that resume in the second half of `seconds`, and the log of the frontends."""
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(8) as pool:
        place = Place(Path(directory), 0.05)
        with Rig(place, "lmdb:", *(("--namespace-ops-per-second", f"{limit}") if limit else ())) as rig:
            clients = [Client(version) for _ in range(CLIENTS)]
            last: list[Handshake | None] = [None] * CLIENTS

            def visit(number: int) -> bool:
                previous = last[number]
                current = last[number] = clients[number].visit(random.choice(rig.shared), previous and previous.session)
                return current.resumed

            visits = []
            started, pause = time.monotonic(), OPERATIONS[version] / NEED
            for number in range(round(seconds / pause)):
                time.sleep(max(0.0, started + number * pause - time.monotonic()))
                visits.append(pool.submit(visit, number % CLIENTS))
            outcomes = [each.result() for each in visits]
            log = "; ".join(dict.fromkeys(rig.frontend_log()))
    half = outcomes[len(outcomes) // 2 :]
    return sum(half) / len(half), log


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--limits", type=int, nargs="*", default=[0, 72, 60, 40])
    options = parser.parse_args()
    table = Table("limit", *(version.name for version in OPERATIONS), "the frontends' log", box=box.MARKDOWN)
    for limit in options.limits:
        shares = [measure_share(limit, version, options.seconds) for version in OPERATIONS]
        logs = "; ".join(dict.fromkeys(log for _, log in shares if log))
        table.add_row(f"{limit or 'none'}", *(f"{share:.0%}" for share, _ in shares), logs)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
