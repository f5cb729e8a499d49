"""TLS servers of all languages as processes: as they come, sharing sessions in their own way, and with the shim."""

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
from benchmarks.bench.rig import ASK, FRONTEND
from preload.servers import LIBRARY, SERVERS, serving, settings
from resumed_server.cli.tls_client import Endpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

BARE, OWN, MIRROR, CALL, TICKETS = "bare", "own", "mirror", "call", "tickets"
"""Without the shim; sharing as the stack itself can; with stored sessions, and a mirror or none; with fleet tickets."""
ROOT = Path(__file__).parents[2]
BUILT = ROOT / ".build" / "cargo" / "release"
GO = ROOT / ".build" / "frontends" / "go-frontend"
NODE = ROOT / "client" / "node" / "dist" / "index.mjs"
_HTTP = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
_DEADLINE = 1.0
"""Seconds: a late answer is to show in the times, not as a full handshake."""
_MIRROR_BYTES = 64 << 20
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Surroundings:
    """What servers are told: files, and where store and memcached are."""

    certificate: Path
    keyring: Path
    ticket_key: Path
    target: str
    memcached: str
    namespace: str = ""
    """That of all frontends with tickets; empty for one for each stack."""
    rotation: int = 3600
    lifetime: int = 7200


class Server(NamedTuple):
    """A server that runs."""

    endpoint: Endpoint
    pid: int

    def processor_seconds(self) -> float:
        """Return what it has used of a core so far, with the processes that it started."""
        return sum(map(_used, _family(self.pid)))


