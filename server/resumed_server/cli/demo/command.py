"""`resumed demo`: a store, frontends with two TLS stacks, and TLS clients that resume across them.

Processes, certificate, keyring and store are real, in a temporary directory that is deleted at the end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import resumed
from resumed_server.cli.demo.fleet import NAMESPACE, PATIENCE, STACKS, Broken, Fleet
from resumed_server.cli.options import AsJson
from resumed_server.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS = 5
"""Handshakes of each kind for one row of the table."""

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_PAUSE = 0.02
_BAD_RECORD = b"\x17\x03\x03\x00\x40" + bytes(64)  # application data that does not authenticate

_NEXT = """
Any frontend that has the keyring resumes what any other negotiated; the store learns no id and no secret.
A look-up took {lookup:.1f} ms here. On one machine that is no less than it saves with a P-256 certificate; over a
network a resumption saves TLS 1.2 a whole round trip, and both versions the certificates and their checks.
For a server of your own: `resumed keygen fleet.keys`, `resumed serve`, and in each of its processes

    import resumed, ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("server.pem")
    resumed.install(context, target="127.0.0.1:7400", namespace="shop", keyring="fleet.keys")
    # serve with this context as before

With sessions="tickets" the clients keep their sessions, in tickets whose keys the frontends agree on through the store:
a resumption is no call then (docs/tickets.md).
"""


def demo(as_json: AsJson = False) -> None:
    """Watch a store and two frontends, with ssl and with pyOpenSSL, resume each other's TLS sessions.

    The exit status is 1 if a session did not resume that should, or the reverse.
    """
    if not all(map(importlib.util.find_spec, ("OpenSSL", "elftools"))):
        raise UserError("pyOpenSSL is missing, the second TLS stack of the demo: pip install 'resumed[pyopenssl]'")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # runs all context managers
    console = Console(stderr=as_json)
    try:
        with tempfile.TemporaryDirectory(prefix="resumed-demo-") as directory:
            as_expected = _run(console, Path(directory), as_json=as_json)
    except (Broken, OSError, ValueError, subprocess.SubprocessError) as error:
        console.print(Text(f"The demo was aborted: {error}", "bold red"), soft_wrap=True)
        raise typer.Exit(1) from None
    if not as_expected:
        console.print(Text("Some results are not as expected: see the red rows.", "bold red"))
        raise typer.Exit(1)


def _run(console: Console, directory: Path, *, as_json: bool) -> bool:
    with console.status("starting") as status, contextlib.closing(Fleet(directory, status.update)) as fleet:
        python, openssl = _PythonClient(fleet.certificate), shutil.which("openssl")
        clients: list[_Client] = [_OpenSSLClient(directory, fleet.certificate, openssl)] if openssl else []
        crossings = []
        for client in (*clients, python):
            for version in _VERSIONS:
                for first, second in (tuple(STACKS), tuple(reversed(STACKS))):
                    status.update(f"{client.name}, TLS {version}: from {first} to {second}")
                    crossings.append(_crossing(fleet, client, version, first, second))
        status.update("agreeing on ticket keys")
        _await_tickets(fleet, python)
        crossings += [
            _crossing(fleet, python, version, *(f"{name} tickets" for name in names))
            for version in _VERSIONS
            for names in (tuple(STACKS), tuple(reversed(STACKS)))
        ]
        if not as_json:
            console.print(_crossings_table(crossings))
            if not openssl:
                console.print("(openssl is not installed: only Python's client was used)")
        status.update("querying the store")
        calls = _calls(fleet, python)
        if not as_json:
            console.print(_sight(fleet, python, calls))
        status.update("ending sessions")
        endings = list(_endings(fleet, python))
    as_expected = all(crossing.reused == ROUNDS for crossing in crossings) and all(ending.kept for ending in endings)
    if as_json:
        found = {"ok": as_expected, "rounds": ROUNDS, "calls": vars(calls)}
        rows = {"crossings": list(map(vars, crossings)), "endings": list(map(vars, endings))}
        Console(soft_wrap=True).print_json(data=found | rows)
        return as_expected
    console.print(_endings_table(endings))
    console.print(Text(_NEXT.format(lookup=1000 * calls.seconds / max(calls.lookups, 1))), soft_wrap=True)
    return as_expected


@dataclass
class _Connection:
    """One connection: whether it resumed, the session for the next one, and the response of the frontend."""

    reused: bool
    session: Any
    answer: dict[str, Any]


class _OpenSSLClient:
    """`openssl s_client`; its sessions are files."""

    name = "s_client"

    def __init__(self, directory: Path, ca: Path, openssl: str) -> None:
        self._directory, self._ca, self._openssl = directory, ca, openssl
        self._visits = 0

    def visit(self, port: int, version: str, session: Any = None) -> _Connection:
        """Connect, offer `session`, and read the response."""
        self._visits += 1
        fresh = self._directory / f"session{self._visits}.pem"
        command = [
            self._openssl, "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "localhost",
            "-CAfile", str(self._ca), "-verify_return_error", f"-tls{version.replace('.', '_')}",
            "-ign_eof", "-sess_out", str(fresh), *(["-sess_in", str(session)] if session else []),
        ]  # fmt: skip
        # Its exit status is 1 for a connection that ends without close_notify.
        done = subprocess.run(  # noqa: S603 - all of it from here
            command, input="bye\n", capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False
        )
        answer = re.search(r"^\{.*\}$", done.stdout, re.MULTILINE)
        outcome = re.search(r"^(New|Reused), ", done.stdout, re.MULTILINE)
        if answer is None or outcome is None:
            raise Broken(f"openssl s_client failed: {' '.join(done.stderr.split())}")
        return _Connection(outcome[1] == "Reused", fresh, json.loads(answer[0]))


class _PythonClient:
    """Python's `ssl`."""

    name = "Python"

    def __init__(self, ca: Path) -> None:
        self._contexts = {}
        for name, version in _VERSIONS.items():
            context = self._contexts[name] = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(ca)
            context.minimum_version = context.maximum_version = version

    def visit(
        self, port: int, version: str, session: Any = None, line: str = "bye", spoil: bool = False
    ) -> _Connection:
        """Connect and send `line`; with `spoil` end the connection by a bad record, a fatal error."""
        with (
            socket.create_connection(("127.0.0.1", port), PATIENCE) as connection,
            self._contexts[version].wrap_socket(connection, server_hostname="localhost", session=session) as tls,
            tls.makefile("r", encoding="ascii") as lines,
        ):
            tls.sendall(f"{line}\n".encode())
            visit = _Connection(bool(tls.session_reused), None, json.loads(lines.readline()))
            visit.session = tls.session  # in TLS 1.3 it arrives with the response
            if spoil:
                socket.socket.sendall(tls, _BAD_RECORD)  # bypasses TLS
                while socket.socket.recv(tls, 4096):
                    pass
        return visit


