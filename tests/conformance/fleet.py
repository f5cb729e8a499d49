"""The frontends of behaviour.toml as processes, and the table itself."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import resumed
from conformance.client import HOSTS, Client
from resumed._crypto.store_key import StoreKeys
from support.processes import stop
from support.tls import CA
from support.waiting import until

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Iterator

    import trustme

ROOT = Path(__file__).parents[2]
BUILD = ROOT / ".build" / "frontends"
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
"""The versions of TLS, by their names in the table."""
MODES = ("stored", "tickets")
"""Whether the store or the clients keep the sessions."""
DEADLINE = 5.0
"""Deadline in seconds of lookups in tests that do not test lateness, for a loaded machine."""


@dataclass(frozen=True)
class Behaviour:
    """A row of the matrix: see behaviour.toml."""

    callback: str
    situation: str
    must: str
    scenario: str
    modes: list[str] = field(default_factory=lambda: list(MODES))


@dataclass(frozen=True)
class Stack:
    """A frontend of behaviour.toml."""

    name: str
    format: str
    command: list[str]
    single_use: list[str]
    ticket_options: list[str] | None = None
    ticket_format: str = ""
    client_ca: list[str] | None = None
    any_id: list[str] = field(default_factory=list)
    build: list[str] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)
    sealing: str = ""
    needs: str = "sh"
    stored: bool = True
    tickets: bool = False
    cannot: dict[str, str] = field(default_factory=dict)
    cannot_with_tickets: dict[str, str] = field(default_factory=dict)
    versions: list[str] = field(default_factory=lambda: ["1.2", "1.3"])

    @property
    def available(self) -> bool:
        """Whether this machine can run it."""
        return shutil.which(self.needs) is not None

    def in_mode(self, mode: str) -> Stack | None:
        """Return the frontend in a mode, or None if it does not have that."""
        if mode == "stored":
            return self if self.stored else None
        if self.ticket_options is None:
            return None
        cannot = self.cannot | self.cannot_with_tickets
        return replace(self, tickets=True, format=self.ticket_format or self.format, cannot=cannot)

    def run(self, command: list[str]) -> None:
        """Run one of its commands in the root of the repository; raise CalledProcessError if that fails."""
        filled = [part.format(python=sys.executable, build=BUILD) for part in command]
        subprocess.run(filled, cwd=ROOT, check=True, stdin=subprocess.DEVNULL)


def table() -> tuple[list[Behaviour], list[Stack]]:
    """Return what must happen, and the frontends."""
    parsed = tomllib.loads(Path(__file__).with_name("behaviour.toml").read_text(encoding="utf-8"))
    return [Behaviour(**row) for row in parsed["behaviour"]], [Stack(**row) for row in parsed["frontend"]]


class Fleet:
    """Frontends with one keyring and a namespace of their own; it ends them in the end."""

    def __init__(self, stack: Stack, target: str) -> None:
        self.stack = stack
        self.target = target
        self.namespace = f"fleet-{uuid.uuid4().hex}"
        self.keys = [resumed.Keyring.generate()]
        self._directory = Path(tempfile.mkdtemp(prefix="resumed-frontends-"))
        self._processes: list[subprocess.Popen[str]] = []
        self.certificate = self._directory / "certificate.pem"
        self.certificate.write_bytes(_CERTIFICATE)
        self._keyring = self._directory / "fleet.keys"
        self.list_keys(*self.keys)

    def list_keys(self, *keys: str) -> None:
        """Replace the keyring file, as a rotation does."""
        fresh = self._directory / "fresh.keys"
        fresh.touch(0o600)
        fresh.write_text("".join(f"{key}\n" for key in keys), encoding="ascii")
        fresh.replace(self._keyring)

    def start(
        self,
        stack: Stack | None = None,
        *,
        namespace: str | None = None,
        deadline: float = DEADLINE,
        single_use: bool = False,
        any_id: bool = False,
        tickets: bool = False,
        clients_of: trustme.CA | None = None,
        visitor: Client | None = None,
    ) -> int:
        """Start a frontend, visit it, and return its port.

        Args:
            stack: Its stack, if it is not that of the fleet.
            namespace: Its namespace, if it is not that of the fleet.
            deadline: Of its look-ups, in seconds.
            single_use: Whether a session resumes once.
            any_id: Whether it accepts ids of other stacks.
            tickets: Whether it issues tickets. With `stack.tickets` it does, and this waits until it resumes them.
            clients_of: The authority of the client certificates that it requires; None to request none.
            visitor: The client whose certificate it accepts; None for one without a certificate.
        """
        stack = stack or self.stack
        client_ca = self._directory / f"clients-{len(self._processes)}.pem"
        options = [*(stack.single_use if single_use else []), *(stack.any_id if any_id else [])]
        environment = dict(os.environ)
        if tickets or stack.tickets:
            options += stack.ticket_options or []
            environment |= {"RESUMED_SESSIONS": "tickets", "RESUMED_TICKETS_TLS12": "1"}  # for those without options
        if clients_of:
            options += stack.client_ca or []
            clients_of.cert_pem.write_to_path(str(client_ca))
        values = {
            "client_ca": str(client_ca),
            "python": sys.executable,
            "build": str(BUILD),
            "certificate": str(self.certificate),
            "target": self.target,
            "namespace": namespace or self.namespace,
            "keyring": str(self._keyring),
            "seconds": str(deadline),
            "milliseconds": str(round(deadline * 1000)),
        }
        process = subprocess.Popen(
            [part.format(**values) for part in [*stack.command, *options]],
            cwd=ROOT,
            text=True,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._processes.append(process)
        assert process.stdout
        port = re.search(r"(\d+)\D*$", process.stdout.readline())
        assert port, f"{stack.name} did not start"
        for host in HOSTS:  # a process learns from a full handshake which context serves a name
            (visitor or Client(ssl.TLSVersion.TLSv1_2)).visit(int(port[1]), None, host)
        if stack.tickets:
            client = Client(VERSIONS[stack.versions[-1]])
            until(lambda: client.comes_back(int(port[1])))
        return int(port[1])

    def store_key(self, session_id: bytes) -> bytes:
        """Return under which key a session of this fleet is stored."""
        return StoreKeys(self.namespace, self.stack.format).key(session_id)

    def store(self) -> resumed.StoreClient:
        """Return the store as an operator sees it."""
        return resumed.StoreClient(self.target, namespace=self.namespace, deadline=DEADLINE)

    def end(self) -> None:
        """End all frontends."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            stop(process)
            assert process.stdout
            process.stdout.close()
        shutil.rmtree(self._directory)


@contextlib.contextmanager
def fleet(stack: Stack, target: str) -> Iterator[Fleet]:
    """Make a Fleet and end it."""
    made = Fleet(stack, target)
    try:
        yield made
    finally:
        made.end()


_CERTIFICATE = CA.issue_cert(*HOSTS).private_key_and_cert_chain_pem.bytes()
