"""The processes that the benchmark measures: stores and clients on one core, frontends on another."""

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
from benchmarks.measuring import bind_to_cores
from resumed_server.cli.tls_client import Client, Endpoint, Handshake
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
"""The core of the clients and stores, which run alternately in a handshake, and the core of the frontends."""
FRONTEND = Path(__file__).with_name("frontend.py")
KEYS = {"P-256": trustme.KeyType.ECDSA, "RSA-2048": trustme.KeyType.RSA}
VERSIONS = ("1.2", "1.3")
TRANSPORTS = ("grpcio", "native")
REQUEST = b"who\n"
"""A request, to which frontends respond with one line."""
WARM_UP = 3
"""Visits at the beginning of each turn that do not count: the first ones after a pause meet cold caches."""


_T = TypeVar("_T")


@dataclass
class Options:
    """Options of all sections: `quick` reduces the number of turns, `progress` displays the progress."""

    quick: bool
    progress: Progress

    def turns(self, number: int) -> int:
        """Return the number of turns, which is `number` in a full run."""
        return max(2, number // 6) if self.quick else number

    @property
    def keys(self) -> list[str]:
        """The kinds of certificates to measure."""
        return [*KEYS][:1] if self.quick else [*KEYS]


class Case(NamedTuple):
    """The parameters that the sections about TLS vary."""

    stack: Stack
    key: str
    version: str

    def __str__(self) -> str:
        return f"{self.stack}, TLS {self.version}, {self.key}"


class Frontend(NamedTuple):
    """A frontend to start.

    Attributes:
        stack: Its TLS stack.
        key: The key type of its certificate, one of KEYS.
        target: The store; None for a frontend without the shim.
        options: Options for the command line of frontend.py.
    """

    stack: Stack
    key: str
    target: str | None = None
    options: tuple[str, ...] = ()


class Rig:
    """Stores and frontends that run until the context ends."""

    def __init__(self) -> None:
        self._exit_stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.directory = Path(self._exit_stack.enter_context(tempfile.TemporaryDirectory(prefix="resumed-bench-")))
        self._fleets: dict[str, Fleet] = {}
        for key, kind in KEYS.items():
            (self.directory / key).mkdir()
            self._fleets[key] = Fleet(str(self.directory / key), CA.issue_cert("localhost", key_type=kind))
        return self

    def __exit__(self, *_: object) -> None:
        self._exit_stack.close()

    def certificate(self, key: str) -> Path:
        """Return the file with the certificate and its key, as PEM."""
        return self._fleets[key].certificate

    def keyring(self, key: str) -> Path:
        """Return the file with the fleet key of all frontends with this certificate."""
        return self._fleets[key].keyring

    def run_store(self, transport: str = "grpcio", *options: str) -> str:
        """Start a store and return its target."""
        with bind_to_cores({CLIENTS}):
            server = running_server("--transport", transport, *options)
            return self._exit_stack.enter_context(server).target

    def run_stores(self) -> dict[str, str]:
        """Start a store with each installed gRPC transport; return the targets."""
        transports = [
            transport for transport in TRANSPORTS if transport == "grpcio" or importlib.util.find_spec("pygrpc_native")
        ]
        return {transport: self.run_store(transport) for transport in transports}

    @contextlib.contextmanager
    def run_frontends(self, wanted: Sequence[Frontend]) -> Iterator[list[Endpoint]]:
        """Run frontends, and yield their endpoints."""
        with contextlib.ExitStack() as exit_stack:
            with bind_to_cores({FRONTENDS}), ThreadPoolExecutor(4) as pool:  # its threads inherit the core
                endpoints = list(pool.map(lambda each: exit_stack.enter_context(self._run_frontend(each)), wanted))
            yield endpoints

    @staticmethod
    @contextlib.contextmanager
    def run_on_frontends_core(server: contextlib.AbstractContextManager[Endpoint]) -> Iterator[Endpoint]:
        """Run another server on the core of the frontends."""
        with contextlib.ExitStack() as exit_stack:
            with bind_to_cores({FRONTENDS}):
                endpoint = exit_stack.enter_context(server)
            yield endpoint

    @contextlib.contextmanager
    def _run_frontend(self, wanted: Frontend) -> Iterator[Endpoint]:
        fleet, program = self._fleets[wanted.key], (str(FRONTEND),)
        with fleet.frontend(wanted.stack, wanted.target, *wanted.options, program=program) as port:
            yield Endpoint.resolve("127.0.0.1", port)


def shuffled(items: Iterable[_T]) -> list[_T]:
    """Return the items in random order."""
    items = list(items)
    return random.sample(items, len(items))


def negotiate(client: Client, endpoint: Endpoint, count: int) -> list[Handshake]:
    """Make `count` full handshakes, after some that warm up."""
    visits = [client.visit(endpoint) for _ in range(WARM_UP + count)]
    assert not any(visit.resumed for visit in visits)
    return visits[WARM_UP:]


def offer_sessions(client: Client, endpoint: Endpoint, sessions: list[SSL.Session | None]) -> list[Handshake]:
    """Offer each session once, after warming up with full handshakes."""
    for _ in range(WARM_UP):
        client.visit(endpoint)
    return [client.visit(endpoint, session) for session in sessions]
