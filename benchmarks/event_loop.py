"""How long look-ups block a server's event loop: `python benchmarks/event_loop.py`.

Many clients return to an asyncio server at the same time, with sessions that another frontend negotiated; the store is
20 ms away. Three servers take turns: one looks sessions up in the loop's thread, one suspends handshakes during
look-ups (the default of install()), and one has a mirror and makes no calls. Store, relay, servers and clients are
separate processes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import ssl
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

import resumed
from benchmarks.fleet import VERSION_NAMES, Client, Fleet
from benchmarks.measuring import build_table, new_console, percentiles
from support.distance import distant
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

LOOKUPS = ("in the loop", "suspended", "mirror")
LOOPS = ("asyncio", "uvloop")
_INTERVAL = 0.001


class Server:
    """A server in a process of its own.

    Args:
        fleet: The certificate and keyring of the server.
        target: The store.
        loop: One of LOOPS.
        lookups: One of LOOKUPS.
        deadline: The deadline of a look-up in seconds.
    """

    def __init__(self, fleet: Fleet, target: str, loop: str, lookups: str, deadline: float) -> None:
        command = [sys.executable, __file__, "--serve", json.dumps([str(fleet.keyring), str(fleet.certificate)])]
        command += ["--loop", loop, "--target", target, "--lookups", lookups, "--deadline", str(deadline)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port: int = self._read_response()

    def call(self, method: str) -> Any:
        """Call a method of the server's LoopMonitor, and return its result."""
        assert self._process.stdin
        self._process.stdin.write(f"{method}\n")
        self._process.stdin.flush()
        return self._read_response()

    def stop(self) -> None:
        """End the server."""
        self._process.communicate()

    def _read_response(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())


