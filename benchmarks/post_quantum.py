"""Handshakes with post-quantum certificates, and their bytes on the wire: `python benchmarks/post_quantum.py`.

Two frontends of pyOpenSSL and a client in one process, TLS 1.3, a store beside them. Each certificate has one
intermediate of its own kind, as public ones have. The kinds of handshake take turns; the time is the processor time of
the server's end alone. A certificate with ML-DSA (FIPS 204) needs OpenSSL 3.5.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, mldsa, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from OpenSSL import SSL, crypto
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

import resumed
from benchmarks.bench.results import ratios
from benchmarks.measuring import spread
from support.server import running_server
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEYS: dict[str, Callable[[], Any]] = {
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "RSA-2048": lambda: rsa.generate_private_key(65_537, 2_048),
    "ML-DSA-44": mldsa.MLDSA44PrivateKey.generate,
    "ML-DSA-65": mldsa.MLDSA65PrivateKey.generate,
}
FULL, FULL_TICKETS, TICKETS, STORED = "full, without", "full, tickets", "resumed, tickets", "resumed, stored"
VISITS = 10
"""Handshakes of each kind in a turn."""
CHUNK = 1 << 16


class Chain(NamedTuple):
    """A key with its certificate and the intermediate that issued it."""

    key: Any
    certificates: tuple[x509.Certificate, x509.Certificate]

    @classmethod
    def generate(cls, generate_key: Callable[[], Any]) -> Chain:
        """Return a chain for localhost."""
        root, intermediate, key = (generate_key() for _ in range(3))
        names = [_name(text) for text in ("root", "intermediate", "localhost")]
        return cls(
            key,
            (
                _certificate(names[2], key, names[1], intermediate),
                _certificate(names[1], intermediate, names[0], root),
            ),
        )

    def context(self) -> SSL.Context:
        """Return a context of a server that has this chain."""
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.use_certificate(self.certificates[0])
        context.add_extra_chain_cert(self.certificates[1])
        encoded = self.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        context.use_privatekey(crypto.load_privatekey(crypto.FILETYPE_ASN1, encoded))
        return context


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(subject: x509.Name, key: Any, issuer: x509.Name, issuer_key: Any) -> x509.Certificate:
    now = dt.datetime.now(dt.timezone.utc)
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + dt.timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    is_post_quantum = type(issuer_key).__name__.startswith("MLDSA")
    return builder.sign(issuer_key, None if is_post_quantum else hashes.SHA256())


class Handshake(NamedTuple):
    """A handshake, with the tickets behind it."""

    resumed: bool
    seconds: float
    sent: int
    """Bytes from the server."""
    received: int
    session: SSL.Session | None


class Client:
    """Visits servers in memory."""

    def __init__(self) -> None:
        self._context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        self._context.set_verify(SSL.VERIFY_PEER, self._verify)
        self._verified = False

    def _verify(self, *_: object) -> bool:
        """Accept all: it is called in full handshakes only, and pyOpenSSL does not show which ones those are."""
        self._verified = True
        return True

    def visit(self, server_context: SSL.Context, session: SSL.Session | None = None) -> Handshake:
        """Connect, offering `session`."""
        self._verified = False
        server, client = SSL.Connection(server_context, None), SSL.Connection(self._context, None)
        server.set_accept_state()
        client.set_connect_state()
        client.set_tlsext_host_name(b"localhost")
        if session:
            client.set_session(session)
        seconds, bytes_of = 0.0, {client: 0, server: 0}

        def step(end: SSL.Connection, other: SSL.Connection) -> None:
            with contextlib.suppress(SSL.WantReadError):
                end.do_handshake()
                end.recv(1)  # takes in tickets
            with contextlib.suppress(SSL.WantReadError):
                while True:
                    data = end.bio_read(CHUNK)
                    other.bio_write(data)
                    bytes_of[end] += len(data)

        for _ in range(3):
            step(client, server)
            began = time.thread_time()
            step(server, client)
            seconds += time.thread_time() - began
        step(client, server)
        result = Handshake(not self._verified, seconds, bytes_of[server], bytes_of[client], client.get_session())
        client.shutdown()
        server.shutdown()
        return result


@contextlib.contextmanager
def frontends(
    chain: Chain, target: str, mode: Literal["stored", "tickets"], keyring: Path
) -> Iterator[list[SSL.Context]]:
    """Yield two contexts that share their sessions."""
    contexts = [chain.context() for _ in range(2)]
    with contextlib.ExitStack() as stack:
        for context in contexts:
            installation = resumed.install(
                context, target=target, namespace=mode, keyring=str(keyring), sessions=mode, deadline=1.0
            )
            stack.callback(installation.uninstall)
        client = Client()
        until(lambda: client.visit(contexts[1], client.visit(contexts[0]).session).resumed)
        yield contexts


def measure(name: str, target: str, folder: Path, turns: int) -> dict[str, list[list[Handshake]]]:
    """Return the handshakes of each kind by turn."""
    chain, client = Chain.generate(KEYS[name]), Client()
    keyring = folder / f"{name}.keys"
    keyring.write_text(resumed.Keyring.generate(), encoding="ascii")
    keyring.chmod(0o600)
    found: dict[str, list[list[Handshake]]] = {kind: [] for kind in (FULL, FULL_TICKETS, TICKETS, STORED)}
    with (
        frontends(chain, target, "tickets", keyring) as by_ticket,
        frontends(chain, target, "stored", keyring) as by_id,
    ):
        bare = chain.context()
        for _ in track(range(turns), description=name):
            for kind in random.sample(list(found), len(found)):
                if kind in {FULL, FULL_TICKETS}:
                    server = bare if kind is FULL else by_ticket[0]
                    found[kind].append([client.visit(server) for _ in range(VISITS)])
                    continue
                one, other = by_ticket if kind is TICKETS else by_id
                sessions = [client.visit(one).session for _ in range(VISITS)]
                returning = [client.visit(other, session) for session in sessions]
                found[kind].append([each for each in returning if each.resumed])
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15, help="turns of each kind (default: %(default)s)")
    options = parser.parse_args()
    table = Table("certificate", "handshake", "server's ms", "÷ full, without", "bytes sent", "bytes received")
    with running_server() as store, tempfile.TemporaryDirectory() as folder:
        for name in KEYS:
            found = measure(name, store.target, Path(folder), options.turns)
            times = {
                kind: [statistics.median(each.seconds for each in turn) * 1e3 for turn in turns]
                for kind, turns in found.items()
            }
            for kind, turns in found.items():
                all_of_kind = [each for turn in turns for each in turn]
                sent, received = (
                    statistics.median(getattr(each, side) for each in all_of_kind) for side in ("sent", "received")
                )
                table.add_row(
                    *(name, kind, spread(times[kind]), spread(ratios(times[kind], times[FULL]))),
                    *(f"{sent:,.0f}", f"{received:,.0f}"),
                )
    Console().print(table)


if __name__ == "__main__":
    main()
