"""The cost of a handshake during and after an outage of the store: `python benchmarks/outage.py`.

A client returns repeatedly with a session of the fleet, while the store is down, hung, late, refusing or restarting;
then the store is available again, and the script measures the seconds until the session resumes. While the breaker of
the shim is open, it compares handshakes with those of a frontend without a shim, in turns. Frontends and store are
separate processes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
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
from rich.progress import Progress
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.fleet import PATIENCE, VERSION_NAMES, Client, Fleet
from benchmarks.measuring import new_console, percentiles
from support.relay import Relay
from support.server import RunningServer, running_server
from support.tls import STACKS

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

    Outage = Callable[["Store", "Relay"], contextlib.AbstractContextManager[None]]

TARGET_OVERHEAD = 0.001
"""Target for the additional seconds of a handshake with the shim, while the breaker is open."""
TARGET_RETURN = 5.0
"""Target for the seconds until sessions resume after an outage."""
RESTART_SECONDS = (1.0, 0.5)
"""Seconds that a restarting store is up, and down."""

RECONNECT_SECONDS = 1.5
"""Time limit for the frontends' channels to connect to the new server, in seconds."""


class Store:
    """A store with a fixed port that the script can kill and restart; its sessions persist."""

    def __init__(self, directory: str) -> None:
        self._options = ("--storage", f"lmdb://{directory}/store")
        self._running = contextlib.ExitStack()
        self._server: RunningServer | None = None
        self.target = "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        """Start the server."""
        self._server = self._running.enter_context(running_server(*self._options, listen=self.target))
        self.target = self._server.target

    def kill(self) -> None:
        """Kill the server."""
        assert self._server
        self._server.kill()
        self.close()

    def signal(self, number: int) -> None:
        """Send a signal to the server."""
        assert self._server
        self._server.signal(number)

    def close(self) -> None:
        """Stop the server."""
        self._running.close()


@contextlib.contextmanager
def take_down(store: Store, _relay: Relay) -> Iterator[None]:
    """Kill the store: no server listens at the target."""
    store.kill()
    yield
    store.start()


@contextlib.contextmanager
def hang(store: Store, _relay: Relay) -> Iterator[None]:
    """Stop the store's process; its connections remain."""
    store.signal(signal.SIGSTOP)
    yield
    store.signal(signal.SIGCONT)


@contextlib.contextmanager
def refuse(store: Store, _relay: Relay) -> Iterator[None]:
    """Replace the store by a server that denies every call."""

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
def restart_repeatedly(store: Store, _relay: Relay) -> Iterator[None]:
    """Kill and start the store repeatedly."""
    stopping = threading.Event()

    def restart() -> None:
        up_seconds, down_seconds = RESTART_SECONDS
        while not stopping.wait(up_seconds):
            store.kill()
            stopping.wait(down_seconds)
            store.start()

    with ThreadPoolExecutor(1) as pool:
        restarts = pool.submit(restart)
        yield
        stopping.set()
        restarts.result()


def delay_responses(delay: float) -> Outage:
    """Return an outage that delays responses by `delay` seconds."""

    @contextlib.contextmanager
    def outage(_store: Store, relay: Relay) -> Iterator[None]:
        relay.delay = delay
        yield
        relay.delay = 0.0

    return outage


class Handshakes:
    """The results of a number of handshakes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.failed = self.resumed = 0

    def visit(self, client: Client, port: int, session: ssl.SSLSession | None = None) -> None:
        """Make a handshake, and record its result."""
        try:
            visit = client.visit(port, session)
        except OSError:
            self.failed += 1
        else:
            self.seconds.append(visit.seconds)
            self.resumed += visit.resumed


def measure_recovery(client: Client, port: int, session: ssl.SSLSession | None) -> float:
    """Return the seconds until `session` resumes."""
    started = time.monotonic()
    while not client.visit(port, session).resumed:
        if time.monotonic() - started > PATIENCE:
            return float("inf")
        time.sleep(0.05)
    return time.monotonic() - started


def main() -> int:
    """Measure, print, and return 0 if no handshake failed and no target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--handshakes", type=int, default=200, help="number in each outage, and on each side of a comparison"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of the visits at a restarting store")
    parser.add_argument("--deadline", type=float, default=0.05, help="deadline of the shim, in seconds")
    parser.add_argument("--late", type=float, nargs="+", default=[0.02, 0.2], help="delays of responses in seconds")
    parser.add_argument("--outages", nargs="+", help="only these outages: down, hung, refusing, restarting, late")
    parser.add_argument("--puts", choices=["background", "wait"], default="background")
    parser.add_argument("--stacks", nargs="+", default=STACKS, choices=STACKS)
    parser.add_argument("--versions", nargs="+", default=list(VERSION_NAMES), choices=VERSION_NAMES)
    options = parser.parse_args()
    outages: dict[str, Outage] = {"down": take_down, "hung": hang, "refusing": refuse, "restarting": restart_repeatedly}
    outages |= {f"late by {delay * 1e3:g} ms": delay_responses(delay) for delay in options.late}
    table = Table(
        *("the store is", "stack", "version", "handshakes", "failed", "resumed", "ms p50 / p99", "slowest, ms"),
        *("over no shim, ms p50", "back after, s", "misses"),
        title=f"Handshakes without the store (deadline {options.deadline * 1e3:g} ms, puts {options.puts})",
    )
    missed = 0
    with contextlib.ExitStack() as exit_stack:
        directory = exit_stack.enter_context(tempfile.TemporaryDirectory())
        fleet, store = Fleet(directory), Store(directory)
        exit_stack.callback(store.close)
        relay = Relay(store.target)
        progress = exit_stack.enter_context(Progress(transient=True))
        names = [name for name in outages if not options.outages or name.split()[0] in options.outages]
        cases = list(itertools.product(names, options.stacks, options.versions))
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
                recovery_seconds = measure_recovery(client, port, session)
            failed = sum(each.failed for each in (before, during, with_shim, without))
            bound = options.deadline + max(before.seconds)
            over = ""
            if without.seconds:
                cost = statistics.median(with_shim.seconds) - statistics.median(without.seconds)
                missed += cost > TARGET_OVERHEAD
                over = f"{cost * 1e3:+.2f}"
            missed += failed > 0 or recovery_seconds > TARGET_RETURN or max(during.seconds) > bound
            table.add_row(
                *(name, stack, version, f"{len(during.seconds):,}", f"{failed}", f"{during.resumed}"),
                *(percentiles(during.seconds), f"{max(during.seconds) * 1e3:.1f} (bound {bound * 1e3:.1f})"),
                *(
                    over,
                    f"{recovery_seconds:.2f}",
                    ", ".join(f"{reason} {count}" for reason, count in stats["misses"].items()),
                ),
            )
    new_console().print(table)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
