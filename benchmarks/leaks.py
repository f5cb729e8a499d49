"""Memory leaks after many handshakes, and after many contexts: `python benchmarks/leaks.py`.

A frontend of one stack and its clients run in this process, over memory BIOs; the store is a separate process. One full
handshake and its resumptions (three by default) form a family, which runs in a thread of its own, like connections of a
server. Connections end without close_notify, every tenth family with a fatal error. Then the script creates contexts,
installs the shim in each, uses each once and releases it. The client's cache of identities is small here, so that it is
full before the usage is compared.

The same under Python's debug allocator: `PYTHONMALLOC=debug python benchmarks/leaks.py --handshakes 10000`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import ssl
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from OpenSSL import SSL
from rich.progress import Progress
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

import resumed
import resumed._openssl.contexts
from benchmarks.measuring import new_console, resident_bytes
from support.server import running_server
from support.tls import STACKS, VERSIONS, Frontend, Stack

if TYPE_CHECKING:
    from collections.abc import Callable

TARGET_BYTES = {"handshake": 16, "context": 1_024}
"""Tolerated growth per use: the smallest session is twenty times as large, an SSL_CTX several times."""
NOISE_BYTES = 1 << 20
"""Tolerated growth in total, so that short runs are meaningful, too."""
PERCENT = range(1, 101)
REPORTED = (10, 100)
FATAL_EVERY = 10
BAD_RECORD = b"\x17\x03\x03\x00\x40" + bytes(64)
KEPT_CERTIFICATES = 16
"""Certificates that the client keeps for their identities here; 1,024, its own number, would grow in most of a run."""
PATIENCE = 20.0
"""Time limit for threads to end, in seconds."""


class Usage(NamedTuple):
    """Memory, threads and files of this process."""

    resident: int
    blocks: int
    objects: int
    threads: int
    files: int

    @classmethod
    def measure(cls) -> Usage:
        """Collect garbage and measure."""
        gc.collect()
        return cls(
            resident_bytes(),
            sys.getallocatedblocks(),
            len(gc.get_objects()),
            len(list(Path("/proc/self/task").iterdir())),
            len(list(Path("/proc/self/fd").iterdir())),
        )

    @property
    def cells(self) -> list[str]:
        """The figures as text."""
        return [f"{self.resident / 2**20:,.2f}", *(f"{count:,}" for count in self[1:])]


class Server:
    """A server's end without a socket."""

    def __init__(self, frontend: Frontend) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._stack = frontend.stack
        if frontend.stack == "ssl":
            self._tls: Any = frontend.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        else:
            self._tls = SSL.Connection(frontend.context, None)
            self._tls.set_accept_state()

    def answer(self, data: bytes) -> bytes:
        """Process `data` of a handshake, and return the bytes to send."""
        if self._stack == "pyopenssl":
            return _exchange(self._tls, data, self._tls.do_handshake)
        self._incoming.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
        return self._outgoing.read()

    def fail(self) -> None:
        """Receive a record that does not authenticate."""
        with contextlib.suppress(ssl.SSLError, SSL.Error):
            if self._stack == "pyopenssl":
                _exchange(self._tls, BAD_RECORD, lambda: self._tls.read(1))
            else:
                self._incoming.write(BAD_RECORD)
                self._tls.read(1)


def _exchange(tls: SSL.Connection, data: bytes, step: Callable[[], object]) -> bytes:
    if data:
        tls.bio_write(data)
    with contextlib.suppress(SSL.WantReadError):
        step()
    try:
        return tls.bio_read(65_536)
    except SSL.WantReadError:
        return b""


def client_context(version: ssl.TLSVersion) -> SSL.Context:
    """Return a client context of pyOpenSSL: those of `ssl` leak sessions (cpython issue 116810)."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(version)
    context.set_max_proto_version(version)
    return context


def make_handshake(frontend: Frontend, client: SSL.Context, session: SSL.Session | None, *, fatal: bool) -> Any:
    """Make a handshake, receive the tickets, and return the client's session."""
    peer, server = SSL.Connection(client, None), Server(frontend)
    peer.set_connect_state()
    if session is not None:
        peer.set_session(session)
    data = _exchange(peer, b"", peer.do_handshake)
    while data:
        data = _exchange(peer, server.answer(data), peer.do_handshake)
    with contextlib.suppress(SSL.WantReadError):
        peer.read(1)  # TLS 1.3 tickets arrive after the handshake
    if fatal:
        server.fail()
    # Otherwise OpenSSL considers the client's connection failed, and its session not resumable.
    peer.set_shutdown(SSL.SENT_SHUTDOWN | SSL.RECEIVED_SHUTDOWN)
    return peer.get_session()


