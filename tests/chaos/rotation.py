"""Rotate certificates, grants and keyrings under live TLS traffic: `python tests/chaos/rotation.py`.

There are a store with mutual TLS and grants; frontends of both stacks, one with a mirror, each a process with separate
files; clients with TLS 1.2 and 1.3 that negotiate with one frontend and return to any, with sessions of every age; and
a program that makes calls of every kind. During the traffic, these rotations are repeated:

- certificates: trust a new authority, change the store's certificate, then the frontends', remove the old authority;
- grants: written in another form, with grants of other identities added and removed;
- the keyring: add, wait, promote, wait, retire, as in docs/keyrings.md, file by file.

Exits 1 if a handshake or a call failed, or a session did not resume.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[2] / folder) for folder in ("tests", "."))

import resumed
from benchmarks.fleet import Client
from resumed_server.cli.keyring.commands import promote, retire
from resumed_server.cli.keyring.keygen import keygen
from resumed_server.errors import UserError
from support.frontend import frontend_command
from support.mtls import Authority, Files, grant
from support.server import running_server
from support.tls import CERTIFICATE, VERSIONS

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

SHOP, PAY = "spiffe://example.org/frontends/shop", "spiffe://example.org/frontends/pay"
EVERYTHING = ["put", "get", "take", "remove", "watch"]
FRONTENDS = (("ssl",), ("pyopenssl",), ("ssl", "--mirror"))
THREADS = 8
NEGOTIATED = 0.25
"""Share of the handshakes that negotiate; the others offer a session."""
TICKETS = 2_000
"""Maximum number of sessions that wait to be offered."""
_PATIENCE = 30.0
_END_SECONDS = 1.0
"""Maximum time, in seconds, by which a session ends before its lifetime: its end is a whole second."""
_BETWEEN_FILES = 0.5
_READ_SECONDS = 1.5
"""Maximum time, in seconds, until a frontend uses a changed file: it checks once a second."""


@dataclass
class Settings:
    """The duration, the rates, and the age of sessions; see --help."""

    seconds: float = 180.0
    rate: float = 1_000.0
    calls: float = 10.0
    lifetime: int = 20
    deadline: float = 0.05


@dataclass
class Outcome:
    """The counts and failures of a run."""

    handshakes: int = 0
    offered: int = 0
    calls: int = 0
    failed_handshakes: list[str] = field(default_factory=list)
    not_resumed: list[str] = field(default_factory=list)
    failed_calls: list[str] = field(default_factory=list)
    rotations: dict[str, int] = field(default_factory=dict)
    counted: list[dict[str, Any]] = field(default_factory=list)
    """The statistics of the frontends."""
    seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        """All failures, and rotations that did not happen."""
        never = [f"{name}: never rotated" for name, count in self.rotations.items() if not count]
        return [*self.failed_handshakes, *self.failed_calls, *self.not_resumed, *never]


class Ticket(NamedTuple):
    """A session that a client may offer until it ends."""

    negotiated: float
    client: Client
    session: ssl.SSLSession | None


class Site:
    """The processes, their files, and the rotations.

    Args:
        directory: The directory of the files.
        settings: The settings of the frontends.
        held: Ends the processes.
        rest: Waits for seconds.
    """

    def __init__(
        self, directory: Path, settings: Settings, held: contextlib.ExitStack, rest: Callable[[float], object]
    ) -> None:
        self._settings, self._rest = settings, rest
        self._authority = Authority()
        self._number = itertools.count(1)
        names = ["store", "program", *map(str, range(len(FRONTENDS)))]
        for name in names:
            (directory / name).mkdir()
        self._store, *self._users = (Files(directory / name) for name in names)
        self._store.write(self._authority.server(), self._authority.pem, _grants(0))
        self._keyring = str(directory / "fleet.keys")
        keygen(self._keyring)
        for files in self._users:
            files.write(self._authority.issue(SHOP), self._authority.pem)
            shutil.copy2(self._keyring, files.directory / "fleet.keys")
        certificate = directory / "frontend.pem"
        certificate.write_bytes(CERTIFICATE.private_key_and_cert_chain_pem.bytes())
        options = (*self._store.options, "--max-connection-age", "2s", "--storage", f"lmdb://{directory}/database")
        self._server = held.enter_context(running_server(*options))
        # By name, which is in the store's certificate.
        self._target = f"localhost:{self._server.target.rpartition(':')[2]}"
        self.ports = []
        for (stack, *more), files in zip(FRONTENDS, self._users[1:], strict=True):
            command = frontend_command(stack, certificate, *more, "--target", self._target, "--namespace", "shop")
            command += ["--lifetime", str(settings.lifetime), "--deadline", str(settings.deadline)]
            command += ["--keyring", str(files.directory / "fleet.keys")]
            command += [text for name, path in _tls(files).items() for text in (f"--{name}", str(path))]
            process = held.enter_context(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
            )
            held.callback(process.terminate)
            assert process.stdout
            self.ports.append(int(json.loads(process.stdout.readline())["port"]))

    def program(self) -> resumed.StoreClient:
        """Return a client of the store with separate certificate files, which it reloads."""
        credentials = resumed.Credentials(**_tls(self._users[0]))
        return resumed.StoreClient(self._target, namespace="shop", deadline=5.0, credentials=credentials)

    def certificates(self) -> None:
        """Change the authority and all certificates."""
        old, new = self._authority.pem, Authority()
        with self._taken("TLS"):
            self._store.write(client_ca=old + new.pem)
        self._each(lambda files: files.write(client_ca=old + new.pem))
        with self._taken("TLS"):
            self._store.write(new.server())
        self._each(lambda files: files.write(new.issue(SHOP)))
        with self._taken("TLS"):
            self._store.write(client_ca=new.pem)
        self._each(lambda files: files.write(client_ca=new.pem))
        self._authority = new

    def grants(self) -> None:
        """Write the same grants of the frontends in another form, with or without grants of other identities."""
        with self._taken("grants"):
            self._store.write(grants=_grants(next(self._number)))

    def keys(self) -> None:
        """Add, wait, promote, wait, retire; every file is changed at another time."""
        wait, lifetime = f"{_BETWEEN_FILES * len(self._users) + _READ_SECONDS}s", f"{self._settings.lifetime}s"
        keygen(self._keyring, append=True)
        self._each(self._bring_keys)
        self._when_allowed(lambda: promote(self._keyring, None, wait=wait, force=False))
        self._each(self._bring_keys)
        self._when_allowed(lambda: retire(self._keyring, None, lifetime=lifetime, wait=wait, force=False))
        self._each(self._bring_keys)

    def _bring_keys(self, files: Files) -> None:
        new = files.directory / "new.keys"
        shutil.copy2(self._keyring, new)
        new.replace(files.directory / "fleet.keys")

    def _each(self, change: Callable[[Files], object]) -> None:
        """Change the files of one process after the other, and wait until all have read them."""
        for files in self._users:
            change(files)
            self._rest(_BETWEEN_FILES)
        self._rest(_READ_SECONDS)

    @contextlib.contextmanager
    def _taken(self, files: str) -> Iterator[None]:
        """Wait until the store uses changed files."""

        def times() -> int:
            return sum(line["files"] == files for line in self._server.log_lines("reloaded"))

        before, end = times(), time.monotonic() + _PATIENCE
        yield
        while times() == before:
            assert time.monotonic() < end, f"the store does not take its {files}"
            self._rest(0.1)

    def _when_allowed(self, step: Callable[[], object]) -> None:
        while True:
            with contextlib.suppress(UserError):
                step()
                return
            self._rest(0.2)


class Traffic:
    """Run the clients, and the program that makes calls, until `stopping` is set."""

    def __init__(self, site: Site, settings: Settings, outcome: Outcome, stopping: threading.Event) -> None:
        self._site, self._settings, self._outcome, self._stopping = site, settings, outcome, stopping
        self._clients = [Client(version) for version in VERSIONS]
        self._lock = threading.Lock()
        self._tickets: deque[Ticket] = deque(maxlen=TICKETS)

    def visit(self) -> None:
        """Make this thread's share of the handshakes."""
        for _ in self._paced(self._settings.rate / 60 / THREADS):
            ticket = None if random.random() < NEGOTIATED else self._drawn()
            try:
                self._offer(ticket) if ticket else self._negotiate()
            except OSError as error:
                self._outcome.failed_handshakes.append(f"a handshake failed: {error!r}")

    def call(self) -> None:
        """Make calls of all kinds except Watch, which the mirror has open."""
        with contextlib.closing(self._site.program()) as store:
            for _ in self._paced(self._settings.calls):
                key = os.urandom(32)
                try:
                    store.put(key, b"value", 60.0)
                    assert store.get(key), "a session was lost"
                    assert store.take(key), "a session was lost"
                    store.remove(key)
                    put, got = store.batch([resumed.Put(key[:16], b"value", 60.0), resumed.Get(key[:16])])
                    assert isinstance(put, float), put
                    assert isinstance(got, resumed.StoredSession), got
                except (resumed.ResumedError, AssertionError) as error:
                    self._outcome.failed_calls.append(f"a call failed: {error}")
                self._outcome.calls += 5

    def _negotiate(self) -> None:
        client, now = random.choice(self._clients), time.time()
        session = client.visit(random.choice(self._site.ports)).session
        with self._lock:
            self._outcome.handshakes += 1
            self._tickets.append(Ticket(now, client, session))

    def _offer(self, ticket: Ticket) -> None:
        place = random.randrange(len(self._site.ports))
        visit = ticket.client.visit(self._site.ports[place], ticket.session)
        age = time.time() - ticket.negotiated
        with self._lock:
            self._outcome.handshakes += 1
            if age > self._settings.lifetime - _END_SECONDS:  # it may have ended by now
                return
            self._outcome.offered += 1
            if visit.resumed:
                self._tickets.append(ticket._replace(session=visit.session))
            else:
                name = " ".join(FRONTENDS[place])
                self._outcome.not_resumed.append(f"a session did not resume: {age:.1f} s old, at {name}")

    def _drawn(self) -> Ticket | None:
        """Return a session of any age, which can be returned again later."""
        with self._lock:
            oldest = time.time() - self._settings.lifetime + _END_SECONDS
            while self._tickets and self._tickets[0].negotiated < oldest:
                self._tickets.popleft()
            ticket = random.choice(self._tickets) if self._tickets else None
        return ticket if ticket and ticket.negotiated > oldest else None

    def _paced(self, rate: float) -> Iterator[None]:
        due = time.monotonic() + random.random() / rate
        while not self._stopping.wait(max(0.0, due - time.monotonic())):
            due += 1 / rate
            yield