_Client: TypeAlias = _OpenSSLClient | _PythonClient


@dataclass
class _Crossing:
    """The number of sessions of one frontend that resumed at another, with the times of handshakes."""

    client: str
    version: str
    first: str
    second: str
    full: float
    resumed: float
    reused: int


def _crossing(fleet: Fleet, client: _Client, version: str, first: str, second: str) -> _Crossing:
    port = fleet.ports[second]
    session = client.visit(fleet.ports[first], version).session
    full = [client.visit(port, version) for _ in range(ROUNDS)]
    again = [client.visit(port, version, session) for _ in range(ROUNDS)]
    reused = sum(visit.reused for visit in again)
    return _Crossing(client.name, version, first, second, _median_seconds(full), _median_seconds(again), reused)


def _await_tickets(fleet: Fleet, client: _PythonClient) -> None:
    """Wait until the frontends with tickets have a secret, and the removals."""
    end = time.monotonic() + PATIENCE
    for name in STACKS:
        while True:
            state = client.visit(fleet.ports[f"{name} tickets"], "1.3", line="stats").answer
            if state["removals_live"] and state["ticket_secrets_held"]:
                break
            if time.monotonic() > end:
                raise Broken(f"the frontend {name} did not agree on ticket keys")
            time.sleep(_PAUSE)


def _median_seconds(visits: list[_Connection]) -> float:
    return statistics.median(float(visit.answer["handshake_seconds"]) for visit in visits)


