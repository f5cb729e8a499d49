"""The processes that the bench measures: stores and clients on one core, frontends on another, all ended at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import trustme

from benchmarks.fleet import Fleet
from resumed_server.cli.tls_client import Client, Endpoint, Visit
from support.server import running_server
from support.tls import CA

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from OpenSSL import SSL
    from rich.progress import Progress
    from typing_extensions import Self

    from support.tls import Stack

CORES = sorted(os.sched_getaffinity(0))
CLIENTS, FRONTENDS = CORES[0], CORES[-1]
"""The core of the clients and stores, which take turns in a handshake, and that of the frontends."""
FRONTEND = Path(__file__).with_name("frontend.py")
KEYS = {"P-256": trustme.KeyType.ECDSA, "RSA-2048": trustme.KeyType.RSA}
VERSIONS = ("1.2", "1.3")
FRONTS = ("grpcio", "native")
ASK = b"who\n"
"""What the frontends answer with a line."""
WARM_UP = 3
"""Visits that each turn begins with and that do not count: who comes first after a pause pays for cold caches."""


_T = TypeVar("_T")


@dataclass
class Options:
    """How to run the sections: `quick` for a look only, `progress` to show what is done."""

    quick: bool
    progress: Progress

    def turns(self, number: int) -> int:
        """Return how many turns to make of what a full run makes `number` of."""
        return max(2, number // 6) if self.quick else number

    @property
    def keys(self) -> list[str]:
        """The kinds of certificates."""
        return [*KEYS][:1] if self.quick else [*KEYS]


class Case(NamedTuple):
    """What is varied in all sections about TLS."""

    stack: Stack
    key: str
    version: str

    def __str__(self) -> str:
        return f"{self.stack}, TLS {self.version}, {self.key}"


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """Bind this thread, and all processes that it starts meanwhile, to one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Frontend(NamedTuple):
    """A frontend to start.

    Attributes:
        stack: Its TLS stack.
        key: Its certificate's, one of KEYS.
        target: The store; None to do without.
        options: As on the command line of frontend.py.
    """

    stack: Stack
    key: str
    target: str | None = None
    options: tuple[str, ...] = ()


class Rig:
    """Stores and frontends, from entering it to leaving it."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.directory = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="resumed-bench-")))
        self._fleets: dict[str, Fleet] = {}
        for key, kind in KEYS.items():
            (self.directory / key).mkdir()
            self._fleets[key] = Fleet(str(self.directory / key), CA.issue_cert("localhost", key_type=kind))
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def certificate(self, key: str) -> Path:
        """Return the file with the certificate and its key, as PEM."""
        return self._fleets[key].certificate

    def keyring(self, key: str) -> Path:
        """Return the file with the fleet key of all frontends with this certificate."""
        return self._fleets[key].keyring

    def store(self, front: str = "grpcio", *options: str) -> str:
        """Start a store and return its target."""
        with on_core(CLIENTS):
            server = running_server("--transport", front, *options)
            return self._held.enter_context(server).target

    def stores(self) -> dict[str, str]:
        """Start a store of each front that there is."""
        fronts = [front for front in FRONTS if front == "grpcio" or importlib.util.find_spec("pygrpc_native")]
        return {front: self.store(front) for front in fronts}

    @contextlib.contextmanager
    def frontends(self, wanted: Sequence[Frontend]) -> Iterator[list[Endpoint]]:
        """Run frontends and hand out where they listen."""
        with contextlib.ExitStack() as held:
            with on_core(FRONTENDS), ThreadPoolExecutor(4) as pool:  # its threads inherit the core
                endpoints = list(pool.map(lambda each: held.enter_context(self._running(each)), wanted))
            yield endpoints

    @staticmethod
    @contextlib.contextmanager
    def on_frontends_core(server: contextlib.AbstractContextManager[Endpoint]) -> Iterator[Endpoint]:
        """Run another server beside the frontends."""
        with contextlib.ExitStack() as held:
            with on_core(FRONTENDS):
                endpoint = held.enter_context(server)
            yield endpoint

    @contextlib.contextmanager
    def _running(self, wanted: Frontend) -> Iterator[Endpoint]:
        fleet, program = self._fleets[wanted.key], (str(FRONTEND),)
        with fleet.frontend(wanted.stack, wanted.target, *wanted.options, program=program) as port:
            yield Endpoint.resolved("127.0.0.1", port)


def shuffled(things: Iterable[_T]) -> list[_T]:
    """Return them in any order."""
    things = list(things)
    return random.sample(things, len(things))


def negotiate(client: Client, endpoint: Endpoint, count: int) -> list[Visit]:
    """Make `count` full handshakes, after those that warm up."""
    visits = [client.visit(endpoint) for _ in range(WARM_UP + count)]
    assert not any(visit.resumed for visit in visits)
    return visits[WARM_UP:]


def come_back(client: Client, endpoint: Endpoint, sessions: list[SSL.Session | None]) -> list[Visit]:
    """Offer each session once, after warming up with full handshakes."""
    for _ in range(WARM_UP):
        client.visit(endpoint)
    return [client.visit(endpoint, session) for session in sessions]
