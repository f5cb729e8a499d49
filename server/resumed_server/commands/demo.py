"""`resumed demo`: a store, frontends of two TLS stacks, and real clients that resume across them.

Everything is real and thrown away afterwards: processes, certificates, the keyring, the store, all in one temporary
directory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
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
import threading
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from rich.console import Console
from rich.table import Table
from rich.text import Text

import resumed
from resumed_server.commands.keygen import keygen
from resumed_server.config import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROUNDS = 5
"""Handshakes of each kind that a line of the table is made of."""
PATIENCE = 20.0
"""Seconds that a process may take for anything; only a broken one takes them."""
NAMESPACE = "demo"

_STACKS = {"ssl": "ssl", "pyOpenSSL": "pyopenssl"}
_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_BAD_RECORD = b"\x17\x03\x03\x00\x40" + bytes(64)  # application data that does not authenticate

_NEXT = """\
Any frontend that has the keyring resumes what any other negotiated, and the store learns no id and no secret.
On one machine a resumption saves computing only; over a network TLS 1.2 saves a round trip as well.
For your own ssl server: `resumed keygen fleet.keys`, `resumed serve`, and then

    import resumed, ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("server.pem")
    resumed.install(context, target="127.0.0.1:7400", namespace="shop", keyring="fleet.keys")
    # ... serve with this context as before, in as many processes as you like
"""


def demo() -> bool:
    """Run the demonstration and return whether everything resumed that should, and nothing that should not.

    Raises:
        UserError: pyOpenSSL is missing, or a process does not start.
    """
    if not all(map(importlib.util.find_spec, ("OpenSSL", "elftools"))):
        raise UserError("pyOpenSSL is missing, the second TLS stack of the demo: pip install 'resumed[pyopenssl]'")
    console = Console()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # through all that tidies up
    with (
        tempfile.TemporaryDirectory(prefix="resumed-demo-") as directory,
        console.status("making a throw-away certificate and keyring") as status,
        contextlib.closing(_Fleet(Path(directory), status.update)) as fleet,
    ):
        clients: list[_Client] = [_PythonClient(fleet.ca)]
        if openssl := shutil.which("openssl"):
            clients.insert(0, _OpenSSLClient(fleet.ca, openssl))
        crossings = [
            _crossing(fleet, client, version, first, second, status.update)
            for client in clients
            for version in _VERSIONS
            for first, second in (tuple(_STACKS), tuple(reversed(_STACKS)))
        ]
        console.print(_crossings_table(crossings))
        if not openssl:
            console.print("openssl is not installed: these were Python's clients only.", style="yellow")
        status.update("asking the store what it holds")
        python = _PythonClient(fleet.ca)
        console.print(_sight(fleet, python))
        status.update("ending sessions")
        endings = list(_endings(fleet, python))
        console.print(_endings_table(endings))
    well = all(crossing.reused == ROUNDS for crossing in crossings) and all(ending.as_promised for ending in endings)
    console.print(Text(_NEXT if well else "Not everything went as promised: see the red lines above."), soft_wrap=True)
    return well


class _Fleet:
    """A store and its frontends, each a process of its own. close() ends them."""

    def __init__(self, directory: Path, tell: Callable[[str], object]) -> None:
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._directory = directory
        self.ca, self._certificate = _certificates(directory)
        keygen(str(directory / "fleet.keys"))
        self.keyring = resumed.Keyring.load(directory / "fleet.keys")
        try:
            tell("starting the store")
            self.target = self._start_store()
            tell("starting the frontends")
            self._ports = self._start_frontends()
        except BaseException:
            self.close()
            raise

    def port(self, frontend: str) -> int:
        """Return the port of a frontend: `ssl` or `pyOpenSSL`, or with ` once` behind it its single-use twin."""
        return self._ports[frontend]

    def stop(self, name: str) -> None:
        """End one process as its operator would."""
        process = self._processes.pop(name)
        process.terminate()
        _ended(process)

    def close(self) -> None:
        """End all processes."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave one behind
        processes = list(self._processes.values())
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            _ended(process)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _start_store(self) -> str:
        options = {
            "listen": "127.0.0.1:0", "store": f"lmdb://{self._directory}/store", "workers": "1", "drain": "0s",
            "log-format": "json", "log-level": "info",
        }  # fmt: skip
        given = [text for name, value in options.items() for text in (f"--{name}", value)]
        self._start("store", "resumed_server.cli", "serve", *given)
        target: str = self._told("store", "addresses")["addresses"][0]
        self._told("store", "event", "ready")
        return target

    def _start_frontends(self) -> dict[str, int]:
        for name, stack in _STACKS.items():
            common = [
                "resumed_server.demo_frontend", "--stack", stack, "--certificate", str(self._certificate),
                "--target", self.target, "--keyring", str(self._directory / "fleet.keys"),
            ]  # fmt: skip
            self._start(name, *common, "--name", name, "--namespace", NAMESPACE)
            once = f"{name} once"
            self._start(once, *common, "--name", once, "--namespace", f"{NAMESPACE}-once", "--single-use")
        return {name: self._told(name, "port")["port"] for name in self._processes if name != "store"}

    def _start(self, name: str, module: str, *arguments: str) -> None:
        self._processes[name] = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _told(self, name: str, field: str, value: str | None = None) -> dict[str, Any]:
        """Return the next line of JSON from a process that has `field`, and there `value`."""
        process = self._processes[name]
        said = ""
        impatience = threading.Timer(PATIENCE, process.kill)
        impatience.start()
        try:
            for said in process.stdout or ():
                with contextlib.suppress(ValueError):
                    line = json.loads(said)
                    if field in line and value in {None, line[field]}:
                        return dict(line)
        finally:
            impatience.cancel()
        raise UserError(f"the demo's {name} process did not start: {said.strip() or 'it said nothing'}")