def run(settings: Settings) -> Outcome:
    """Run each rotation at least once under traffic, for at least `settings.seconds`, and return the result."""
    outcome, quiet, over = Outcome(), threading.Event(), threading.Event()
    with contextlib.ExitStack() as held:
        directory = held.enter_context(tempfile.TemporaryDirectory(prefix="resumed-rotation-"))
        site = Site(Path(directory), settings, held, over.wait)
        traffic = Traffic(site, settings, outcome, quiet)

        def rotate(name: str, step: Callable[[], None]) -> None:
            while True:
                step()
                if over.is_set():
                    return
                outcome.rotations[name] += 1

        rotators = {"certificates": site.certificates, "grants": site.grants, "keyrings": site.keys}
        outcome.rotations = dict.fromkeys(rotators, 0)
        started = time.monotonic()
        with ThreadPoolExecutor(THREADS + 1 + len(rotators)) as pool:
            work = [pool.submit(traffic.visit) for _ in range(THREADS)] + [pool.submit(traffic.call)]
            changes = [pool.submit(rotate, *each) for each in rotators.items()]
            try:
                end = started + settings.seconds
                while time.monotonic() < end or not all(outcome.rotations.values()):
                    over.wait(0.2)
                    if broken := next((each for each in [*work, *changes] if each.done()), None):
                        broken.result()
            finally:
                # In this order: no rotation may be cut short during traffic.
                quiet.set()
                wait(work, _PATIENCE)
                outcome.seconds = time.monotonic() - started
                over.set()
        outcome.counted = [Client(VERSIONS[0]).ask(port, b"stats") for port in site.ports]
    return outcome


