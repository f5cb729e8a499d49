"""Load generator of `resumed bench`: clients that connect repeatedly, each time to the next server."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import random
import selectors
import signal
import time
from array import array
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from resumed_server.cli.tls_client import Client, Endpoint, Failed, Visit, Want

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from multiprocessing.connection import Connection

    from OpenSSL import SSL

_TICK = 0.05
"""Seconds: how exactly time limits are kept."""
_REST = 1.0
"""Pause of a client after a failure, in seconds, which protects an overloaded server."""
_START_PATIENCE = 60.0
_SPAWNING = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Plan:
    """The load to generate.

    Attributes:
        endpoints: The servers, which each client visits in turns.
        server_name: The name to ask them for.
        version: The only version of TLS to speak; None for the newest that both ends know.
        send: What to send behind the handshake.
        share: How much of the visits offer a session, 0 to 1.
        clients: How many clients there are: so many visits until one comes back.
        connections: How many visits are under way at a time.
        processes: How many processes make them.
        seconds: For how long; None for no limit.
        count: How many visits; None for no limit.
    """

    endpoints: tuple[Endpoint, ...]
    server_name: str
    version: str | None = None
    send: bytes = b""
    share: float = 0.9
    clients: int = 256
    connections: int = 8
    processes: int = 1
    seconds: float | None = None
    count: int | None = None

    def part(self, number: int) -> Plan:
        """Return the part of process `number`."""

        def part_of(whole: int) -> int:
            return whole // self.processes + (number < whole % self.processes)

        return replace(
            self,
            clients=part_of(max(self.clients, self.connections)),
            connections=part_of(self.connections),
            count=None if self.count is None else part_of(self.count),
        )


@dataclass
class Tally:
    """The results.

    Attributes:
        times: Seconds of each handshake, by server (its index) and by whether it was resumed.
        offered: How many sessions were offered.
        versions: Handshakes by version of TLS.
        failures: Visits that failed, by server and reason.
        wall: Seconds that all took.
        cpu: Seconds of processor time that the clients took.
    """

    times: defaultdict[tuple[int, bool], array[float]] = field(default_factory=lambda: defaultdict(_seconds))
    offered: int = 0
    versions: Counter[str] = field(default_factory=Counter)
    failures: Counter[tuple[int, str]] = field(default_factory=Counter)
    wall: float = 0.0
    cpu: float = 0.0

    def add(self, other: Tally) -> None:
        """Add what another process counted at the same time."""
        for kind, seconds in other.times.items():
            self.times[kind].extend(seconds)
        self.offered += other.offered
        self.versions += other.versions
        self.failures += other.failures
        self.wall = max(self.wall, other.wall)
        self.cpu += other.cpu

    def seconds(self, *, resumed: bool, server: int | None = None) -> list[float]:
        """Return the sorted times of the handshakes that were resumed, or were not."""
        kinds = [kind for kind in self.times if kind[1] is resumed and server in {None, kind[0]}]
        return sorted(itertools.chain.from_iterable(self.times[kind] for kind in kinds))


def _seconds() -> array[float]:
    return array("d")


def measure(plan: Plan) -> Tally:
    """Generate the load and return the results.

    Raises:
        EOFError: A process ended too early.
    """
    start = _SPAWNING.Barrier(plan.processes)
    tally = Tally()
    with contextlib.ExitStack() as held:
        with _uninterrupted():
            results = [_started(plan.part(number), start, held) for number in range(plan.processes)]
        for result in results:
            tally.add(result.recv())
    return tally


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C, also in processes that start during the context: the parent ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _started(plan: Plan, start: Any, held: contextlib.ExitStack) -> Connection:
    """Start a process that carries out `plan` and sends its Tally."""
    result, sender = _SPAWNING.Pipe(duplex=False)
    process = _SPAWNING.Process(target=_work, args=(plan, start, sender), daemon=True)
    process.start()
    sender.close()
    held.callback(process.join)
    held.callback(process.terminate)
    return result


def _work(plan: Plan, start: Any, result: Any) -> None:
    result.send(Crowd(plan).run(lambda: start.wait(_START_PATIENCE)))


@dataclass
class _Guest:
    """A client with the session of its latest visit, its next server, and how many offers it owes to the share."""

    server: int
    owed: float
    session: SSL.Session | None = None


@dataclass
class _Visiting:
    """A visit under way."""

    guest: _Guest
    offers: bool
    steps: Generator[Want, None, Visit]
    want: Want
    patience: float


class Crowd:
    """The clients of one process, all in one thread."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._client = Client(plan.server_name, plan.version, plan.send)
        self._guests = deque(
            _Guest(number % len(plan.endpoints), random.random())  # noqa: S311 - so that not all are full at once
            for number in range(plan.clients)
        )
        self._resting: deque[tuple[float, _Guest]] = deque()
        self._visiting: dict[int, _Visiting] = {}
        self._tally = Tally()

    def run(self, start: Any = lambda: None) -> Tally:
        """Make the visits; results before the return of `start` do not count.

        Clients who are to offer a session first fetch one.
        """
        plan = self._plan
        with selectors.DefaultSelector() as self._selector:
            if plan.share:
                self._make_visits(len(self._guests), None)
            start()
            self._tally = Tally()
            began, cpu = time.perf_counter(), time.process_time()
            self._make_visits(plan.count, None if plan.seconds is None else began + plan.seconds)
            self._tally.wall, self._tally.cpu = time.perf_counter() - began, time.process_time() - cpu
        return self._tally

    def _make_visits(self, count: int | None, until: float | None) -> None:
        """Make `count` visits, or fewer if the time is over: those under way then do not count."""
        left = itertools.count() if count is None else iter(range(count))
        over = False
        while not over or self._visiting:
            now = time.perf_counter()
            if until is not None and now >= until:
                break
            while self._resting and self._resting[0][0] <= now:
                self._guests.append(self._resting.popleft()[1])
            while not over and self._guests and len(self._visiting) < self._plan.connections:
                over = next(left, None) is None
                if not over:
                    self._set_out(self._guests.popleft())
            self._go_on()
        for visiting in self._visiting.values():
            self._selector.unregister(visiting.want.socket)
            visiting.steps.close()
            self._guests.append(visiting.guest)
        self._visiting.clear()

    def _set_out(self, guest: _Guest) -> None:
        guest.owed += self._plan.share if guest.session else 0
        offers = guest.owed >= 1
        guest.owed -= offers
        steps = self._client.steps(self._plan.endpoints[guest.server], guest.session if offers else None)
        visiting = _Visiting(guest, offers, steps, Want(None, 0, 0), 0)  # type: ignore[arg-type] # it has none yet
        self._visiting[id(visiting)] = visiting
        self._advance(visiting)

    def _go_on(self) -> None:
        for key, _ in self._selector.select(_TICK):
            self._advance(key.data)
        now = time.perf_counter()
        for visiting in list(self._visiting.values()):
            if visiting.patience <= now:
                self._advance(visiting, late=True)

    def _advance(self, visiting: _Visiting, *, late: bool = False) -> None:
        before = visiting.want
        try:
            want = visiting.steps.throw(TimeoutError()) if late else next(visiting.steps)
        except StopIteration as end:
            self._left(visiting, end.value)
            self._guests.append(visiting.guest)
        except Failed as failure:
            visiting.guest.session = None
            self._tally.failures[visiting.guest.server, str(failure)] += 1
            self._resting.append((time.perf_counter() + _REST, visiting.guest))
        else:
            visiting.want, visiting.patience = want, time.perf_counter() + want.seconds
            if not before.events:
                self._selector.register(want.socket, want.events, visiting)
            elif before.events != want.events:
                self._selector.modify(want.socket, want.events, visiting)
            return
        del self._visiting[id(visiting)]
        if before.events:
            self._selector.unregister(before.socket)

    def _left(self, visiting: _Visiting, visit: Visit) -> None:
        guest, tally = visiting.guest, self._tally
        guest.session = visit.session
        tally.times[guest.server, visit.resumed].append(visit.answered)
        tally.offered += visiting.offers
        tally.versions[visit.version] += 1
        guest.server = (guest.server + 1) % len(self._plan.endpoints)
