"""What a handshake costs while the store is away, and after: `python benchmarks/outage.py`.

A client comes back again and again with a session of the fleet, while the store is down, hung, late, refusing or
restarting; then the store is back, and the seconds are counted until the session resumes. Once the shim has stopped
asking (its breaker is open), handshakes are compared with those of a frontend without a shim, in turns. Frontends and
store are processes of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.fleet import PATIENCE, VERSION_NAMES, Client, Fleet, milliseconds
from support.relay import Relay
from support.server import RunningServer, running_server
from support.tls import STACKS

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

    Outage = Callable[["Store", "Relay"], contextlib.AbstractContextManager[None]]

TARGET_OVERHEAD = 0.001
"""Seconds that a handshake may cost over one without a shim, once the breaker is open."""
TARGET_RETURN = 5.0
"""Seconds after which resumption must be back."""
RESTART_SECONDS = (1.0, 0.5)
"""How long a restarting store is there, and away."""

RECONNECT_SECONDS = 1.5
"""How long the frontends' channels may take to find out who is there now."""


class Store:
    """A store on a port of its own that can be taken away and brought back; its sessions outlive it."""

    def __init__(self, directory: str) -> None:
        self._options = ("--storage", f"lmdb://{directory}/store")
        self._running = contextlib.ExitStack()
        self._server: RunningServer | None = None
        self.target = "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        """Begin to serve."""
        self._server = self._running.enter_context(running_server(*self._options, listen=self.target))
        self.target = self._server.target

    def kill(self) -> None:
        """End it without a word."""
        assert self._server
        self._server.kill()
        self.close()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self._server
        self._server.signal(number)

    def close(self) -> None:
        """End it."""
        self._running.close()


@contextlib.contextmanager
def down(store: Store, _relay: Relay) -> Iterator[None]:
    """Nothing listens at the target."""
    store.kill()
    yield
    store.start()


@contextlib.contextmanager
def hung(store: Store, _relay: Relay) -> Iterator[None]:
    """The store's process is stopped; its connections stay."""
    store.signal(signal.SIGSTOP)
    yield
    store.signal(signal.SIGCONT)


@contextlib.contextmanager
def refusing(store: Store, _relay: Relay) -> Iterator[None]:
    """Something else listens at the target, and denies every call."""

    class Refuse(grpc.GenericRpcHandler):
        def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
            return grpc.unary_unary_rpc_method_handler(
                lambda _request, context: context.abort(grpc.StatusCode.PERMISSION_DENIED, "not you")
            )

    store.kill()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool, handlers=[Refuse()])
        server.add_insecure_port(store.target)
        server.start()
        time.sleep(RECONNECT_SECONDS)
        yield
        server.stop(None).wait()
    store.start()


@contextlib.contextmanager
def restarting(store: Store, _relay: Relay) -> Iterator[None]:
    """The store is killed and started, again and again."""
    enough = threading.Event()

    def restart() -> None:
        there, away = RESTART_SECONDS
        while not enough.wait(there):
            store.kill()
            enough.wait(away)
            store.start()

    with ThreadPoolExecutor(1) as pool:
        restarts = pool.submit(restart)
        yield
        enough.set()
        restarts.result()


def late(delay: float) -> Outage:
    """Answers come, but after `delay` seconds."""

    @contextlib.contextmanager
    def outage(_store: Store, relay: Relay) -> Iterator[None]:
        relay.delay = delay
        yield
        relay.delay = 0.0

    return outage