def main() -> int:
    """Measure, print, and return 0 if every offered session resumed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="number of times that all clients return to each server")
    parser.add_argument("--clients", type=int, default=32, help="number of clients that return at the same time")
    parser.add_argument("--distance", type=float, default=0.02, help="round-trip time to the store in seconds")
    parser.add_argument("--deadline", type=float, default=0.2, help="deadline of a look-up in seconds")
    parser.add_argument("--loop", choices=LOOPS, help="measure only this event loop")
    parser.add_argument("--markdown", action="store_true", help="print the table of results/measurements.md")
    for name in ("--serve", "--target", "--lookups"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        run: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run
        if options.loop == "uvloop":
            import uvloop

            run = uvloop.run
        run(_serve(options))
        return 0
    table = build_table(
        *("loop", "TLS", "look-ups", "resumed", "held up by a look-up, ms", "loop late, ms", "resumption, ms"),
        markdown=options.markdown,
        title=f"{options.clients} clients at once, store {options.distance * 1e3:.0f} ms away",
    )
    lost = 0
    with contextlib.ExitStack() as exit_stack:
        fleet = Fleet(exit_stack.enter_context(tempfile.TemporaryDirectory()))
        store = exit_stack.enter_context(running_server())
        target = exit_stack.enter_context(distant(store.target, options.distance))
        negotiator = exit_stack.enter_context(fleet.frontend("pyopenssl", store.target))
        progress = exit_stack.enter_context(Progress(transient=True))
        for loop in [options.loop] if options.loop else LOOPS:
            servers = {name: Server(fleet, target, loop, name, options.deadline) for name in LOOKUPS}
            try:
                for version in VERSION_NAMES:
                    seconds: dict[str, list[float]] = {name: [] for name in LOOKUPS}
                    for _ in progress.track(range(options.rounds), description=f"{loop} {version}"):
                        for name, visits in measure_round(servers, negotiator, version, options.clients):
                            seconds[name] += visits
                    for name, server in servers.items():
                        figures = server.call("figures")
                        tries = options.rounds * options.clients
                        lost += tries - len(seconds[name])
                        table.add_row(
                            *(loop, version.removeprefix("TLS "), name, f"{len(seconds[name]):,} of {tries:,}"),
                            *(
                                format_delays(figures["held"]),
                                format_delays(figures["late"]),
                                percentiles(seconds[name]),
                            ),
                        )
            finally:
                for server in servers.values():
                    server.stop()
    new_console().print(table, "p50 / p99 / longest; resumption: p50 / p99")
    return int(lost > 0)


def measure_round(
    servers: dict[str, Server], negotiator: int, version: str, clients: int
) -> Iterator[tuple[str, list[float]]]:
    """Negotiate sessions on one port and offer all of them concurrently, to one server after the other."""
    client = Client(VERSION_NAMES[version])
    with ThreadPoolExecutor(clients) as pool:
        sessions = [visit.session for visit in pool.map(client.visit, [negotiator] * clients)]
        client.ask(negotiator, b"flush")
        for name, server in random.sample(list(servers.items()), len(servers)):
            if name == "mirror":
                server.call("mirror")
            server.call("begin")
            visits = list(pool.map(lambda session, port=server.port: client.visit(port, session), sessions))
            server.call("end")
            yield name, [visit.seconds for visit in visits if visit.resumed]


def format_delays(seconds: list[float]) -> str:
    """Return median, 99th percentile and longest, in milliseconds."""
    return f"{percentiles(seconds)} / {max(seconds) * 1e3:.2f}" if seconds else "-"


async def _serve(options: argparse.Namespace) -> None:
    keyring, certificate = json.loads(options.serve)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    installation = resumed.install(
        context,
        target=options.target,
        namespace="shop",
        keyring=keyring,
        deadline=options.deadline,
        mirror=options.lookups == "mirror",
        ignore_id_context=True,  # the frontend that negotiates has another TLS stack
    )
    if options.lookups == LOOKUPS[0]:
        context.sslobject_class = ssl.SSLObject
    monitor = LoopMonitor(installation)
    server = await asyncio.start_server(_echo, "127.0.0.1", 0, ssl=context, backlog=1_000)
    delays = asyncio.create_task(monitor.measure_delays())

    response: Any = server.sockets[0].getsockname()[1]
    while True:
        print(json.dumps(response), flush=True)  # noqa: T201  # Server reads this line
        line = await asyncio.to_thread(sys.stdin.readline)
        if not line:
            break

        response = await getattr(monitor, line.strip())()
    delays.cancel()
    server.close()


class LoopMonitor:
    """Measures the event loop of a server; Server.call() calls its methods."""

    def __init__(self, installation: resumed.Installation) -> None:
        self._shim: Any = installation._policy
        self._active = asyncio.Event()
        self._lookup_seconds: list[float] = []
        self._loop_delays: list[float] = []
        for name in ("on_get_session", "find"):
            setattr(self._shim, name, time_calls(getattr(self._shim, name), self._lookup_seconds))

    async def measure_delays(self) -> None:
        """Schedule a wake-up in a millisecond, again and again, and record the delay of each."""
        while await self._active.wait():
            before = time.perf_counter()
            await asyncio.sleep(_INTERVAL)
            self._loop_delays.append(max(0, time.perf_counter() - before - _INTERVAL))

    async def mirror(self) -> None:
        """Wait until the mirror has all sessions."""
        self._shim._mirror.follow()
        await asyncio.sleep(0.5)

    async def begin(self) -> None:
        """Start the measurement of delays."""
        self._active.set()

    async def end(self) -> None:
        """Stop the measurement of delays."""
        self._active.clear()

    async def figures(self) -> dict[str, list[float]]:
        """Return the figures since the last call."""
        figures = {"held": list(self._lookup_seconds), "late": list(self._loop_delays)}
        self._lookup_seconds.clear()
        self._loop_delays.clear()
        return figures


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, ssl.SSLError):
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
    writer.close()


def time_calls(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Return a wrapper of `call` that appends each duration to `seconds`."""

    def call_and_time(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - started)

    return call_and_time


if __name__ == "__main__":
    sys.exit(main())