def _ended(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()


def _certificates(directory: Path) -> tuple[Path, Path]:
    """Make a CA and a server's certificate with its key; return the paths of the CA and of the other two in one."""
    now = datetime.now(timezone.utc)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "resumed demo CA")])
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    signs = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    hosts = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])

    def signed(
        subject: x509.Name, public_key: ec.EllipticCurvePublicKey, extensions: dict[x509.ExtensionType, bool]
    ) -> bytes:
        builder = x509.CertificateBuilder(ca_name, subject, public_key, x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
        for extension, critical in extensions.items():
            builder = builder.add_extension(extension, critical)
        return builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    ca = signed(
        ca_name,
        ca_key.public_key(),
        {
            x509.BasicConstraints(ca=True, path_length=0): True,
            x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, **signs): True,
            x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()): False,
        },
    )
    certificate = signed(
        name,
        key.public_key(),
        {
            hosts: False,
            x509.BasicConstraints(ca=False, path_length=None): True,
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()): False,
        },
    )
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    paths = directory / "ca.pem", directory / "frontend.pem"
    paths[0].write_bytes(ca)
    paths[1].write_bytes(certificate + key.private_bytes(*pem))
    return paths


@dataclass
class _Visit:
    """What one connection was like: whether it resumed, the session to resume next, and what the frontend said."""

    reused: bool
    session: Any
    answer: dict[str, Any]


class _Client(Protocol):
    name: str

    def visit(self, port: int, version: str, session: Any = None) -> _Visit:
        """Connect, offer `session`, and hear who answers."""


