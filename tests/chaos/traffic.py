"""Live TLS traffic during a fault, and its results.

There are three kinds of clients, each in a separate thread:

- Travellers negotiate on one frontend and return to the other, again and again, with their latest session.
- A spoiler returns seconds later and breaks the connection with a bad record, so that its sessions must be removed.
- Misers return once, seconds later, to frontends that use each session once.

The sessions of a spoiler's connection count as removed once the store has acknowledged it: the frontend has sent all
its removals (`flush`), and none was refused or dropped. A session that a miser resumed counts as taken. Both are
offered again, at once, during the fault and after it. Every one that resumes is counted as wrong.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import statistics
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.fleet import Client, exchange_line
from benchmarks.fleet import Handshake as Connection
from support.tls import VERSIONS

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

    from chaos.rig import Rig

TRAVELLERS = 8
RATE = 40.0
"""Handshakes per second of all travellers together; the other clients make half as many."""
SAVED = 20
"""Sessions that are saved before the fault, to count those that it loses."""
BACK = 0.95
"""Minimum share of offered sessions that resume for resumption to count as available."""
WINDOW = 1.0
"""Seconds over which this share is measured."""

_PAUSE = 0.25
_BAD_RECORD = b"\x17\x03\x03\x00\x40" + bytes(64)
_RECHECKED = 60
_WAITING = 6
"""Turns of a spoiler or miser that a session waits for its use, so that one can begin in a fault and end later."""


class Handshake(NamedTuple):
    """A handshake of a traveller."""

    at: float
    offered: bool
    resumed: bool
    port: int
    ended: float


REMOVAL_SECONDS = 4.0
"""Seconds in which a removal reaches all frontends with tickets, if the store answers."""


class Ticket(NamedTuple):
    """A session, with the client that may offer it."""

    client: Client
    session: ssl.SSLSession | None
    ports: list[int]
    """The frontends that share it."""
    ended: float = 0.0
    """When the store acknowledged its removal, on the monotonic clock."""


class Traffic:
    """The clients, for the duration of the context.

    Attributes:
        failures: The reasons of failed handshakes.
        spent: Sessions whose removal or take was acknowledged.
        unacknowledged: The number of removals that the store did not acknowledge.
        wrong: A line for each session that must not resume and did.
    """

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._delay = REMOVAL_SECONDS if rig.tickets else 0.0
        self._travels: list[Handshake] = []
        self._saved: list[Ticket] = []
        self._lock = threading.Lock()
        self._enough = threading.Event()
        self._started = time.monotonic()
        self.failures: list[str] = []
        self.unacknowledged = 0
        self.spent: list[tuple[str, Ticket]] = []
        self.wrong: list[str] = []
        self._seconds: list[tuple[float, float]] = []
        clients: list[tuple[Callable[[int], None], int]] = [
            *((self._travel, number) for number in range(TRAVELLERS)),
            *((self._spare, number) for number in range(len(VERSIONS))),
            (self._spoil, 0),
        ]
        self._threads = [threading.Thread(target=live, args=(number,), daemon=True) for live, number in clients]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()

    def save(self) -> None:
        """Save sessions that the store has."""
        for number in range(SAVED):
            client, ports = Client(VERSIONS[number % 2]), self._rig.shared
            self._saved.append(Ticket(client, self._visit(client, ports[number % 2]).session, ports))
        for port in self._rig.shared:
            Client(VERSIONS[0]).ask(port, b"flush")

    def kept(self) -> float:
        """Return the share of the saved sessions that still resume."""
        resumed = 0
        for client, session, ports, _ in self._saved:
            with self._tolerant():
                resumed += self._visit(client, random.choice(ports), session).resumed
        return resumed / len(self._saved)

    @property
    def handshakes(self) -> int:
        """The number of handshakes of all clients."""
        return len(self._seconds) + len(self.failures)

    def slowest(self, start: float, end: float) -> float:
        """Return the seconds of the slowest handshake that began between two times."""
        return max((seconds for at, seconds in list(self._seconds) if start <= at < end), default=0.0)

    def recheck(self, count: int = _RECHECKED) -> None:
        """Offer some of the removed and taken sessions again, to each frontend that shares them."""
        with self._lock:
            spent = list(self.spent)
        spent = [
            (how, ticket) for how, ticket in spent if how == "taken" or ticket.ended < time.monotonic() - self._delay
        ]
        for how, ticket in random.sample(spent, min(count, len(spent))):
            for port in ticket.ports:
                self._offer_spent(how, ticket, port)

    def rate(self, start: float, end: float) -> float | None:
        """Return the share of the travellers' sessions that resumed, of those offered between two times."""
        offered = [each.resumed for each in list(self._travels) if each.offered and start <= each.at < end]
        return statistics.mean(offered) if offered else None

    def missed(self, start: float, end: float) -> list[Handshake]:
        """Return the travellers' handshakes between two times that offered a session, which did not resume."""
        return [each for each in list(self._travels) if each.offered and not each.resumed and start <= each.at < end]

    def back(self, since: float) -> float | None:
        """Return the seconds from `since` until resumption stayed available, None if it is not available now."""
        offered = sorted(each.at for each in list(self._travels) if each.offered and each.at >= since)
        whole = [at for at in offered if at <= time.monotonic() - WINDOW]
        bad = [number for number, at in enumerate(whole) if (self.rate(at, at + WINDOW) or 0) < BACK]
        if not whole or (bad and bad[-1] + 1 == len(whole)):
            return None
        return whole[bad[-1] + 1] - since if bad else 0.0

    def _travel(self, number: int) -> None:
        client = Client(VERSIONS[number % 2])
        session: ssl.SSLSession | None = None
        period = TRAVELLERS / RATE
        self._enough.wait(number / RATE)
        for port in itertools.cycle(self._rig.shared):
            started = time.monotonic()
            with self._tolerant():
                visit = self._visit(client, port, session)
                self._travels.append(Handshake(started, session is not None, visit.resumed, port, time.monotonic()))
                session = visit.session
            if self._enough.wait(max(0.0, started + period - time.monotonic())):
                return

    def _spoil(self, _number: int) -> None:
        clients = [(Client(version), _empty_queue()) for version in VERSIONS]
        for (client, waiting), (here, there) in zip(
            itertools.cycle(clients), self._ways(self._rig.shared), strict=False
        ):
            with self._tolerant():
                waiting.append(self._visit(client, here).session)
                before = self._removals(there)
                removed = self._break(client, there, waiting.popleft())
                if self._acknowledged(there, before):
                    for each in removed:
                        self._spend("removed", Ticket(client, each, self._rig.shared, time.monotonic()))
                else:
                    self.unacknowledged += 1
            self.recheck(1)
            if self._enough.wait(_PAUSE):
                return

    def _spare(self, number: int) -> None:
        client, waiting = Client(VERSIONS[number]), _empty_queue()
        for here, there in self._ways(self._rig.once):
            with self._tolerant():
                waiting.append(self._visit(client, here).session)
                session = waiting.popleft()
                if self._visit(client, there, session).resumed:
                    self._spend("taken", Ticket(client, session, self._rig.once))
            if self._enough.wait(_PAUSE):
                return

    @staticmethod
    def _ways(ports: list[int]) -> Iterator[tuple[int, int]]:
        """Visit both frontends in turns, twice each, with both versions of TLS, until stopped."""
        there, back = ports
        return itertools.cycle([(there, back)] * 2 + [(back, there)] * 2)

    def _spend(self, how: str, ticket: Ticket) -> None:
        """Record that a session must not resume any more, and try it."""
        with self._lock:
            self.spent.append((how, ticket))
        if how == "taken" or not self._delay:
            self._offer_spent(how, ticket, random.choice(ticket.ports))

    def _offer_spent(self, how: str, ticket: Ticket, port: int) -> None:
        with self._tolerant():
            if self._visit(ticket.client, port, ticket.session).resumed:
                self.wrong.append(f"{how}, and resumed {time.monotonic() - self._started:.1f} s into the run")

    def _visit(self, client: Client, port: int, session: ssl.SSLSession | None = None) -> Connection:
        visit = client.visit(port, session)
        self._count(visit.seconds)
        return visit

    def _break(self, client: Client, port: int, session: ssl.SSLSession | None) -> list[ssl.SSLSession | None]:
        """Return to the frontend, send a bad record, and return the sessions that the frontend must remove."""
        with client._connect(port, session) as (tls, started):
            exchange_line(tls, b"who")
            self._count(time.perf_counter() - started)
            # Without our TLS library, which would not offer these sessions again after the alert that follows.
            with socket.socket(fileno=os.dup(tls.fileno())) as raw:
                raw.settimeout(5)
                raw.sendall(_BAD_RECORD)
                with contextlib.suppress(ConnectionResetError):
                    while raw.recv(4096):
                        pass
            return [session, tls.session] if tls.session_reused else [tls.session]

    def _count(self, seconds: float) -> None:
        self._seconds.append((time.monotonic() - seconds, seconds))

    def _removals(self, port: int) -> dict[str, int]:
        removals: dict[str, int] = Client(VERSIONS[0]).ask(port, b"stats")["removals"]
        return removals

    def _acknowledged(self, port: int, before: dict[str, int]) -> bool:
        """Return whether the store acknowledged all removals of a frontend since `before`."""
        flushed: bool = Client(VERSIONS[0]).ask(port, b"flush")["flushed"]
        after = self._removals(port)
        if not flushed or any(after.get(how) != before.get(how) for how in ("refused", "dropped")):
            return False
        assert after.get("fatal-error", 0) > before.get("fatal-error", 0), "the frontend took no notice of a bad record"
        return True

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Record a failed handshake and continue."""
        try:
            yield
        except OSError as error:
            self.failures.append(f"{type(error).__name__}: {error}")
        except AssertionError as error:
            self.wrong.append(str(error))


def _empty_queue() -> deque[ssl.SSLSession | None]:
    return deque([None] * _WAITING)