def _grants(number: int) -> str:
    identity = (SHOP, "spiffe://example.org/frontends/s*")[number % 2]
    mine = grant(identity, [("shop", "shop*")[number // 2 % 2]], EVERYTHING)
    return (grant(PAY, ["pay"], EVERYTHING) if number % 3 else "") + mine


def _tls(files: Files) -> dict[str, Any]:
    return {name: files.directory / file for name, file in (("ca", "ca.crt"), ("cert", "tls.crt"), ("key", "tls.key"))}


def main() -> int:
    """Run, print, and return 1 if anything failed or did not resume."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=Settings.seconds)
    parser.add_argument("--rate", type=float, default=Settings.rate, help="handshakes a minute")
    parser.add_argument("--calls", type=float, default=Settings.calls, help="calls of each kind a second")
    parser.add_argument("--lifetime", type=int, default=Settings.lifetime, help="seconds that a session lives")
    parser.add_argument("--deadline", type=float, default=Settings.deadline, help="seconds that a look-up may take")
    outcome = run(Settings(**vars(parser.parse_args())))
    console = Console(width=None if os.isatty(1) else 140, highlight=False)
    minutes = outcome.seconds / 60
    table = Table("", "", show_header=False)
    table.add_row("minutes", f"{minutes:.1f}")
    table.add_row("handshakes", f"{outcome.handshakes:,} ({outcome.handshakes / minutes:,.0f} a minute)")
    table.add_row("failed handshakes", f"{len(outcome.failed_handshakes)}")
    resumed_sessions = outcome.offered - len(outcome.not_resumed)
    table.add_row("sessions offered, resumed", f"{outcome.offered:,}, {resumed_sessions:,}")
    table.add_row("calls of the program, failed", f"{outcome.calls:,}, {len(outcome.failed_calls)}")
    for name, count in outcome.rotations.items():
        table.add_row(f"rotations of {name}", f"{count}")
    for (stack, *more), counted in zip(FRONTENDS, outcome.counted, strict=True):
        for what in ("hits", "misses", "puts"):
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counted[what].items()) if count)
            table.add_row(f"{' '.join([stack, *more])}: {what}", reasons or "none")
    console.print(table)
    for problem in outcome.problems[:20]:
        console.print(problem, style="bold red", markup=False)
    return int(bool(outcome.problems))


if __name__ == "__main__":
    sys.exit(main())
