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

from resumed_server.cli.tls_client import Client, Endpoint, Handshake, HandshakeFailed, WaitFor

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from multiprocessing.connection import Connection

    from OpenSSL import SSL

_TICK = 0.05
"""Precision of time limits, in seconds."""
_PAUSE = 1.0
"""Pause of a client after a failure, in seconds, which protects an overloaded server."""
_START_PATIENCE = 60.0
_SPAWNING = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Plan:
    """The load to generate.

    Attributes:
        endpoints: The servers, to which each client connects in turns.
        server_name: The server name that the clients send (SNI).
        version: The only version of TLS to offer; None for the newest that both peers support.
        send: A request to send after each handshake.
        share: The share of connections that offer a session, 0 to 1.
        clients: The number of clients; each of them connects in its turn.
        connections: The number of concurrent connections.
        processes: The number of processes.
        seconds: The duration in seconds; None for no limit.
        count: The number of connections; None for no limit.
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

    def for_process(self, number: int) -> Plan:
        """Return the plan of process `number`."""

        def share_of(total: int) -> int:
            return total // self.processes + (number < total % self.processes)

        return replace(
            self,
            clients=share_of(max(self.clients, self.connections)),
            connections=share_of(self.connections),
            count=None if self.count is None else share_of(self.count),
        )


@dataclass
class Tally:
    """The results.

    Attributes:
        times: Seconds of each handshake, by server (its index) and by whether it was resumed.
        offered: The number of offered sessions.
        versions: Handshakes by version of TLS.
        failures: Failed connections, by server and reason.
        wall: Duration in seconds.
        cpu: Processor time of the clients in seconds.
    """

    times: defaultdict[tuple[int, bool], array[float]] = field(default_factory=lambda: defaultdict(_seconds))
    offered: int = 0
    versions: Counter[str] = field(default_factory=Counter)
    failures: Counter[tuple[int, str]] = field(default_factory=Counter)
    wall: float = 0.0
    cpu: float = 0.0

    def add(self, other: Tally) -> None:
        """Add the results of another process that ran at the same time."""
        for kind, seconds in other.times.items():
            self.times[kind].extend(seconds)
        self.offered += other.offered
        self.versions += other.versions
        self.failures += other.failures
        self.wall = max(self.wall, other.wall)
        self.cpu += other.cpu

    def seconds(self, *, resumed: bool, server: int | None = None) -> list[float]:
        """Return the sorted durations of either the resumed or the full handshakes, in seconds."""
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
    with contextlib.ExitStack() as exit_stack:
        with _ignore_interrupts():
            results = [_start(plan.for_process(number), start, exit_stack) for number in range(plan.processes)]
        for result in results:
            tally.add(result.recv())
    return tally


@contextlib.contextmanager
def _ignore_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C, also in processes that start during the context: the parent ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start(plan: Plan, start: Any, exit_stack: contextlib.ExitStack) -> Connection:
    """Start a process that carries out `plan` and sends its Tally."""
    result, sender = _SPAWNING.Pipe(duplex=False)
    process = _SPAWNING.Process(target=_work, args=(plan, start, sender), daemon=True)
    process.start()
    sender.close()
    exit_stack.callback(process.join)
    exit_stack.callback(process.terminate)
    return result


def _work(plan: Plan, start: Any, result: Any) -> None:
    result.send(LoadGenerator(plan).run(lambda: start.wait(_START_PATIENCE)))


@dataclass
class _SimulatedClient:
    """A client with the session of its latest connection, its next server, and its pending offers by Plan.share."""

    server: int
    pending_offers: float
    session: SSL.Session | None = None


@dataclass
class _ActiveConnection:
    """A connection in progress."""

    client: _SimulatedClient
    offers: bool
    steps: Generator[WaitFor, None, Handshake]
    want: WaitFor
    deadline: float


class LoadGenerator:
    """Connects the clients of one process, in one thread."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._client = Client(plan.server_name, plan.version, plan.send)
        self._idle = deque(
            _SimulatedClient(number % len(plan.endpoints), random.random())  # noqa: S311 - spreads the full handshakes
            for number in range(plan.clients)
        )
        self._backing_off: deque[tuple[float, _SimulatedClient]] = deque()
        self._active: dict[int, _ActiveConnection] = {}
        self._tally = Tally()

    def run(self, start: Any = lambda: None) -> Tally:
        """Make the connections; results before the return of `start` do not count.

        If some connections offer sessions, every client first obtains a session.
        """
        plan = self._plan
        with selectors.DefaultSelector() as self._selector:
            if plan.share:
                self._connect(len(self._idle), None)
            start()
            self._tally = Tally()
            began, cpu = time.perf_counter(), time.process_time()
            self._connect(plan.count, None if plan.seconds is None else began + plan.seconds)
            self._tally.wall, self._tally.cpu = time.perf_counter() - began, time.process_time() - cpu
        return self._tally

    def _connect(self, count: int | None, until: float | None) -> None:
        """Make `count` connections, or fewer if the time is over: unfinished ones then do not count."""
        left = itertools.count() if count is None else iter(range(count))
        over = False
        while not over or self._active:
            now = time.perf_counter()
            if until is not None and now >= until:
                break
            while self._backing_off and self._backing_off[0][0] <= now:
                self._idle.append(self._backing_off.popleft()[1])
            while not over and self._idle and len(self._active) < self._plan.connections:
                over = next(left, None) is None
                if not over:
                    self._start_connection(self._idle.popleft())
            self._wait_and_advance()
        for active in self._active.values():
            self._selector.unregister(active.want.socket)
            active.steps.close()
            self._idle.append(active.client)
        self._active.clear()

    def _start_connection(self, client: _SimulatedClient) -> None:
        client.pending_offers += self._plan.share if client.session else 0
        offers = client.pending_offers >= 1
        client.pending_offers -= offers
        steps = self._client.steps(self._plan.endpoints[client.server], client.session if offers else None)
        active = _ActiveConnection(client, offers, steps, WaitFor(None, 0, 0), 0)  # type: ignore[arg-type] # the first step sets it
        self._active[id(active)] = active
        self._advance(active)

    def _wait_and_advance(self) -> None:
        for key, _ in self._selector.select(_TICK):
            self._advance(key.data)
        now = time.perf_counter()
        for active in list(self._active.values()):
            if active.deadline <= now:
                self._advance(active, late=True)

    def _advance(self, active: _ActiveConnection, *, late: bool = False) -> None:
        before = active.want
        try:
            want = active.steps.throw(TimeoutError()) if late else next(active.steps)
        except StopIteration as end:
            self._record(active, end.value)
            self._idle.append(active.client)
        except HandshakeFailed as failure:
            active.client.session = None
            self._tally.failures[active.client.server, str(failure)] += 1
            self._backing_off.append((time.perf_counter() + _PAUSE, active.client))
        else:
            active.want, active.deadline = want, time.perf_counter() + want.seconds
            if not before.events:
                self._selector.register(want.socket, want.events, active)
            elif before.events != want.events:
                self._selector.modify(want.socket, want.events, active)
            return
        del self._active[id(active)]
        if before.events:
            self._selector.unregister(before.socket)

    def _record(self, active: _ActiveConnection, visit: Handshake) -> None:
        client, tally = active.client, self._tally
        client.session = visit.session
        tally.times[client.server, visit.resumed].append(visit.response_seconds)
        tally.offered += active.offers
        tally.versions[visit.version] += 1
        client.server = (client.server + 1) % len(self._plan.endpoints)
