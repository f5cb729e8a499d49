"""Rotate ticket secrets under TLS traffic, and search memory: `python tests/chaos/ticket_rotation.py`.

There are a store, and two frontends each of `ssl`, pyOpenSSL, nginx with libresumed-preload, Go and rustls, as far as
they are built. Clients with TLS 1.2 and 1.3 negotiate with one frontend and return to any that reads its tickets, with
tickets of every age. An observer with the keyring holds every secret of the fleet. In the end the tool searches the
memory of the frontends and of the store for secrets that have ended, and for the keys derived of them; secrets that are
in use must be found, or the search is wrong.

Exits 1 if a handshake failed, a ticket did not resume, or an ended secret was found in a process that erases them.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[2] / folder) for folder in ("tests", "."))

import resumed
from benchmarks.bench.programs import STACKS, TICKETS, Environment
from benchmarks.bench.rig import Rig
from resumed._policy.ticket_secrets import TicketSecrets
from resumed_server.cli.tls_client import Client, HandshakeFailed
from support.server import running_server
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from OpenSSL import SSL

    from benchmarks.bench.programs import Server, Stack
    from resumed._crypto.ticket_secret import TicketSecret

OPENSSL = ("ssl", "pyOpenSSL", "nginx")
"""Stacks that read each other's tickets; the others read those of their own stack."""
NAMES = (*OPENSSL, "Go", "rustls")
GARBAGE_COLLECTED = ("ssl", "pyOpenSSL", "Go")
"""Stacks whose language cannot overwrite all copies of a secret: ended ones are counted, and are no failure."""
VERSIONS = ("1.2", "1.3")
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""All stacks answer it: those that are no web servers answer each of its lines."""
THREADS = 4
NEGOTIATED = 0.25
"""Share of the handshakes that negotiate; the others offer a ticket."""
SEARCHED = 48
"""Maximum number of ended secrets that are searched for."""
ERASED_WITHIN = 3.0
"""Seconds from the end of a secret to its erasure."""
_CHUNK = 1 << 20


@dataclass
class Outcome:
    """The counts and failures of a run."""

    handshakes: int = 0
    offered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    not_resumed: Counter[str] = field(default_factory=Counter)

    @classmethod
    def total(cls, outcomes: Iterable[Outcome]) -> Outcome:
        """Return the sums."""
        total = cls()
        for each in outcomes:
            total.handshakes += each.handshakes
            total.offered += each.offered
            total.failed += each.failed
            total.not_resumed += each.not_resumed
        return total


class Ticket(NamedTuple):
    """A ticket that a client may offer until it ends."""

    ends: float
    stack: str
    version: str
    session: SSL.Session


class Observer:
    """Follows the agreement, and holds every secret that the fleet has had."""

    def __init__(self, target: str, namespace: str, keyring: Path, rotation: int, lifetime: int) -> None:
        store = resumed.StoreClient(target, namespace=namespace, deadline=5.0)
        self._secrets = TicketSecrets(store, resumed.Keyring.load(keyring), rotation=rotation, lifetime=lifetime)
        self.seen: dict[bytes, TicketSecret] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop following."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.2):
            self._secrets.step()
            self.seen |= {secret.name: secret for secret in self._secrets.held(time.time())}


class Traffic:
    """The clients of one thread: pyOpenSSL offers a session only with the context that received it."""

    def __init__(self, servers: dict[str, list[Server]], stacks: Sequence[Stack], lifetime: int) -> None:
        self._servers, self._lifetime = servers, lifetime
        self._waiting: dict[str, list[Ticket]] = {name: [] for name in servers}
        self._clients = {version: Client("localhost", version, REQUEST) for version in VERSIONS}
        self.outcome = Outcome()

    def visit(self) -> None:
        """Negotiate a session, or offer a ticket of any age to a frontend that reads it."""
        outcome = self.outcome
        ticket = self._ticket(random.choice(list(self._servers)))
        stack = ticket.stack if ticket else random.choice(list(self._servers))
        readers = [name for name in self._servers if name in OPENSSL] if stack in OPENSSL else [stack]
        name = random.choice(readers)
        version = ticket.version if ticket else random.choice(VERSIONS)
        server = random.choice(self._servers[name])
        try:
            visit = self._clients[version].visit(server.endpoint, ticket.session if ticket else None)
        except HandshakeFailed as error:
            outcome.failed[f"{name}, TLS {version}: {error}"] += 1
            return
        outcome.handshakes += 1
        if ticket:
            outcome.offered += 1
            if not visit.resumed:
                outcome.not_resumed[f"{ticket.stack} to {name}, TLS {version}"] += 1
        # A resumed session ends with the first one; TLS 1.2 keeps its ticket unless the server renews it.
        ends = ticket.ends if ticket and visit.resumed else time.time() + self._lifetime - 2
        if session := visit.session or (ticket.session if ticket else None):
            self._waiting[name].append(Ticket(ends, name, version, session))

    def _ticket(self, stack: str) -> Ticket | None:
        """Return a ticket of a stack that has not ended, or None for a full handshake."""
        now = time.time()
        waiting = self._waiting[stack] = [each for each in self._waiting[stack] if each.ends > now]
        if not waiting or random.random() < NEGOTIATED:
            return None
        return waiting.pop(random.randrange(len(waiting)))


def run(seconds: float, per_minute: float, rotation: int, lifetime: int, console: Console) -> int:
    """Run the fleet; print what happened, and return the exit status."""
    stacks = [stack for stack in STACKS if stack.name in NAMES and TICKETS in stack.kinds and not stack.find_obstacle()]
    absent = sorted({*NAMES} - {stack.name for stack in stacks})
    if absent:
        console.print(f"not built, and left out: {', '.join(absent)} (make bench-frontends)")
    with Rig() as rig, running_server() as store, contextlib.ExitStack() as held:
        keyring = rig.keyring("P-256")
        around = Environment(
            rig.certificate("P-256"), keyring, rig.directory, store.target, "", namespace="fleet",
            rotation=rotation, lifetime=lifetime,
        )  # fmt: skip
        servers = {stack.name: [held.enter_context(stack.run(TICKETS, around)) for _ in range(2)] for stack in stacks}
        observer = Observer(store.target, "fleet", keyring, rotation, lifetime)
        held.callback(observer.close)
        for stack in stacks:
            for server in servers[stack.name]:
                for version in VERSIONS:
                    client = Client("localhost", version, stack.request)
                    until(lambda: client.visit(server.endpoint, client.visit(server.endpoint).session).resumed)  # noqa: B023
        traffic = [Traffic(servers, stacks, lifetime) for _ in range(THREADS)]
        outcome = _drive(traffic, seconds, per_minute, console)
        time.sleep(ERASED_WITHIN)
        found = _search(servers, store.process.pid, observer, time.time() - ERASED_WITHIN)
    return _report(outcome, found, console)


def _drive(traffic: Sequence[Traffic], seconds: float, per_minute: float, console: Console) -> Outcome:
    end, pause = time.monotonic() + seconds, THREADS * 60 / per_minute

    def keep_visiting(clients: Traffic) -> None:
        due = time.monotonic() + random.random() * pause
        while due < end:
            time.sleep(max(0.0, due - time.monotonic()))
            clients.visit()
            due = max(due + pause, time.monotonic() - 5)

    threads = [threading.Thread(target=keep_visiting, args=(clients,)) for clients in traffic]
    for thread in threads:
        thread.start()
    with console.status("") as status:
        while any(thread.is_alive() for thread in threads):
            outcome, left = Outcome.total(each.outcome for each in traffic), max(0.0, end - time.monotonic())
            status.update(
                f"{left:.0f} s left: {outcome.handshakes} handshakes, {outcome.failed.total()} failed, "
                f"{outcome.not_resumed.total()} of {outcome.offered} tickets not resumed"
            )
            time.sleep(0.5)
    return Outcome.total(each.outcome for each in traffic)


def _search(
    servers: dict[str, list[Server]], store: int, observer: Observer, ended_by: float
) -> dict[str, tuple[int, int, int]]:
    """Search processes; return by stack the number of ended secrets, of those found, and of held ones found."""
    ended = [each for each in observer.seen.values() if each.not_after <= ended_by]
    ended = random.sample(ended, min(len(ended), SEARCHED))  # each takes a pass through all memory
    held = [each for each in observer.seen.values() if each.not_after > time.time() + ERASED_WITHIN]
    found = {}
    processes = {name: [each.pid for each in group] for name, group in servers.items()} | {"store": [store]}
    # Read at once, and then searched: a search takes longer than a secret lives.
    memories = {name: [_Memory(each) for pid in pids for each in _family(pid)] for name, pids in processes.items()}
    for name, memory in memories.items():
        leaked = sum(any(part.has(_needles(secret)) for part in memory) for secret in ended)
        present = sum(any(part.has(_needles(secret)) for part in memory) for secret in held)
        found[name] = len(ended), leaked, present
    return found


def _needles(secret: TicketSecret) -> list[bytes]:
    openssl = secret.openssl[16:]
    return [bytes(secret.secret), openssl[:32], openssl[32:], bytes(secret.aead)]


class _Memory:
    """The writable memory of a process."""

    def __init__(self, pid: int) -> None:
        self._parts = list(_writable(pid))

    def has(self, needles: Sequence[bytes]) -> bool:
        return any(needle in part for part in self._parts for needle in needles)


def _writable(pid: int) -> Iterator[bytes]:
    with contextlib.suppress(OSError), Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            span, permissions, *_ = line.split()
            start, end = (int(each, 16) for each in span.split("-"))
            if not permissions.startswith("rw"):
                continue
            with contextlib.suppress(OSError, OverflowError):  # guard pages and the like
                memory.seek(start)
                parts = []
                while start < end and (part := memory.read(min(_CHUNK, end - start))):
                    parts.append(part)
                    start += len(part)
                yield b"".join(parts)


def _family(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
            yield from _family(int(child))


def _report(outcome: Outcome, found: dict[str, tuple[int, int, int]], console: Console) -> int:
    console.print(f"{outcome.handshakes} handshakes, {outcome.failed.total()} failed")
    console.print(f"{outcome.offered} tickets offered, {outcome.offered - outcome.not_resumed.total()} resumed")
    for what, count in (outcome.failed + outcome.not_resumed).most_common(20):
        console.print(f"  {count} {what}")
    table = Table("process", "ended secrets", "of these in memory", "present secrets in memory")
    for name, counts in found.items():
        table.add_row(name, *map(str, counts))
    console.print(table)
    kept = [name for name, (_, leaked, _) in found.items() if leaked and name not in GARBAGE_COLLECTED]
    unseen = [name for name, (_, _, present) in found.items() if not present and name != "store"]
    if kept:
        console.print(f"[red]ended secrets are in the memory of {', '.join(kept)}")
    if unseen:
        console.print(f"[red]the search found no present secret in {', '.join(unseen)}: it is wrong")
    return int(bool(outcome.failed or outcome.not_resumed or kept or unseen or found["store"][2]))


def main() -> int:
    """Run as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="duration of the traffic (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1000.0, help="handshakes a minute (default: %(default)s)")
    parser.add_argument("--rotation", type=int, default=2, help="seconds of an epoch (default: %(default)s)")
    parser.add_argument("--lifetime", type=int, default=20, help="seconds that a ticket lives (default: %(default)s)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all that was started is ended
    return run(options.seconds, options.rate, options.rotation, options.lifetime, Console())


if __name__ == "__main__":
    sys.exit(main())
