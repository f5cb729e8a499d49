"""Offer tickets where they must not resume: `python tests/chaos/ticket_replays.py` (`make ticket-replays`).

Each stack has two frontends of a fleet with tickets. Tickets of single use are offered four times at the same moment,
twice to each frontend. Other tickets are removed or purged, and after DELAY offered to both frontends, and to one that
starts after that. Others are offered under another server name, to another namespace, and to frontends that require
another client certificate than that of the full handshake, or none, or one where there was none.

Prints a table, and exits 1 if a ticket resumed where it must not, or did not resume before that.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trustme
from rich.console import Console
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[2] / folder) for folder in ("tests", "."))

import resumed
from conformance.client import HOSTS, Client, id_of
from conformance.fleet import BUILD, VERSIONS, Fleet, Stack, fleet, table
from resumed_server.cli.diagnose.issued_session import SessionReader
from support.server import running_server
from support.waiting import until

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

AT_ONCE = 4
"""How often each ticket of single use is offered at the same moment."""
DELAY = 2.0
"""Seconds after which no frontend accepts a ticket that was removed or purged."""
TICKETS = 10
"""Tickets in each case, beside those of single use."""
CASES = ("removed", "purged", "another server name", "another namespace", "another client certificate")


@dataclass
class Result:
    """The outcome for one stack.

    Attributes:
        resumed: The number of offered tickets, by how often each one resumed.
        offered: The offers in each case in which a ticket must not resume.
        wrongly: Those of them that resumed.
        useless: Tickets that did not resume where they had to.
    """

    resumed: Counter[int] = field(default_factory=Counter)
    offered: Counter[str] = field(default_factory=Counter)
    wrongly: Counter[str] = field(default_factory=Counter)
    useless: int = 0

    @property
    def failed(self) -> bool:
        """Whether a ticket resumed where it must not, or the reverse."""
        return bool(self.wrongly or self.useless or any(times > 1 for times in self.resumed) or not self.resumed[1])


def start(f: Fleet, client: Client, count: int, **options: Any) -> list[int]:
    """Start frontends, and return their ports when each resumes the client's tickets of all."""
    ports = [f.start(tickets=True, visitor=client, **options) for _ in range(count)]
    await_tickets(client, ports, ports)
    return ports


def await_tickets(client: Client, issuers: Sequence[int], readers: Sequence[int]) -> None:
    """Wait until the readers resume tickets of the issuers."""
    for issuer in issuers:
        for reader in readers:
            until(lambda: client.visit(reader, client.visit(issuer).session).resumed)  # noqa: B023


