"""Break the store in every way under live TLS traffic and print the effects: `python tests/chaos/run.py`.

Exits 1 if a promise of docs/reliability.md is broken. Everything runs on loopback, one fault after the other.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[2] / folder) for folder in ("tests", "."))

from chaos.experiment import run
from chaos.lmdb_faults import LMDB
from chaos.redis_faults import REDIS
from chaos.traffic import BACK, RATE

if TYPE_CHECKING:
    from chaos.experiment import Outcome


FAULTS = [*LMDB, *REDIS]
_ADDRESSES = re.compile(r"127\.0\.0\.1:\d+(, 127\.0\.0\.1:\d+)*")
_REASON = re.compile(r"(resumption is off until it answers: (?:HOST: )?(?:[A-Z_]+(?=:)|\D*)).*")
FIGURES = (
    *("handshakes", "failed", "removed or taken, and resumed", "not acknowledged", "slowest, ms, before / then"),
    *("% resumed before / during / after", "% kept", "back after, s"),
)
"""The columns for TLS clients, in the order of `cells`."""


def cells(outcome: Outcome) -> list[str]:
    """Return the figures of a fault."""
    traffic = outcome.traffic
    return [
        f"{traffic.handshakes:,}",
        f"{len(traffic.failures)}",
        f"{len(traffic.wrong)} of {len(traffic.spent)}",
        f"{traffic.unacknowledged}",
        " / ".join(f"{seconds * 1e3:.0f}" for seconds in outcome.slowest),
        " / ".join(map(percent, outcome.rates)),
        percent(outcome.kept),
        "never" if outcome.back is None else f"{outcome.back:.1f}",
    ]


def percent(share: float | None) -> str:
    """Return a share in percent, rounded down: 100 means all."""
    return "-" if share is None else f"{int(share * 100)}"


def told(outcome: Outcome) -> list[str]:
    """Return the kinds of log lines of the server and the frontends, each once and without addresses."""
    server = [line for line in outcome.server_log if line not in {"starting", "listening"}]
    # Only the part of the reason that is the same in every run: the status code, or the state of the connection.
    logs = ([_ADDRESSES.sub("HOST", line) for line in log] for log in (server, outcome.frontend_log))
    return ["\n".join(dict.fromkeys(_REASON.sub(r"\1", line) for line in log)) for log in logs]


def lost(outcome: Outcome) -> str:
    """Return the possible losses."""
    if outcome.tickets:
        return "removals and uses of tickets" if outcome.fault.forgets_tickets else ""
    return outcome.fault.loses


def tables(outcomes: list[Outcome]) -> list[Table]:
    """Return a table for clients, and one for operators."""
    clients = Table(
        "fault",
        *FIGURES,
        title=f"What TLS clients saw ({RATE:g} returning handshakes/s; back: {BACK:.0%} resume again)",
    )
    operators = Table("fault", "health", "the server's log", "the frontends' logs", title="What operators saw")
    for outcome in outcomes:
        clients.add_row(outcome.fault.name, *cells(outcome))
        operators.add_row(outcome.fault.name, outcome.health, *told(outcome))
    return [clients, operators]


def markdown(outcomes: list[Outcome]) -> str:
    """Return the table of docs/reliability.md."""
    heads = ["fault", *FIGURES, "health", "the server's log", "the frontends' logs", "what can be lost"]
    rows = [
        [outcome.fault.name, *cells(outcome), outcome.health, *told(outcome), lost(outcome)] for outcome in outcomes
    ]
    table = (f"| {' | '.join(row)} |".replace("\n", "<br>") for row in (heads, ["---"] * len(heads), *rows))
    return "\n".join(table)


def main() -> int:
    """Run, print, and return 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="faults whose names have this in them")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each fault lasts")
    parser.add_argument("--deadline", type=float, default=0.05, help="of look-ups; raise it on a busy machine")
    parser.add_argument("--tickets", action="store_true", help="the clients keep the sessions, in tickets")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/reliability.md has it")
    parser.add_argument("--list", action="store_true", help="show the names of the faults and what they are")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if not options.only or any(part in fault.name for part in options.only)]
    console = Console(width=None if os.isatty(1) else 180, highlight=False)
    if options.list or not chosen:
        for fault in FAULTS:
            console.print(f"{fault.name}: {(fault.scenario.__doc__ or '').splitlines()[0]}")
        return int(not chosen)
    outcomes: list[Outcome] = []
    broken: list[str] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for number, fault in enumerate(chosen, 1):
            if hindrance := fault.hindrance():
                progress.console.print(f"{number} of {len(chosen)}:  {fault.name}  skipped: {hindrance}")
                continue
            task = progress.add_task("")

            def tell(phase: str, task: TaskID = task, name: str = f"{number} of {len(chosen)}: {fault.name}") -> None:
                progress.update(task, description=f"{name}, {phase}")

            try:
                outcome = run(fault, options.seconds, options.deadline, tell, tickets=options.tickets)
            except Exception as error:  # noqa: BLE001 - the other faults are worth seeing all the same
                traceback.print_exc()
                broken.append(f"{fault.name}: the experiment failed: {error!r}")
                continue
            finally:
                progress.remove_task(task)
            outcomes.append(outcome)
            broken += outcome.broken
            row = "  ".join([f"{number} of {len(chosen)}:", fault.name, *cells(outcome)])
            progress.console.print(row, highlight=False, soft_wrap=True)
    if options.markdown:
        print(markdown(outcomes))  # noqa: T201
    else:
        console.print(*tables(outcomes))
    for promise in broken:
        console.print(promise, style="bold red", markup=False)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
