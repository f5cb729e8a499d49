"""What stays behind in C servers after many handshakes and reloads: `python tests/preload/leaks.py` (`make leaks-c`).

nginx and Apache with libresumed-preload, and client/c/examples/server.c, each with one process that serves, a mirror of
1 MiB or tickets, and TLS 1.2 and 1.3 by turns; one of four handshakes is full. Their resident memory is read after a
warm-up that fills the mirror, and as the handshakes go on. Then nginx and Apache are reloaded again and again: a
session that was negotiated before resumes behind it, and it is the first process, which lives on, whose memory is
read. With --heap the heap's peak is compared as well, by heaptrack. Exits 1 if anything grew.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

import resumed
from preload.servers import ROOT, Server, serving, settings
from resumed_server.cli.tls_client import Client, Endpoint
from support.server import running_server
from support.tls import CA
from support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from OpenSSL import SSL

NAMES = ("C", "nginx", "apache")
STORED, TICKETS = {"mirror": str(1 << 20)}, {"sessions": "tickets", "tickets_tls12": "1"}
BUILD = ROOT / ".build" / "c"
WARM_UP = 5_000
STEPS = 4
RESUMPTIONS = 3
GROWTH = 16
"""Bytes a handshake that count as none: the smallest session is twenty times as large."""
RELOAD_GROWTH = 4_096
"""Bytes a reload that count as none: an SSL_CTX alone takes more."""
NOISE = 1 << 20
"""Growth in all that counts as none."""
RELOADED = {"nginx": signal.SIGHUP, "apache": signal.SIGUSR1}


@contextlib.contextmanager
def running(
    name: str, directory: Path, target: str | None, mode: Mapping[str, str] = STORED
) -> Iterator[tuple[int, int, Server | None]]:
    """Run a server, without a store if `target` is None, and hand out its process id and port."""
    certificate, keyring = directory / "certificate.pem", directory / "fleet.keys"
    if not certificate.exists():
        certificate.write_bytes(CA.issue_cert("localhost").private_key_and_cert_chain_pem.bytes())
        keyring.touch(0o600)
        keyring.write_text(resumed.Keyring.generate() + "\n", encoding="ascii")
    if name == "C":
        command = [str(BUILD / "resumed-server"), "--certificate", str(certificate), "--keyring", str(keyring)]
        command += ["--target", str(target), "--namespace", "shop", "--deadline", "5000", "--mirror", STORED["mirror"]]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            try:
                yield process.pid, int(process.stdout.readline()), None
            finally:
                process.terminate()
    else:
        environment = settings(target, "shop", keyring, deadline="5", **mode) if target else None
        with serving(name, certificate, environment, workers=1) as server:
            yield server.process.pid, server.port, server


def resident(pid: int) -> int:
    """Return the resident bytes of a process and its children."""
    own = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return own + sum(map(resident, workers(pid)))


class Clients:
    """Visit a server: a full handshake and its resumptions, TLS 1.2 and 1.3 by turns."""

    def __init__(self, port: int) -> None:
        self._endpoint = Endpoint.resolve("127.0.0.1", port)
        request = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        self._clients = [Client("localhost", version, request) for version in ("1.2", "1.3")]
        self._session: SSL.Session | None = None
        self.handshakes = self.resumed = 0

    def handshakes_up_to(self, total: int) -> None:
        """Shake hands until there were `total` in all."""
        while self.handshakes < total:
            family, number = divmod(self.handshakes, RESUMPTIONS + 1)
            if number == 0:
                self._session = None
            self.visit(family)

    def visit(self, family: int) -> bool:
        """Shake hands once more, with the last session, and return whether it resumed."""
        visit = self._clients[family % 2].visit(self._endpoint, self._session)
        self._session = visit.session
        self.handshakes += 1
        self.resumed += visit.resumed
        return visit.resumed


class Report:
    """A table of memory sizes and their growth."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.table = Table("server", "after", "resumed", "RSS, MiB", "growth of RSS")
        self.grown = 0

    def add(self, name: str, after: str, share: str, held: int, growth: str = "", *, failed: bool = False) -> None:
        """Add a row."""
        row = (name, after, share, f"{held / 2**20:,.2f}", growth + (", [red]too much" if failed else ""))
        self.table.add_row(*row)
        self._console.print(*row)
        self.grown += failed