def _crossings_table(crossings: list[_Crossing]) -> Table:
    table = Table(
        title="Sessions that cross processes and TLS stacks",
        title_justify="left",
        caption=f"times: handshakes at the frontend that resumes, median of {ROUNDS}",
        caption_justify="left",
    )
    for heading in ("client", "TLS", "negotiated", "resumed by"):
        table.add_column(heading, no_wrap=True)
    for heading in ("full ms", "resumed ms", "reused"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in crossings:
        reused = _format_verdict(f"{row.reused} of {ROUNDS}", row.reused == ROUNDS)
        times = f"{1000 * row.full:.1f}", f"{1000 * row.resumed:.1f}"
        table.add_row(row.client, row.version, row.first, row.second, *times, reused)
    return table


def _format_verdict(text: str, good: bool) -> Text:
    return Text(text, "green" if good else "bold red")


@dataclass
class _Calls:
    """The calls of the frontends to the store."""

    puts: int
    lookups: int
    hits: int
    seconds: float
    """Total duration of the look-ups."""


def _calls(fleet: Fleet, client: _PythonClient) -> _Calls:
    stats = []
    for name in STACKS:
        client.visit(fleet.ports[name], "1.2", line="flush")
        stats.append(client.visit(fleet.ports[name], "1.2", line="stats").answer)
    return _Calls(
        sum(each["puts"].get("stored", 0) for each in stats),
        sum(sum(each["lookup_seconds"]) for each in stats),
        sum(sum(each["hits"].values()) for each in stats),
        sum(each["lookup_seconds_sum"] for each in stats),
    )


def _sight(fleet: Fleet, client: _PythonClient, calls: _Calls) -> Table:
    """Show one session at the client and the frontends, and in the store."""
    session = client.visit(fleet.ports["ssl"], "1.2").session
    client.visit(fleet.ports["ssl"], "1.2", line="flush")
    key = resumed.StoreKeys(NAMESPACE).key(session.id)
    with contextlib.closing(resumed.StoreClient(fleet.target, namespace=NAMESPACE, deadline=PATIENCE)) as store:
        found = store.get(key)
    if found is None:
        raise Broken("the store does not have a session that was just negotiated")
    sealed = found.value  # for its format see resumed._crypto.sealed_value
    serialized, not_after = fleet.keyring.open(key, sealed, time.time())
    until = datetime.fromtimestamp(not_after, timezone.utc)
    table = Table(title="\nThe same session at the frontends and in the store", title_justify="left")
    for heading in ("", "at client and frontends", "in the store"):
        table.add_column(heading)
    table.add_row(
        "id", f"{_begun(session.id)}\n{len(session.id)} bytes", f"{_begun(key)}\n{len(key)} bytes, a hash of it"
    )
    table.add_row(
        "session",
        f"{len(serialized)} bytes in the clear,\nmaster secret and all\n(not shown)",
        f"{len(sealed)} bytes, sealed:\nkey {sealed[1:5].hex()}, until {until:%H:%M} UTC,\n"
        f"nonce {_begun(sealed[13:25])},\nthen {_begun(sealed[25:])}",
    )
    table.add_row("calls", "", f"{calls.puts} sessions put,\n{calls.lookups} looked up, {calls.hits} found")
    return table


def _begun(data: bytes) -> str:
    return f"{data[:8].hex()}..."


@dataclass
class _Ending:
    """An attempt to resume a session after an event."""

    event: str
    version: str
    then: str
    reused: bool
    expected: bool

    @property
    def kept(self) -> bool:
        return self.reused is self.expected


def _endings(fleet: Fleet, client: _PythonClient) -> Iterator[_Ending]:
    """End sessions in all ways; the last one stops a frontend."""
    ssl_port, pyopenssl_port = fleet.ports["ssl"], fleet.ports["pyOpenSSL"]
    for version in _VERSIONS:
        session = client.visit(ssl_port, version).session
        spoilt = client.visit(pyopenssl_port, version, session, line="who", spoil=True)
        client.visit(pyopenssl_port, version, line="flush")
        yield _Ending("bad record at pyOpenSSL", version, "there, before it", spoilt.reused, True)
        for name in STACKS:
            reused = client.visit(fleet.ports[name], version, session).reused
            yield _Ending("bad record at pyOpenSSL", version, f"at {name}, after it", reused, False)
    for version in _VERSIONS:
        session = client.visit(fleet.ports["ssl once"], version).session
        for then, name, expected in (("1st time", "pyOpenSSL once", True), ("2nd time", "ssl once", False)):
            reused = client.visit(fleet.ports[name], version, session).reused
            yield _Ending("single use", version, f"{then}, at {name.removesuffix(' once')}", reused, expected)
    sessions = {version: client.visit(ssl_port, version).session for version in _VERSIONS}
    fleet.stop("ssl")
    for version, session in sessions.items():
        reused = client.visit(pyopenssl_port, version, session).reused
        yield _Ending("the ssl frontend stops", version, "at pyOpenSSL, after it", reused, True)


def _endings_table(endings: list[_Ending]) -> Table:
    table = Table(title="\nEvents after which a session resumes or not", title_justify="left")
    for heading in ("event", "TLS", "attempt", "resumes"):
        table.add_column(heading, no_wrap=True)
    for row in endings:
        resumes = _format_verdict("yes" if row.reused else "no", row.kept)
        table.add_row(row.event, row.version, row.then, resumes)
    return table
