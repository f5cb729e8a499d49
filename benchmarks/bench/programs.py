"""TLS servers of all languages as processes: unmodified, with their own sharing of sessions, and with the shim."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.bench.apache import MEMCACHED
from benchmarks.bench.rig import FRONTEND, REQUEST
from benchmarks.measuring import cpu_seconds, process_tree
from preload.servers import LIBRARY, SERVERS, serving, settings
from resumed_server.cli.tls_client import Endpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

BARE, OWN, MIRROR, CALL, TICKETS = "bare", "own", "mirror", "call", "tickets"
"""Without the shim; with the stack's own sharing; with stored sessions and a mirror, or none; with fleet tickets."""
ROOT = Path(__file__).parents[2]
BUILT = ROOT / ".build" / "cargo" / "release"
GO = ROOT / ".build" / "frontends" / "go-frontend"
NODE = ROOT / "client" / "node" / "dist" / "index.mjs"
_HTTP = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
_DEADLINE = 1.0
"""Seconds: long, so that a late response appears in the times and not as a full handshake."""
_MIRROR_BYTES = 64 << 20


@dataclass(frozen=True)
class Environment:
    """The files of servers, and the addresses of the store and of memcached."""

    certificate: Path
    keyring: Path
    ticket_key: Path
    target: str
    memcached: str
    namespace: str = ""
    """The namespace of all frontends with tickets; empty for a namespace of each stack's own."""
    rotation: int = 3600
    lifetime: int = 7200


class Server(NamedTuple):
    """A running server."""

    endpoint: Endpoint
    pid: int

    def processor_seconds(self) -> float:
        """Return the processor time of the server and of its child processes, in seconds."""
        return cpu_seconds(process_tree(self.pid))