@dataclass(frozen=True)
class Program:
    """A program of ours that says on which port it listens.

    Attributes:
        name: How tables call it.
        command: It, in the root of the repository.
        needs: A file that must have been built.
        deadline: The deadline on its command line.
        mirror: Options for a mirror, if it has one.
        tickets: Options for tickets of the fleet, if it has them.
        ticket_key: The option that takes a file with a ticket key, if there is one.
        own: What OWN is, if it can be that.
        ask: What it answers.
        preloaded: Whether libresumed-preload is put under it, instead of options for the shim.
        root: The repository.
    """

    name: str
    command: tuple[str, ...]
    needs: Path
    deadline: str
    mirror: tuple[str, ...] = ()
    tickets: tuple[str, ...] = ()
    ticket_key: str = ""
    own: str = ""
    ask: bytes = ASK
    preloaded: bool = False
    root: Path = ROOT

    def in_tree(self, root: Path) -> Program:
        """Return it in another tree of the repository."""
        command = tuple(each.replace(str(ROOT), str(root)) for each in self.command)
        return replace(self, root=root, command=command, needs=root / self.needs.relative_to(ROOT))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those that it has options for."""
        mirrored = self.mirror or self.preloaded
        shared = self.tickets or self.preloaded
        return (
            BARE,
            *([OWN] if self.ticket_key else []),
            *([MIRROR] if mirrored else []),
            CALL,
            *([TICKETS] if shared else []),
        )

    def missing(self) -> str:
        """Return what has to be built first."""
        absent = [
            path for path in (self.command[0], str(self.needs)) if not shutil.which(path) and not Path(path).exists()
        ]
        return f"{absent[0].removeprefix(f'{ROOT}/')} is not there" if absent else ""

    @contextlib.contextmanager
    def running(self, kind: str, around: Surroundings) -> Iterator[Server]:
        """Run one."""
        command = [*self.command, "--certificate", str(around.certificate)]
        folders = ("server", "client/python", "tests", ".")
        environment = {**os.environ, "PYTHONPATH": ":".join(str(self.root / folder) for folder in folders)}
        if kind == OWN:
            command += [self.ticket_key, str(around.ticket_key)]
        elif kind != BARE and self.preloaded:
            environment |= _preloaded(self._namespace(kind, around), kind, around, self.root)
        elif kind != BARE:
            command += ["--target", around.target, "--namespace", self._namespace(kind, around)]
            command += ["--deadline", self.deadline, "--keyring", str(around.keyring), *self._more(kind, around)]
        with subprocess.Popen(
            command, cwd=self.root, text=True, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        ) as process:
            try:
                assert process.stdout
                port = re.search(r"(\d+)\D*$", process.stdout.readline())
                assert port, f"{self.name} did not start"
                yield Server(Endpoint.resolved("127.0.0.1", int(port[1])), process.pid)
            finally:
                process.terminate()

    def _more(self, kind: str, around: Surroundings) -> tuple[str, ...]:
        if kind != TICKETS:
            return self.mirror if kind == MIRROR else ()
        return tuple(each.format(rotation=around.rotation, lifetime=around.lifetime) for each in self.tickets)

    def _namespace(self, kind: str, around: Surroundings) -> str:
        if kind == TICKETS and around.namespace:
            return around.namespace
        return f"{self.name}.{kind}".lower().replace(" ", "-")  # or mirrors of others would have to hear of it


@dataclass(frozen=True)
class Debian:
    """A server of tests/preload.

    Attributes:
        name: How tables call it.
        server: How tests/preload does.
        own: What OWN is.
        own_configuration: What makes it share as OWN says; "{around.ticket_key}" and the like are filled in.
        needs: Another program for that.
        kinds: Those of BARE, OWN, MIRROR, CALL and TICKETS that it can be.
        ask: What it answers.
        root: The repository.
    """

    name: str
    server: str
    own: str
    own_configuration: str
    needs: str
    kinds: tuple[str, ...] = (BARE, OWN, MIRROR, CALL, TICKETS)
    ask: bytes = _HTTP
    root: Path = ROOT

    def in_tree(self, root: Path) -> Debian:
        """Return it with the library of another tree of the repository."""
        return replace(self, root=root)

    def missing(self) -> str:
        """Return what has to be installed or built first."""
        absent = [program for program in (SERVERS[self.server][0], self.needs) if not shutil.which(program)]
        if absent:
            return f"{absent[0]} is not installed"
        return "" if LIBRARY.exists() else f"{LIBRARY.relative_to(ROOT)} is not there"

    @contextlib.contextmanager
    def running(self, kind: str, around: Surroundings) -> Iterator[Server]:
        """Run one, with one worker process."""
        more = self.own_configuration.format(around=around) if kind == OWN else ""
        namespace = around.namespace if kind == TICKETS and around.namespace else f"{self.server}.{kind}"
        shim = _preloaded(namespace, kind, around, self.root) if kind in {MIRROR, CALL, TICKETS} else None
        with serving(self.server, around.certificate, shim, workers=1, more=more) as server:
            yield Server(Endpoint.resolved("127.0.0.1", server.port), server.process.pid)


def _preloaded(namespace: str, kind: str, around: Surroundings, root: Path) -> dict[str, str]:
    more = {
        MIRROR: {"mirror": str(_MIRROR_BYTES)},
        TICKETS: {
            "mirror": "0",
            "sessions": "tickets",
            "tickets_tls12": "1",
            "rotation": str(around.rotation),
            "lifetime": str(around.lifetime),
            "ignore_id_context": "1",  # as frontends of unlike stacks need it
        },
    }.get(kind, {"mirror": "0"})
    environment = settings(around.target, namespace, around.keyring, deadline=str(_DEADLINE), **more)
    return environment | {"LD_PRELOAD": str(root / LIBRARY.relative_to(ROOT))}


_TICKETS = ("--sessions", "tickets", "--tickets-tls12", "--rotation", "{rotation}", "--lifetime", "{lifetime}")


def _python(name: str) -> Program:
    command = (sys.executable, str(FRONTEND), "--name", name, "--stack", name.lower())
    return Program(name, command, FRONTEND, str(_DEADLINE), ("--mirror",), _TICKETS)


_MILLISECONDS = str(round(_DEADLINE * 1000))
Stack = Program | Debian
_SSL = _python("ssl")
STACKS: tuple[Stack, ...] = (
    _SSL,
    _python("pyOpenSSL"),
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
    Debian("nginx", "nginx", "ssl_session_ticket_key", "ssl_session_ticket_key {around.ticket_key};", "nginx"),
    Debian(
        "Apache",
        "apache",
        "mod_socache_memcache",
        "LoadModule socache_memcache_module /usr/lib/apache2/modules/mod_socache_memcache.so\n"
        "SSLSessionCache memcache:{around.memcached}\nSSLSessionTickets off",
        MEMCACHED,
    ),
)


def _family(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
            yield from _family(int(child))


def _used(pid: int) -> float:
    with contextlib.suppress(OSError):  # it may have ended
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK
    return 0.0