def many_handshakes(name: str, count: int, report: Report, mode: Mapping[str, str]) -> None:
    """Measure the memory of a server after its warm-up and at the end."""
    with (
        tempfile.TemporaryDirectory(prefix="resumed-leaks-") as directory,
        running_server() as store,
        running(name, Path(directory), store.target, mode) as (pid, port, _),
    ):
        clients = Clients(port)
        clients.handshakes_up_to(WARM_UP)
        first = resident(pid)
        report.add(name, f"{WARM_UP:,} handshakes", f"{clients.resumed / clients.handshakes:.1%}", first)
        for step in range(1, STEPS + 1):
            clients.handshakes_up_to(WARM_UP + count * step // STEPS)
            held, made = resident(pid), count * step // STEPS
            each = (held - first) / made
            failed = step == STEPS and each > GROWTH and held - first > NOISE
            share = f"{clients.resumed / clients.handshakes:.1%}"
            report.add(name, f"{made:,} more", share, held, f"{each:,.1f} bytes a handshake", failed=failed)


def many_reloads(name: str, count: int, report: Report, *, shared: bool) -> None:
    """Show that sessions survive reloads, and measure the first process after a tenth of them and after all."""
    with contextlib.ExitStack() as held:
        directory = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="resumed-leaks-")))
        target = held.enter_context(running_server()).target if shared else None
        pid, port, server = held.enter_context(running(name, directory, target))
        assert server
        first, resumptions = 0, 0
        for number in range(1, count + 1):
            clients = Clients(port)
            clients.visit(number)
            before = set(workers(pid))
            server.process.send_signal(RELOADED[name])
            await_others(pid, before)
            resumptions += clients.visit(number)
            if number == count // 10:
                first = own_resident(pid)
        last = own_resident(pid)
        each = (last - first) / (count - count // 10)
        failed = shared and ((each > RELOAD_GROWTH and last - first > NOISE) or resumptions < count)
        label = f"{name}, first process" + ("" if shared else ", without the library")
        report.add(label, f"{count // 10:,} reloads", "", first)
        share = f"{resumptions / count:.1%}"
        report.add(label, f"{count:,} reloads", share, last, f"{each:,.0f} bytes a reload", failed=failed)


def workers(pid: int) -> list[int]:
    """Return a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def own_resident(pid: int) -> int:
    """Return the resident bytes of a process without its children."""
    return resident(pid) - sum(map(resident, workers(pid)))


def await_others(pid: int, before: set[int]) -> None:
    """Wait until a process has other children, and no other, than before."""
    end = time.monotonic() + PATIENCE
    while not (now := set(workers(pid))) or now & before:
        assert time.monotonic() < end, "the server's workers stay"
        time.sleep(0.01)


def heap(families: int, report: Report) -> None:
    """Compare the peak of the heap of handshakes.c over so many families, and four times as many."""
    peaks = []
    for number in families, 4 * families:
        with tempfile.TemporaryDirectory(prefix="resumed-leaks-") as directory, running_server() as store:
            with running("C", Path(directory), store.target):
                pass  # makes the files
            command = ["heaptrack", "--output", f"{directory}/heap", str(BUILD / "resumed-handshakes")]
            command += ["--certificate", f"{directory}/certificate.pem", "--keyring", f"{directory}/fleet.keys"]
            command += ["--target", store.target, "--namespace", "shop", "--families", str(number)]
            subprocess.run(
                [*command, "--mirror", "100000"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            recorded = next(Path(directory).glob("heap*"))
            said = subprocess.check_output(["heaptrack_print", recorded], text=True)
        peak = re.search(r"peak heap memory consumption: ([\d.]+)([KM]?)", said)
        assert peak
        peaks.append(float(peak[1]) * {"": 1, "K": 1e3, "M": 1e6}[peak[2]])
        report.add("handshakes.c", f"{number:,} families", "", int(peaks[-1]), "peak of the heap")
    report.grown += peaks[1] > 1.1 * peaks[0]


def main() -> int:
    """Measure, print, and return 0 if nothing grew."""
    parser = argparse.ArgumentParser(prog="make leaks-c", description=__doc__)
    parser.add_argument("--handshakes", type=int, default=100_000, help="with each server, behind the warm-up")
    parser.add_argument("--reloads", type=int, default=100, help="of nginx and Apache")
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--tickets", action="store_true", help="handshakes with tickets, of nginx and Apache")
    parser.add_argument("--heap", action="store_true", help="needs Debian's heaptrack")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    report = Report(console)
    for name in options.only:
        if options.handshakes and not (options.tickets and name == "C"):
            many_handshakes(name, options.handshakes, report, TICKETS if options.tickets else STORED)
        if options.reloads and name in RELOADED:
            for shared in True, False:
                many_reloads(name, options.reloads, report, shared=shared)
    if options.heap:
        heap(200, report)
    console.print(report.table)
    return int(report.grown > 0)


if __name__ == "__main__":
    sys.exit(main())