class _OpenSSLClient:
    """`openssl s_client`; its sessions are files."""

    name = "openssl s_client"

    def __init__(self, ca: Path, openssl: str) -> None:
        self._ca, self._openssl = ca, openssl
        self._sessions = 0

    def visit(self, port: int, version: str, session: Any = None) -> _Visit:
        self._sessions += 1
        fresh = self._ca.with_name(f"session{self._sessions}.pem")
        command = [
            self._openssl, "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "localhost",
            "-CAfile", str(self._ca), "-verify_return_error", f"-tls{version.replace('.', '_')}",
            "-ign_eof", "-sess_out", str(fresh), *(["-sess_in", str(session)] if session else []),
        ]  # fmt: skip
        # Its exit status is 1: it objects to connections that end without close_notify.
        done = subprocess.run(
            command, input="bye\n", capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False
        )
        answer = re.search(r"^\{.*\}$", done.stdout, re.MULTILINE)
        outcome = re.search(r"^(New|Reused), ", done.stdout, re.MULTILINE)
        if answer is None or outcome is None:
            raise UserError(f"openssl s_client did not get through: {' '.join(done.stderr.split())}")
        return _Visit(outcome[1] == "Reused", fresh, json.loads(answer[0]))


class _PythonClient:
    """Python's own `ssl`."""

    name = "Python ssl"

    def __init__(self, ca: Path) -> None:
        self._contexts = {}
        for name, version in _VERSIONS.items():
            self._contexts[name] = ssl.create_default_context(cafile=str(ca))
            self._contexts[name].minimum_version = self._contexts[name].maximum_version = version

    def visit(self, port: int, version: str, session: Any = None, line: str = "bye", spoil: bool = False) -> _Visit:
        """Connect and say `line`; with `spoil` end with a bad record, a fatal error."""
        with (
            socket.create_connection(("127.0.0.1", port), PATIENCE) as connection,
            self._contexts[version].wrap_socket(connection, server_hostname="localhost", session=session) as tls,
            tls.makefile("r", encoding="ascii") as lines,
        ):
            tls.sendall(f"{line}\n".encode())
            visit = _Visit(bool(tls.session_reused), None, json.loads(lines.readline()))
            visit.session = tls.session  # in TLS 1.3 it came with the answer
            if spoil:
                socket.socket.sendall(tls, _BAD_RECORD)  # past TLS
                while socket.socket.recv(tls, 4096):
                    pass
        return visit


@dataclass
class _Crossing:
    """How often sessions of one frontend resumed at another."""

    client: str
    version: str
    first: str
    second: str
    full: float
    resumed: float
    reused: int


def _crossing(
    fleet: _Fleet, client: _Client, version: str, first: str, second: str, tell: Callable[[str], object]
) -> _Crossing:
    tell(f"{client.name}, TLS {version}: from {first} to {second}")
    session = client.visit(fleet.port(first), version).session
    full = [client.visit(fleet.port(second), version) for _ in range(ROUNDS)]
    again = [client.visit(fleet.port(second), version, session) for _ in range(ROUNDS)]
    times = (statistics.median(visit.answer["handshake_seconds"] for visit in visits) for visits in (full, again))
    return _Crossing(client.name, version, first, second, *times, sum(visit.reused for visit in again))


