"""How long look-ups hold up a server's event loop: `python benchmarks/event_loop.py`.

Clients come back to an asyncio server, many at once, with sessions that another frontend negotiated; the store is 20 ms
away. Three servers in turns: one whose look-ups are made in the loop's thread, one whose handshakes rest meanwhile
(what install() does), and one with a mirror, which makes no calls. Store, distance, servers and clients are processes
of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import ssl
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

import resumed
from benchmarks.fleet import VERSION_NAMES, Client, Fleet, milliseconds
from support.distance import distant
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

LOOKUPS = ("in the loop", "while it rests", "mirror")
LOOPS = ("asyncio", "uvloop")
_BEAT = 0.001


class Server:
    """A server in a process of its own.

    Args:
        fleet: Its certificate and keyring.
        target: The store.
        loop: One of LOOPS.
        lookups: One of LOOKUPS.
        deadline: Seconds that a look-up may take.
    """

    def __init__(self, fleet: Fleet, target: str, loop: str, lookups: str, deadline: float) -> None:
        command = [sys.executable, __file__, "--serve", json.dumps([str(fleet.keyring), str(fleet.certificate)])]
        command += ["--loop", loop, "--target", target, "--lookups", lookups, "--deadline", str(deadline)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port: int = self._answer()

    def ask(self, what: str) -> Any:
        """Have it carry out one of the lines that _serve() knows."""
        assert self._process.stdin
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End it."""
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())


def main() -> int:
    """Measure, print, and return 0 if everything was resumed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="how often all clients come back to each server")
    parser.add_argument("--clients", type=int, default=32, help="how many come back at once")
    parser.add_argument("--distance", type=float, default=0.02, help="seconds that the store is away")
    parser.add_argument("--deadline", type=float, default=0.2, help="seconds that a look-up may take")
    parser.add_argument("--loop", choices=LOOPS, help="measure this one only")
    parser.add_argument("--markdown", action="store_true", help="print the table of results/measurements.md")
    for name in ("--serve", "--target", "--lookups"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        runner: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run
        if options.loop == "uvloop":
            import uvloop

            runner = uvloop.run
        runner(_serve(options))
        return 0
    table = Table(
        *("loop", "TLS", "look-ups", "resumed", "held up by a look-up, ms", "loop late, ms", "resumption, ms"),
        title=None
        if options.markdown
        else f"{options.clients} clients at once, store {options.distance * 1e3:.0f} ms away",
        box=box.MARKDOWN if options.markdown else box.HEAVY_HEAD,
    )
    lost = 0
    with contextlib.ExitStack() as held:
        fleet = Fleet(held.enter_context(tempfile.TemporaryDirectory()))
        store = held.enter_context(running_server())
        target = held.enter_context(distant(store.target, options.distance))
        negotiator = held.enter_context(fleet.frontend("pyopenssl", store.target))
        progress = held.enter_context(Progress(transient=True))
        for loop in [options.loop] if options.loop else LOOPS:
            servers = {name: Server(fleet, target, loop, name, options.deadline) for name in LOOKUPS}
            try:
                for version in VERSION_NAMES:
                    seconds: dict[str, list[float]] = {name: [] for name in LOOKUPS}
                    for _ in progress.track(range(options.rounds), description=f"{loop} {version}"):
                        for name, visits in one_round(servers, negotiator, version, options.clients):
                            seconds[name] += visits
                    for name, server in servers.items():
                        figures = server.ask("figures")
                        tries = options.rounds * options.clients
                        lost += tries - len(seconds[name])
                        table.add_row(
                            *(loop, version.removeprefix("TLS "), name, f"{len(seconds[name]):,} of {tries:,}"),
                            *(shown(figures["held"]), shown(figures["late"]), milliseconds(seconds[name])),
                        )
            finally:
                for server in servers.values():
                    server.stop()
    Console(width=None if os.isatty(1) else 180).print(table, "p50 / p99 / longest; resumption: p50 / p99")
    return int(lost > 0)


def one_round(
    servers: dict[str, Server], negotiator: int, version: str, clients: int
) -> Iterator[tuple[str, list[float]]]:
    """Negotiate sessions on one port and offer them, all at once, to one server after the other."""
    client = Client(VERSION_NAMES[version])
    with ThreadPoolExecutor(clients) as pool:
        sessions = [visit.session for visit in pool.map(client.visit, [negotiator] * clients)]
        client.ask(negotiator, b"flush")
        for name, server in random.sample(list(servers.items()), len(servers)):
            if name == "mirror":
                server.ask("mirror")
            server.ask("begin")
            visits = list(pool.map(lambda session, port=server.port: client.visit(port, session), sessions))
            server.ask("end")
            yield name, [visit.seconds for visit in visits if visit.resumed]


def shown(seconds: list[float]) -> str:
    """Return median, 99th percentile and longest, in milliseconds."""
    return f"{milliseconds(seconds)} / {max(seconds) * 1e3:.2f}" if seconds else "-"


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
    )
    if options.lookups == LOOKUPS[0]:
        context.sslobject_class = ssl.SSLObject
    watched = Watched(installation)
    server = await asyncio.start_server(_echo, "127.0.0.1", 0, ssl=context, backlog=1_000)
    heart = asyncio.create_task(watched.beat())
    answer: Any = server.sockets[0].getsockname()[1]
    while True:
        print(json.dumps(answer), flush=True)  # noqa: T201  # what Server reads
        line = await asyncio.to_thread(sys.stdin.readline)
        if not line:
            break
        answer = await getattr(watched, line.strip())()
    heart.cancel()
    server.close()


class Watched:
    """What happens on the loop of a server; its methods are what Server.ask() can ask for."""

    def __init__(self, installation: resumed.Installation) -> None:
        self._shim: Any = installation._policy
        self._beating = asyncio.Event()
        self._held: list[float] = []
        self._late: list[float] = []
        for name in ("on_get_session", "find"):
            setattr(self._shim, name, timed(getattr(self._shim, name), self._held))

    async def beat(self) -> None:
        """Note how late the loop is for what it was to do in a millisecond, again and again."""
        while await self._beating.wait():
            before = time.perf_counter()
            await asyncio.sleep(_BEAT)
            self._late.append(max(0, time.perf_counter() - before - _BEAT))

    async def mirror(self) -> None:
        """Wait until the mirror has everything."""
        self._shim._mirror.get(b"")
        await asyncio.sleep(0.5)

    async def begin(self) -> None:
        """Begin to beat."""
        self._beating.set()

    async def end(self) -> None:
        """Beat no more."""
        self._beating.clear()

    async def figures(self) -> dict[str, list[float]]:
        """Return what was noted since the last time."""
        figures = {"held": list(self._held), "late": list(self._late)}
        self._held.clear()
        self._late.clear()
        return figures


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, ssl.SSLError):
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
    writer.close()


def timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Return `call` so that it notes how long it took."""

    def timing(*arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            seconds.append(time.perf_counter() - started)

    return timing


if __name__ == "__main__":
    sys.exit(main())