@dataclass(frozen=True)
class Program:
    """A program of this repository, which prints the port on which it listens.

    Attributes:
        name: The name of the server in tables.
        command: The command, relative to the root of the repository.
        needs: A file that a build must have made.
        deadline: The value of its option --deadline.
        mirror: The options for a mirror, if the program supports one.
        tickets: The options for tickets of the fleet, if the program supports them.
        ticket_key: The option for a file with a ticket key, if there is one.
        own: The name of the stack's own sharing (kind OWN), if it has one.
        request: A request that the program answers.
        preloaded: Whether libresumed-preload, instead of options, installs the shim.
        root: The root of the repository.
    """

    name: str
    command: tuple[str, ...]
    needs: Path
    deadline: str
    mirror: tuple[str, ...] = ()
    tickets: tuple[str, ...] = ()
    ticket_key: str = ""
    own: str = ""
    request: bytes = REQUEST
    preloaded: bool = False
    root: Path = ROOT

    def in_tree(self, root: Path) -> Program:
        """Return the program of another tree of the repository."""
        command = tuple(each.replace(str(ROOT), str(root)) for each in self.command)
        return replace(self, root=root, command=command, needs=root / self.needs.relative_to(ROOT))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that the program supports."""
        mirrored = self.mirror or self.preloaded
        shared = self.tickets or self.preloaded
        return (
            BARE,
            *([OWN] if self.ticket_key else []),
            *([MIRROR] if mirrored else []),
            CALL,
            *([TICKETS] if shared else []),
        )

    def find_obstacle(self) -> str:
        """Return the reason why the program cannot run, or an empty string."""
        absent = [
            path for path in (self.command[0], str(self.needs)) if not shutil.which(path) and not Path(path).exists()
        ]
        return f"{absent[0].removeprefix(f'{ROOT}/')} is not there" if absent else ""

    @contextlib.contextmanager
    def run(self, kind: str, environment: Environment) -> Iterator[Server]:
        """Run the program as one of its kinds."""
        command = [*self.command, "--certificate", str(environment.certificate)]
        folders = ("server", "client/python", "tests", ".")
        variables = {**os.environ, "PYTHONPATH": ":".join(str(self.root / folder) for folder in folders)}
        if kind == OWN:
            command += [self.ticket_key, str(environment.ticket_key)]
        elif kind != BARE and self.preloaded:
            variables |= _preload_variables(self._namespace(kind, environment), kind, environment, self.root)
        elif kind != BARE:
            command += ["--target", environment.target, "--namespace", self._namespace(kind, environment)]
            command += [
                "--deadline",
                self.deadline,
                "--keyring",
                str(environment.keyring),
                *self._kind_options(kind, environment),
            ]
        with subprocess.Popen(
            command, cwd=self.root, text=True, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        ) as process:
            try:
                assert process.stdout
                port = re.search(r"(\d+)\D*$", process.stdout.readline())
                assert port, f"{self.name} did not start"
                yield Server(Endpoint.resolve("127.0.0.1", int(port[1])), process.pid)
            finally:
                process.terminate()

    def _kind_options(self, kind: str, environment: Environment) -> tuple[str, ...]:
        if kind != TICKETS:
            return self.mirror if kind == MIRROR else ()
        return tuple(each.format(rotation=environment.rotation, lifetime=environment.lifetime) for each in self.tickets)

    def _namespace(self, kind: str, environment: Environment) -> str:
        if kind == TICKETS and environment.namespace:
            return environment.namespace
        return f"{self.name}.{kind}".lower().replace(
            " ", "-"
        )  # or mirrors of other frontends would receive its sessions


@dataclass(frozen=True)
class PackagedServer:
    """A server of Debian's packages, which tests/preload configures.

    Attributes:
        name: The name of the server in tables.
        server: Its name in tests/preload/servers.py.
        own: The name of its own sharing (kind OWN).
        own_configuration: The configuration of that sharing; "{environment.ticket_key}" stands for the file's path.
        needs: Another program that the sharing requires.
        kinds: The kinds that it supports, of BARE, OWN, MIRROR, CALL and TICKETS.
        request: A request that the server answers.
        root: The root of the repository.
    """

    name: str
    server: str
    own: str
    own_configuration: str
    needs: str
    kinds: tuple[str, ...] = (BARE, OWN, MIRROR, CALL, TICKETS)
    request: bytes = _HTTP
    root: Path = ROOT

    def in_tree(self, root: Path) -> PackagedServer:
        """Return the server with the library of another tree of the repository."""
        return replace(self, root=root)

    def find_obstacle(self) -> str:
        """Return the reason why the server cannot run, or an empty string."""
        absent = [program for program in (SERVERS[self.server][0], self.needs) if not shutil.which(program)]
        if absent:
            return f"{absent[0]} is not installed"
        return "" if LIBRARY.exists() else f"{LIBRARY.relative_to(ROOT)} is not there"

    @contextlib.contextmanager
    def run(self, kind: str, environment: Environment) -> Iterator[Server]:
        """Run the server with one worker process, as one of its kinds."""
        more = self.own_configuration.format(environment=environment) if kind == OWN else ""
        namespace = environment.namespace if kind == TICKETS and environment.namespace else f"{self.server}.{kind}"
        shared = kind in {MIRROR, CALL, TICKETS}
        shim = _preload_variables(namespace, kind, environment, self.root) if shared else None
        with serving(self.server, environment.certificate, shim, workers=1, more=more) as server:
            yield Server(Endpoint.resolve("127.0.0.1", server.port), server.process.pid)


def _preload_variables(namespace: str, kind: str, environment: Environment, root: Path) -> dict[str, str]:
    more = {
        MIRROR: {"mirror": str(_MIRROR_BYTES)},
        TICKETS: {
            "mirror": "0",
            "sessions": "tickets",
            "tickets_tls12": "1",
            "rotation": str(environment.rotation),
            "lifetime": str(environment.lifetime),
            "ignore_id_context": "1",  # because the frontends have different stacks
        },
    }.get(kind, {"mirror": "0"})
    variables = settings(environment.target, namespace, environment.keyring, deadline=str(_DEADLINE), **more)
    return variables | {"LD_PRELOAD": str(root / LIBRARY.relative_to(ROOT))}


_TICKETS = ("--sessions", "tickets", "--tickets-tls12", "--rotation", "{rotation}", "--lifetime", "{lifetime}")


def _python_program(name: str) -> Program:
    command = (sys.executable, str(FRONTEND), "--name", name, "--stack", name.lower())
    return Program(name, command, FRONTEND, str(_DEADLINE), ("--mirror",), _TICKETS)


_MILLISECONDS = str(round(_DEADLINE * 1000))
Stack = Program | PackagedServer
_SSL = _python_program("ssl")
STACKS: tuple[Stack, ...] = (
    _SSL,
    _python_program("pyOpenSSL"),
    Program("ssl on libresumed", _SSL.command, LIBRARY, "", preloaded=True),
    Program("Node", ("node", "tests/conformance/node/frontend.mjs"), NODE, _MILLISECONDS),
    Program(
        "Go",
        (str(GO),),
        GO,
        f"{_MILLISECONDS}ms",
        tickets=("--tickets", "--rotation", "{rotation}s", "--lifetime", "{lifetime}s"),
        ticket_key="--ticket-key",
        own="SetSessionTicketKeys",
    ),
    Program(
        "rustls",
        (str(BUILT / "examples" / "server"),),
        BUILT / "examples" / "server",
        _MILLISECONDS,
        ("--mirror", str(_MIRROR_BYTES)),
        ("--tickets", "--rotation", "{rotation}", "--lifetime", "{lifetime}"),
    ),
    PackagedServer(
        "nginx", "nginx", "ssl_session_ticket_key", "ssl_session_ticket_key {environment.ticket_key};", "nginx"
    ),
    PackagedServer(
        "Apache",
        "apache",
        "mod_socache_memcache",
        "LoadModule socache_memcache_module /usr/lib/apache2/modules/mod_socache_memcache.so\n"
        "Define NoCache\nSSLSessionCache memcache:{environment.memcached}\nSSLSessionTickets off",
        MEMCACHED,
    ),
)
