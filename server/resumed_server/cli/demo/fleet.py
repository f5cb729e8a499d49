"""A store and frontends of both stacks on this machine, each a process, with a temporary certificate and keyring."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import signal
import subprocess
import sys
import threading
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import resumed
from resumed_server.cli.keyring.file import Key, KeyringFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PATIENCE = 20.0
"""Time limit of a process for each step, in seconds."""
NAMESPACE = "demo"
"""The namespace of the frontends; that of the single-use ones is its own."""
STACKS = {"ssl": "ssl", "pyOpenSSL": "pyopenssl"}
"""The frontends, and the names of their stacks as options of frontend.py."""


class Broken(Exception):
    """A part of the demo failed; the message names it and contains its output."""


class Fleet:
    """The processes. close() ends them.

    Args:
        directory: Directory of the certificate, the keyring and the store.
        report: Called with a description of each step.

    Attributes:
        certificate: File with the frontends' certificate, which is its own CA, and its key.
        keyring: The fleet's keyring.
        target: The address of the store.
        ports: The ports of the frontends: those of STACKS, and with " once" or " tickets" behind their names their
            twins for single use and with tickets.
    """

    def __init__(self, directory: Path, report: Callable[[str], object]) -> None:
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._keys = directory / "fleet.keys"
        KeyringFile.create(str(self._keys), Key.generate())
        self.keyring = resumed.Keyring.load(self._keys)
        self.certificate = directory / "frontend.pem"
        self.certificate.write_bytes(_certificate())
        with contextlib.ExitStack() as unless_started:
            unless_started.callback(self.close)
            report("starting the store")
            self.target = self._start_store(directory / "store")
            report("starting the frontends")
            self.ports = self._start_frontends()
            unless_started.pop_all()

    def stop(self, name: str) -> None:
        """End one frontend, as its operator would."""
        process = self._processes.pop(name)
        process.terminate()
        _see_off(process)

    def close(self) -> None:
        """End all processes, the store last."""
        with _signals_deferred():
            for process in reversed(self._processes.values()):
                process.terminate()
            for process in self._processes.values():
                _see_off(process)
            self._processes.clear()

    def _start_store(self, path: Path) -> str:
        listen = ["--listen", "127.0.0.1:0", "--storage", f"lmdb://{path}", "--workers", "1", "--shutdown-delay", "0s"]
        self._start("store", "resumed_server", "serve", *listen, "--log-format", "json", "--log-level", "info")
        target: str = self._read_field("store", "addresses")["addresses"][0]
        while self._read_field("store", "event")["event"] != "ready":
            pass
        return target

    def _start_frontends(self) -> dict[str, int]:
        for name, stack in STACKS.items():
            common = [
                *("resumed_server.cli.demo.frontend", "--stack", stack, "--certificate", str(self.certificate)),
                # The demo shows resumption, also on a busy machine.
                *("--target", self.target, "--keyring", str(self._keys), "--deadline", "1"),
            ]
            once = f"{name} once"
            self._start(name, *common, "--name", name, "--namespace", NAMESPACE)
            self._start(once, *common, "--name", once, "--namespace", f"{NAMESPACE}-once", "--single-use")
            tickets, sharing = f"{name} tickets", ("--sessions", "tickets", "--tickets-tls12")
            self._start(tickets, *common, "--name", tickets, "--namespace", f"{NAMESPACE}-tickets", *sharing)
        return {name: self._read_field(name, "port")["port"] for name in self._processes if name != "store"}

    def _start(self, name: str, module: str, *arguments: str) -> None:
        with _signals_deferred():
            self._processes[name] = subprocess.Popen(  # noqa: S603 - all of it from here
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def _read_field(self, name: str, field: str) -> dict[str, Any]:
        """Return the next line of JSON that a process writes and that has `field`."""
        process = self._processes[name]
        said = ""
        impatience = threading.Timer(PATIENCE, process.kill)
        impatience.daemon = True  # the interpreter's exit must not wait for it after a Ctrl-C
        try:
            impatience.start()
            for said in process.stdout or ():
                with contextlib.suppress(ValueError):
                    line: dict[str, Any] = json.loads(said)
                    if field in line:
                        return line
        finally:
            impatience.cancel()
        raise Broken(f"the process {name!r} did not start: {said.strip() or 'it said nothing'}")


@contextlib.contextmanager
def _signals_deferred() -> Iterator[None]:
    """Handle signals of termination after the block: within it they would leave a process behind."""
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda caught, _: received.append(caught))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for pending in received:
            signal.raise_signal(pending)


def _see_off(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()


def _certificate() -> bytes:
    """Make a certificate for this machine that is its own CA, and return it and its key as PEM."""
    now = datetime.now(timezone.utc)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "resumed demo")])
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
