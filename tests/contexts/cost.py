"""The cost of the context fingerprint for nginx: `python tests/contexts/cost.py --before LIBRARY`.

Two nginx, each with one worker, with libresumed-preload of this tree and with another one, make the same handshakes in
turns: full and resumed, TLS 1.2 and 1.3, with client certificates and without. Shown is the worker's processor time for
a handshake (user and system, all threads, from schedstat), as the median of many short rounds, and the ratio, with the
quartiles of the ratios of rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

import resumed
from preload.servers import LIBRARY, Server, serving, settings
from resumed_server.cli.tls_client import Client, Endpoint
from support.server import running_server
from support.tls import CA

if TYPE_CHECKING:
    from OpenSSL import SSL

VERSIONS = ("1.2", "1.3")
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


class Side:
    """An nginx with one of the libraries, and a client for each version."""

    def __init__(self, server: Server, certificate: Path | None) -> None:
        pid = server.process.pid
        self._worker = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()[0]
        self._endpoint = Endpoint.resolve("127.0.0.1", server.port)
        self._clients = {version: Client("localhost", version, REQUEST) for version in VERSIONS}
        if certificate:
            for client in self._clients.values():
                client._context.use_certificate_chain_file(str(certificate))
                client._context.use_privatekey_file(str(certificate))

    def _processor(self) -> float:
        threads = Path(f"/proc/{self._worker}/task").iterdir()
        return sum(int((thread / "schedstat").read_text(encoding="ascii").split()[0]) for thread in threads) / 1e9

    def seconds(self, version: str, number: int, *, reused: bool) -> float:
        """Make handshakes, and return the worker's processor time for one."""
        client = self._clients[version]
        session: SSL.Session | None = client.visit(self._endpoint).session if reused else None
        time.sleep(0.05)  # it is stored in the background
        began, resumptions = self._processor(), 0
        for _ in range(number):
            visit = client.visit(self._endpoint, session)
            session = visit.session if reused else None
            resumptions += visit.resumed
        assert resumptions == (number if reused else 0), f"{resumptions} of {number} resumed"
        return (self._processor() - began) / number


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="the libresumed_preload.so to compare with")
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--handshakes", type=int, default=30, help="in each round, of each kind, with each library")
    options = parser.parse_args()
    table = Table("nginx", "TLS", "handshake", "before, ms", "now, ms", "ratio")
    with tempfile.TemporaryDirectory(prefix="resumed-cost-") as name, running_server() as store:
        directory = Path(name)
        directory.chmod(0o755)
        for file, issued in ("server", CA.issue_cert("localhost")), ("client", CA.issue_cert("client@example.org")):
            (directory / f"{file}.pem").write_bytes(issued.private_key_and_cert_chain_pem.bytes())
        CA.cert_pem.write_to_path(str(directory / "ca.pem"))
        keyring = directory / "fleet.keys"
        keyring.touch(0o600)
        keyring.write_text(resumed.Keyring.generate() + "\n", encoding="ascii")
        for verifying in False, True:
            more = f"ssl_verify_client on;\nssl_client_certificate {directory / 'ca.pem'};" if verifying else ""
            with contextlib.ExitStack() as stack:
                sides = []
                for number, library in enumerate((options.before, options.library)):
                    environment = settings(store.target, f"cost-{number}", keyring, deadline="5")
                    environment |= {"LD_PRELOAD": str(library), "RESUMED_VERIFIED_NAMESPACE": f"verified-{number}"}
                    server = stack.enter_context(
                        serving("nginx", directory / "server.pem", environment, workers=1, more=more)
                    )
                    sides.append(Side(server, directory / "client.pem" if verifying else None))
                for version in VERSIONS:
                    for reused in False, True:
                        times: tuple[list[float], list[float]] = ([], [])
                        for turn in range(options.rounds + 1):
                            for which in (0, 1) if turn % 2 else (1, 0):
                                taken = sides[which].seconds(version, options.handshakes, reused=reused)
                                if turn:  # the first round warms up
                                    times[which].append(taken)
                        before, now = map(statistics.median, times)
                        low, _, high = statistics.quantiles([b / a for a, b in zip(*times, strict=True)], n=4)
                        table.add_row(
                            "client certificates" if verifying else "plain", version, "resumed" if reused else "full",
                            f"{before * 1e3:.3f}", f"{now * 1e3:.3f}",
                            f"{now / before:.3f} ({low:.2f} to {high:.2f})",
                        )  # fmt: skip
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