class Handshakes:
    """What became of a number of handshakes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.failed = self.resumed = 0

    def visit(self, client: Client, port: int, session: ssl.SSLSession | None = None) -> None:
        """Shake hands, and note what came of it."""
        try:
            visit = client.visit(port, session)
        except OSError:
            self.failed += 1
        else:
            self.seconds.append(visit.seconds)
            self.resumed += visit.resumed


def back_after(client: Client, port: int, session: ssl.SSLSession | None) -> float:
    """Return the seconds until `session` resumes."""
    started = time.monotonic()
    while not client.visit(port, session).resumed:
        if time.monotonic() - started > PATIENCE:
            return float("inf")
        time.sleep(0.05)
    return time.monotonic() - started


def main() -> int:
    """Measure, print, and return 0 if no handshake failed and all targets are reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--handshakes", type=int, default=200, help="in each outage, and of each side in the turns")
    parser.add_argument("--seconds", type=float, default=5.0, help="that a restarting store is visited")
    parser.add_argument("--deadline", type=float, default=0.05, help="of the shim, in seconds")
    parser.add_argument("--late", type=float, nargs="+", default=[0.02, 0.2], help="seconds that answers are late")
    parser.add_argument("--outages", nargs="+", help="only these: down, hung, refusing, restarting, late")
    parser.add_argument("--puts", choices=["background", "wait"], default="background")
    parser.add_argument("--stacks", nargs="+", default=STACKS, choices=STACKS)
    parser.add_argument("--versions", nargs="+", default=list(VERSION_NAMES), choices=VERSION_NAMES)
    options = parser.parse_args()
    outages: dict[str, Outage] = {"down": down, "hung": hung, "refusing": refusing, "restarting": restarting}
    outages |= {f"late by {delay * 1e3:g} ms": late(delay) for delay in options.late}
    table = Table(
        *("the store is", "stack", "version", "handshakes", "failed", "resumed", "ms p50 / p99", "slowest, ms"),
        *("over no shim, ms p50", "back after, s", "misses"),
        title=f"Handshakes without the store (deadline {options.deadline * 1e3:g} ms, puts {options.puts})",
    )
    missed = 0
    with contextlib.ExitStack() as held:
        directory = held.enter_context(tempfile.TemporaryDirectory())
        fleet, store = Fleet(directory), Store(directory)
        held.callback(store.close)
        relay = Relay(store.target)
        progress = held.enter_context(Progress(transient=True))
        chosen = [name for name in outages if not options.outages or name.split()[0] in options.outages]
        cases = list(itertools.product(chosen, options.stacks, options.versions))
        for name, stack, version in progress.track(cases, description="outages"):
            client = Client(VERSION_NAMES[version])
            target = relay.target if name.startswith("late") else store.target
            with (
                fleet.frontend(stack, target, "--deadline", str(options.deadline), "--puts", options.puts) as port,
                fleet.frontend(stack, None) as plain,
            ):
                before, during = Handshakes(), Handshakes()
                for _ in range(options.handshakes):
                    before.visit(client, plain)
                session = client.visit(port).session
                client.ask(port, b"flush")
                with outages[name](store, relay):
                    until = time.monotonic() + (options.seconds if name == "restarting" else 0)
                    while len(during.seconds) < options.handshakes or time.monotonic() < until:
                        during.visit(client, port, session)
                    stats = client.ask(port, b"stats")
                    with_shim, without = Handshakes(), Handshakes()
                    for _ in range(options.handshakes if stats["breaker_open"] and name != "restarting" else 0):
                        with_shim.visit(client, port, session)
                        without.visit(client, plain)
                back = back_after(client, port, session)
            failed = sum(each.failed for each in (before, during, with_shim, without))
            bound = options.deadline + max(before.seconds)
            over = ""
            if without.seconds:
                cost = statistics.median(with_shim.seconds) - statistics.median(without.seconds)
                missed += cost > TARGET_OVERHEAD
                over = f"{cost * 1e3:+.2f}"
            missed += failed > 0 or back > TARGET_RETURN or max(during.seconds) > bound
            table.add_row(
                *(name, stack, version, f"{len(during.seconds):,}", f"{failed}", f"{during.resumed}"),
                *(milliseconds(during.seconds), f"{max(during.seconds) * 1e3:.1f} (bound {bound * 1e3:.1f})"),
                *(over, f"{back:.2f}", ", ".join(f"{reason} {count}" for reason, count in stats["misses"].items())),
            )
    Console(width=None if os.isatty(1) else 180).print(table)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