class HandshakeFamilies:
    """Families of handshakes with one frontend.

    Args:
        stack: The TLS stack of the frontend.
        target: The target of the store.
        resumptions: The number of resumptions in a family.
        sessions: `stored` or `tickets`.
    """

    def __init__(self, stack: Stack, target: str, resumptions: int, sessions: str) -> None:
        self.stack = stack
        self._options: dict[str, Any] = {"sessions": sessions, "tickets_tls12": sessions == "tickets"}
        self._resumptions = resumptions
        self._keyring = resumed.Keyring.from_keys([os.urandom(32)])
        self._target = target
        self._clients = [client_context(version) for version in VERSIONS]
        self.frontend = self.new_frontend()
        self._families = 0
        self.handshakes = 0

    @property
    def share(self) -> str:
        """Share of the handshakes that resumed a session of the fleet."""
        stats = self.frontend.shim.stats
        return f"{(stats.hits + stats.tickets_resumed).total() / self.handshakes:.1%}"

    def new_frontend(self) -> Frontend:
        """Create a context and install the shim in it."""
        return Frontend(self.stack, self._target, self._keyring, **self._options)

    def make_handshakes(self, total: int) -> None:
        """Make handshakes until their number is `total`."""
        while self.handshakes < total:
            before = self.handshakes
            thread = threading.Thread(target=self._family)
            thread.start()
            thread.join()
            if self.handshakes == before:
                raise RuntimeError("a handshake failed, see above")
        self.frontend.shim.flush()

    def _family(self) -> None:
        client, fatal = self._clients[self._families % 2], self._families % FATAL_EVERY == 0
        self._families += 1
        session = None
        for number in range(self._resumptions + 1):
            session = make_handshake(self.frontend, client, session, fatal=fatal and number == self._resumptions)
            self.handshakes += 1


def use_once(families: HandshakeFamilies, frontend: Frontend, number: int) -> None:
    """Negotiate a session with a context, and release the context; uninstall the shim of every other one before."""
    make_handshake(frontend, families._clients[number % 2], None, fatal=False)
    if number % 2:
        frontend.shim.uninstall()


def wait_for_threads(threads: int) -> Usage:
    """Return the usage when at most `threads` threads exist: write queues end in the background."""
    end = time.monotonic() + PATIENCE
    while (usage := Usage.measure()).threads > threads and time.monotonic() < end:
        time.sleep(0.1)
    return usage


class Report:
    """A table of the usage after each number of uses, and the number of leaks."""

    def __init__(self) -> None:
        self.table = Table(
            *("stack", "after", "resumed", "RSS, MiB", "Python blocks", "objects", "threads", "files", "growth of RSS"),
            title=f"Usage (PYTHONMALLOC={os.environ.get('PYTHONMALLOC', 'default')})",
        )
        self.grown = 0
        self._earlier: dict[tuple[str, str], tuple[int, Usage]] = {}

    def add(self, stack: Stack, number: int, unit: str, usage: Usage, share: str = "-") -> None:
        """Add the usage after `number` uses, and compare it with the previous one."""
        growth = ""
        if (stack, unit) in self._earlier:
            before, earlier = self._earlier[stack, unit]
            grown, target = usage.resident - earlier.resident, TARGET_BYTES[unit]
            bytes_per_use = grown / (number - before)
            leaks = bytes_per_use > target and grown > NOISE_BYTES
            failed = leaks or usage.threads > earlier.threads or usage.files > earlier.files
            self.grown += failed
            growth = f"{bytes_per_use:,.1f} bytes a {unit}" + (", [red]too much" if failed else "")
        self._earlier[stack, unit] = number, usage
        self.table.add_row(stack, f"{number:,} {unit}s", share, *usage.cells, growth)


def main() -> int:
    """Measure, print, and return 0 if the usage did not grow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--handshakes", type=int, default=100_000, help="on each stack; compared with a tenth of it")
    parser.add_argument("--contexts", type=int, default=2_000, help="of each stack; compared with a tenth of it")
    parser.add_argument("--resumptions", type=int, default=3, help="resumptions for each full handshake")
    parser.add_argument("--sessions", default="stored", choices=("stored", "tickets"), help="the fleet's mode (stored)")
    parser.add_argument("--stacks", nargs="+", default=STACKS, choices=STACKS)
    options = parser.parse_args()
    report = Report()
    resumed._openssl.contexts._MOST_IDENTITIES = KEPT_CERTIFICATES
    with running_server() as store, Progress(transient=True) as progress:
        for stack in options.stacks:
            families = HandshakeFamilies(stack, store.target, options.resumptions, options.sessions)
            for percent in progress.track(PERCENT, description=f"handshakes, {stack}"):
                families.make_handshakes(options.handshakes * percent // 100)
                if percent in REPORTED:
                    report.add(stack, families.handshakes, "handshake", Usage.measure(), families.share)
            threads, number = Usage.measure().threads, 0
            for percent in progress.track(PERCENT, description=f"contexts, {stack}"):
                while number < options.contexts * percent // 100:
                    number += 1
                    use_once(families, families.new_frontend(), number)
                if percent in REPORTED:
                    report.add(stack, number, "context", wait_for_threads(threads))
    new_console().print(report.table)
    return int(report.grown > 0)


if __name__ == "__main__":
    sys.exit(main())