def _crossings_table(crossings: list[_Crossing]) -> Table:
    table = Table(
        title="Sessions across two frontends, two processes, two OpenSSLs", title_justify="left",
        caption=f"times: handshakes as the resuming frontend sees them, median of {ROUNDS}", caption_justify="left",
    )  # fmt: skip
    for heading in ("client", "TLS", "negotiated by", "resumed by"):
        table.add_column(heading, no_wrap=True)
    for heading in ("full", "resumed", "reused"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in crossings:
        times = (f"{1000 * seconds:.1f} ms" for seconds in (row.full, row.resumed))
        reused = _judged(f"{row.reused} of {ROUNDS}", row.reused == ROUNDS)
        table.add_row(row.client, row.version, row.first, row.second, *times, reused)
    return table


def _judged(text: str, good: bool) -> Text:
    return Text(text, "green" if good else "bold red")


def _sight(fleet: _Fleet, client: _PythonClient) -> Table:
    """Show one session as the client has it and as the store has it."""
    session = client.visit(fleet.port("ssl"), "1.2").session
    client.visit(fleet.port("ssl"), "1.2", line="flush")
    key = resumed.StoreKeys(NAMESPACE).key(session.id)
    with contextlib.closing(resumed.SessionStore(fleet.target, namespace=NAMESPACE, deadline=PATIENCE)) as store:
        found = store.get(key)
    if found is None:
        raise UserError("the store does not have the session that was just negotiated")
    value = found.value
    until = datetime.fromtimestamp(int.from_bytes(value[5:13], "big"), timezone.utc)
    serialized, _ = fleet.keyring.open(key, value, datetime.now(timezone.utc).timestamp())
    calls = [client.visit(fleet.port(name), "1.3", line="stats").answer for name in _STACKS]
    table = Table(title="What the store saw, of one of these sessions", title_justify="left")
    table.add_column("")
    table.add_column("in the clear: client and frontends only")
    table.add_column("in the store")
    table.add_row("id", _hex(session.id), f"{_hex(key)}\nits SHA-256, with the namespace")
    table.add_row(
        "session",
        f"{len(serialized)} bytes (ASN.1)\nmaster secret and all: not shown",
        f"{len(value)} bytes\n{value[:1].hex()} key {value[1:5].hex()} until {until:%H:%M:%S} UTC\n"
        f"nonce {value[13:25].hex()}\nsealed {value[25:33].hex()}...",
    )
    table.add_row(
        "calls", "",
        f"{sum(each['puts'].get('stored', 0) for each in calls)} sessions put, "
        f"{sum(sum(each['lookup_seconds']) for each in calls)} looked up, "
        f"{sum(sum(each['hits'].values()) for each in calls)} found",
    )  # fmt: skip
    return table


def _hex(data: bytes) -> str:
    return f"{data[:8].hex()}... ({len(data)} bytes)"


@dataclass
class _Ending:
    """What was tried with a session after something happened to it."""

    event: str
    version: str
    then: str
    reused: bool
    expected: bool

    @property
    def as_promised(self) -> bool:
        return self.reused is self.expected


def _endings(fleet: _Fleet, client: _PythonClient) -> Iterator[_Ending]:
    """Let sessions end in all ways, the last of which stops a frontend."""
    ssl_port, pyopenssl_port = fleet.port("ssl"), fleet.port("pyOpenSSL")
    for version in _VERSIONS:
        session = client.visit(ssl_port, version).session
        spoilt = client.visit(pyopenssl_port, version, session, line="who", spoil=True)
        client.visit(pyopenssl_port, version, line="flush")
        yield _Ending("bad record at pyOpenSSL", version, "there, before it", spoilt.reused, True)
        for name in _STACKS:
            reused = client.visit(fleet.port(name), version, session).reused
            yield _Ending("bad record at pyOpenSSL", version, f"at {name}, after it", reused, False)
    for version in _VERSIONS:
        session = client.visit(fleet.port("ssl once"), version).session
        for then, name, expected in (("1st time", "pyOpenSSL once", True), ("2nd time", "ssl once", False)):
            reused = client.visit(fleet.port(name), version, session).reused
            yield _Ending("single use", version, f"{then}, at {name.removesuffix(' once')}", reused, expected)
    sessions = {version: client.visit(ssl_port, version).session for version in _VERSIONS}
    fleet.stop("ssl")
    for version, session in sessions.items():
        reused = client.visit(pyopenssl_port, version, session).reused
        yield _Ending("the ssl frontend stops", version, "at pyOpenSSL, after it", reused, True)


def _endings_table(endings: list[_Ending]) -> Table:
    table = Table(title="What ends a session, and what does not", title_justify="left")
    for heading in ("what happens", "TLS", "tried", "resumes"):
        table.add_column(heading, no_wrap=True)
    for row in endings:
        resumes = _judged("yes" if row.reused else "no", row.as_promised)
        table.add_row(row.event, row.version, row.then, resumes)
    return table