def replay(f: Fleet, client: Client, tickets: int, result: Result) -> None:
    """Offer each ticket of single use to two frontends at once."""
    ports = start(f, client, 2, single_use=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in range(tickets):
            session = client.visit(ports[0]).session
            offers = [ports[number % 2] for number in range(AT_ONCE)]
            result.resumed[sum(pool.map(lambda port: client.visit(port, session).resumed, offers))] += 1  # noqa: B023


def revoke(f: Fleet, client: Client, result: Result) -> None:
    """Offer tickets that were removed, and that were purged."""
    ports = start(f, client, 2)
    keyring = resumed.Keyring.from_keys([base64.b64decode(key) for key in f.keys])

    def remove(sessions: list[ssl.SSLSession]) -> None:
        with contextlib.closing(f.store()) as store:
            reader = SessionReader(store, keyring, f.namespace)
            store.batch([operation for each in sessions if (operation := reader.read(id_of(each)).removal)])

    def purge(_sessions: list[ssl.SSLSession]) -> None:
        with resumed.Admin(f.target) as admin:
            admin.purge(f.namespace)

    steps: dict[str, Callable[[list[ssl.SSLSession]], None]] = {"removed": remove, "purged": purge}
    for case, end in steps.items():
        sessions = [client.visit(ports[0]).session for _ in range(TICKETS)]
        kept = client.visit(ports[0]).session
        result.useless += sum(not client.visit(ports[1], session).resumed for session in [*sessions, kept])
        end(sessions)
        time.sleep(DELAY)
        late = f.start(tickets=True)
        await_tickets(client, ports[:1], [*ports, late])
        offer(client, case, sessions, [*ports, late], result)
        result.useless += case == "removed" and not client.visit(late, kept).resumed


def cross(f: Fleet, client: Client, result: Result) -> None:
    """Offer tickets under another server name, and to another namespace."""
    ports = start(f, client, 2)
    others = start(f, client, 2, namespace=f"{f.namespace}-b")
    sessions = [client.visit(ports[0]).session for _ in range(TICKETS)]
    offer(client, "another server name", sessions, ports, result, host=HOSTS[1])
    offer(client, "another namespace", sessions, others, result)
    result.useless += sum(not client.visit(ports[1], session).resumed for session in sessions)


def change_certificates(f: Fleet, client: Client, result: Result) -> None:
    """Offer tickets of each kind of frontend to the others: they require certificates of two authorities, or none.

    In a handshake that resumes, a client shows no certificate: its server takes the one in the ticket.
    """
    case = "another client certificate"
    if f.stack.client_ca is None:
        return
    one, other = trustme.CA(), trustme.CA()
    public = start(f, client, 2)
    anonymous = [client.visit(public[0]).session for _ in range(TICKETS)]
    client.show(one.issue_cert("client@example.org"))
    private = start(f, client, 2, clients_of=one)
    offer(client, case, anonymous, private, result)
    verified = [client.visit(private[0]).session for _ in range(TICKETS)]
    offer(client, case, verified, public, result)
    result.useless += sum(not client.visit(private[1], session).resumed for session in verified)
    client.show(other.issue_cert("client@example.org"))
    offer(client, case, [*verified, *anonymous], start(f, client, 2, clients_of=other), result)


def offer(
    client: Client,
    case: str,
    sessions: Sequence[ssl.SSLSession],
    ports: Sequence[int],
    result: Result,
    *,
    host: str = HOSTS[0],
) -> None:
    """Offer sessions where none may resume."""
    for port in ports:
        for session in sessions:
            result.offered[case] += 1
            result.wrongly[case] += client.visit(port, session, host).resumed
    result.wrongly += Counter()  # drops zeros


def run(stack: Stack, target: str, tickets: int) -> Result:
    """Run all cases for one stack, in each of its versions."""
    result = Result()
    for version in stack.versions:
        client = Client(VERSIONS[version])
        with fleet(stack, target) as f:
            replay(f, client, tickets // len(stack.versions), result)
            revoke(f, client, result)
            cross(f, client, result)
            change_certificates(f, client, result)
    return result


def main() -> int:
    """Run as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--offers", type=int, default=20_000, help="offers of single-use tickets to a stack (%(default)s)"
    )
    parser.add_argument("--only", nargs="*", metavar="NAME", help="stacks")
    parser.add_argument("--no-build", action="store_true", help="what was built before")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all that was started is ended
    console = Console(width=140)
    stacks = [
        each
        for each in table()[1]
        if each.available and (with_tickets := each.in_mode("tickets")) and "single_use" not in with_tickets.cannot
    ]
    if options.only:
        stacks = [each for each in stacks if each.name in options.only]
    BUILD.mkdir(parents=True, exist_ok=True)
    for number, stack in enumerate(stacks):
        if stack.build and not options.no_build and stack.build not in [each.build for each in stacks[:number]]:
            stack.run(stack.build)
    failed = False
    shown = Table("stack", "offers at once", "tickets", "resumed once", "never", "twice", *CASES)
    for stack in stacks:
        with running_server() as store:
            result = run(stack, store.target, options.offers // AT_ONCE)
        tickets, once, never = result.resumed.total(), result.resumed[1], result.resumed[0]
        replays = (tickets * AT_ONCE, tickets, once, never, tickets - once - never)
        cases = [
            f"{result.wrongly[case]} of {result.offered[case]}" if result.offered[case] else "not tried"
            for case in CASES
        ]
        shown.add_row(stack.name, *(f"{each:,}" for each in replays), *cases)
        if result.useless:
            console.print(f"{stack.name}: {result.useless} tickets did not resume where they had to")
        failed |= result.failed
    console.print(shown)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
