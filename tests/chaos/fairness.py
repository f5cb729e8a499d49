"""Measure how a tenant that floods the store affects another tenant: `python tests/chaos/fairness.py`.

Two tenants have certificates, grants and limits. One looks sessions up at a steady pace and times each look-up. The
other is a separate process, which is idle in one turn and floods in the others, by every method. The server has one
core and the tenants the other, on which the measuring process has priority if that is permitted (SCHED_FIFO, as root).

The flood also loads the machine and the tenant's core, which is not the server's fault. So each round has a control:
the same flood from the same core to a second server, which runs on that core too and does not use the first one's.
"""

# ruff: noqa: T201 - the flood prints what became of its calls
from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
from rich.console import Console
from rich.progress import Progress

sys.path.extend(str(Path(__file__).parents[2] / folder) for folder in ("tests", "."))

import resumed
from benchmarks.measuring import bind_to_cores, build_table, cpu_seconds, process_tree, spread
from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from support.mtls import Authority, Files, Pem, channel, grant
from support.raw_http2 import RST_STREAM, Raw
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.table import Table

    from support.server import RunningServer

QUIET_TENANT, FLOODER = "spiffe://example.org/quiet", "spiffe://example.org/flooder"
OPERATIONS = ["put", "get", "take", "remove", "watch"]
KEY, VALUE = b"k" * 32, b"v" * 300
WARM_UP = 0.5


# --- The flood -----------------------------------------------------------------------------------------------------


class Flood:
    """Endless calls on several connections; a new call follows each answer at once."""

    def __init__(self, target: str, authority: bytes, pem: Pem, connections: int) -> None:
        self._target, self._authority, self._pem = target, authority, pem
        self.stubs = [SessionStoreServiceStub(channel(target, authority, pem)) for _ in range(connections)]
        self.answers: Counter[str] = Counter()

    def call(self, method: str, request: Callable[[], Any], at_once: int, timeout: float | None = None) -> None:
        """Keep `at_once` calls in flight on each connection, each for at most `timeout` seconds."""

        def follow(stub: SessionStoreServiceStub, answered: Any = None) -> None:
            if answered:
                self.answers[answered.code().name] += 1
            getattr(stub, method).future(request(), timeout).add_done_callback(lambda done: follow(stub, done))

        for stub in self.stubs:
            for _ in range(at_once):
                follow(stub)

    def pace(self, rate: float) -> None:
        """Make this many Gets per second, one after the other."""
        due = time.monotonic()
        while True:
            due += 1 / rate
            time.sleep(max(0.0, due - time.monotonic()))
            with contextlib.suppress(grpc.RpcError):
                self.stubs[0].Get(get())
                self.answers["OK"] += 1

    def burst(self, size: int) -> None:
        """Make this many Gets at once, every second."""
        due = time.monotonic()
        while True:
            due += 1
            time.sleep(max(0.0, due - time.monotonic()))
            for done in [stub.Get.future(get()) for stub in self.stubs for _ in range(size // len(self.stubs))]:
                self.answers[done.code().name] += 1

    def watch(self) -> None:
        """Open Watches, and open them again when the server rejects them."""
        for stub in self.stubs:
            threading.Thread(target=self._watch, args=(stub,), daemon=True).start()

    def _watch(self, stub: SessionStoreServiceStub) -> None:
        held = []
        while True:
            stream = stub.Watch(pb.WatchRequest(namespace="flood"))
            try:
                next(stream)
                held.append(stream)
                self.answers["OK"] += 1
            except grpc.RpcError as error:
                self.answers[error.code().name] += 1

    def stay_silent(self) -> None:
        """Open calls on each connection without a message, and open others when the server cancels them."""
        for _ in self.stubs:
            threading.Thread(target=self._stay_silent, daemon=True).start()

    def _stay_silent(self) -> None:
        while True:
            with contextlib.suppress(OSError), Raw(self.connected()) as client:
                for number in range(120):
                    client.open_call(2 * number + 1)
                for kind, *_ in client.frames():
                    self.answers["CANCELLED"] += kind == RST_STREAM

    def connect(self) -> None:
        """Make handshakes only."""
        while True:
            with contextlib.suppress(OSError), self.connected():
                self.answers["CONNECTED"] += 1

    def connected(self) -> ssl.SSLSocket:
        """Return a TLS connection."""
        host, _, port = self._target.rpartition(":")
        context = ssl.create_default_context(cadata=self._authority.decode())
        with tempfile.NamedTemporaryFile() as file:
            file.write(self._pem.key + self._pem.certificate)
            file.flush()
            context.load_cert_chain(file.name)
        context.set_alpn_protocols(["h2"])
        return context.wrap_socket(socket.create_connection((host, int(port)), 10), server_hostname="localhost")


def get() -> pb.GetRequest:
    """Return the flooder's look-up."""
    return pb.GetRequest(namespace="flood", key=KEY)


def put() -> pb.PutRequest:
    """Return a Put of a new session."""
    request = pb.PutRequest(namespace="flood", key=os.urandom(32), value=VALUE)
    request.ttl.seconds = 3_600
    return request


FLOODS: dict[str, Callable[[Flood, int], None]] = {
    "calls at its limit": lambda flood, limit: flood.pace(0.95 * limit),
    "its limit at once": lambda flood, limit: flood.burst(limit),
    "Gets": lambda flood, _: flood.call("Get", get, 128),
    "Gets given up after 50 ms": lambda flood, _: flood.call("Get", get, 128, 0.05),
    "Puts": lambda flood, _: flood.call("Put", put, 128),
    "Batches": lambda flood, _: flood.call(
        "Batch", lambda: pb.BatchRequest(operations=[pb.BatchOperation(get=get())] * 256), 64
    ),
    "Watches": lambda flood, _: flood.watch(),
    "silent calls": lambda flood, _: flood.stay_silent(),
    "handshakes": lambda flood, _: flood.connect(),
}


def be_the_flood(arguments: Sequence[str]) -> None:
    """Flood until SIGTERM, then print the results of the calls."""
    kind, limit, connections, target, directory = arguments
    files = Path(directory)
    pem = Pem((files / "flooder.crt").read_bytes(), (files / "flooder.key").read_bytes())
    flood = Flood(target, (files / "authority.crt").read_bytes(), pem, int(connections))
    signal.signal(signal.SIGTERM, lambda *_: (print(json.dumps(flood.answers), flush=True), os._exit(0)))
    FLOODS[kind](flood, int(limit))
    while True:
        signal.pause()


@contextlib.contextmanager
def flooding(kind: str, options: argparse.Namespace, target: str, directory: Path) -> Iterator[dict[str, float]]:
    """Run a flood for the duration of the context; its results per second are available at the end."""
    answers: dict[str, float] = {}
    command = [
        *("chrt", "--other", "0", sys.executable, __file__, "--flood"),
        *(kind, str(options.limit), str(options.connections), target, str(directory)),
    ]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            time.sleep(WARM_UP + 1)
            yield answers
        finally:
            process.terminate()
            assert process.stdout
            counted = json.loads(process.stdout.readline() or "{}")
            answers |= {name: count / (time.monotonic() - started) for name, count in counted.items()}


# --- The other tenant ----------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """The latencies and failures of the quiet tenant, and the resources that its server used."""

    p50: float
    p99: float
    failed: int
    server_cores: float
    answers: dict[str, float]


def look_up(store: resumed.StoreClient, options: argparse.Namespace) -> tuple[list[float], int]:
    """Look up at a steady pace; return the seconds of each look-up, and the number of failures."""
    took, failed, due = [], 0, time.monotonic()
    for _ in range(int(options.seconds * options.rate)):
        due += 1 / options.rate
        time.sleep(max(0.0, due - time.monotonic()))
        started = time.perf_counter()
        try:
            found = store.get(KEY, deadline=5.0)
            failed += found is None
        except resumed.StoreError:
            failed += 1
        took.append(time.perf_counter() - started)
    return took, failed


class Round(NamedTuple):
    """A turn without a flood, one with a flood of another server, and one with a flood of the same server."""

    without: Turn
    control: Turn
    flooded: Turn


def turn(store: resumed.StoreClient, server: RunningServer, options: argparse.Namespace, *flood: Any) -> Turn:
    """Look up at `server` during the flood of `flooding`, if any."""
    with contextlib.ExitStack() as held:
        answers = held.enter_context(flooding(*flood)) if flood else {}
        before, started = cpu_seconds(process_tree(server.process.pid)), time.monotonic()
        took, failed = look_up(store, options)
        cores = (cpu_seconds(process_tree(server.process.pid)) - before) / (time.monotonic() - started)
    took.sort()
    return Turn(took[len(took) // 2], took[int(len(took) * 0.99)], failed, cores, answers)


def measure(options: argparse.Namespace, progress: Progress) -> dict[str, list[Round]]:
    """Alternate the turns; return the rounds for each kind of flood."""
    authority = Authority()
    limits = f'[[limit]]\nidentity = "{FLOODER}"\noperations_per_second = {options.limit}\nwatchers = 8\n'
    grants = grant(QUIET_TENANT, ["quiet"], OPERATIONS) + grant(FLOODER, ["flood"], OPERATIONS)
    cores = sorted(os.sched_getaffinity(0))
    rounds: dict[str, list[Round]] = {kind: [] for kind in options.only or FLOODS}
    with contextlib.ExitStack() as held:
        directory = Path(held.enter_context(tempfile.TemporaryDirectory()))
        files = Files(directory).write(
            authority.server(), authority.pem, grants + ("" if options.unlimited else limits)
        )
        flooder, quiet = authority.issue(FLOODER), authority.issue(QUIET_TENANT)
        for name, content in (
            ("authority.crt", authority.pem),
            ("flooder.crt", flooder.certificate),
            ("flooder.key", flooder.key),
            ("quiet.crt", quiet.certificate),
            ("quiet.key", quiet.key),
        ):
            (directory / name).write_bytes(content)
        (directory / "quiet.key").chmod(0o600)
        with bind_to_cores({cores[0]}):
            server = held.enter_context(running_server(*files.options, workers=options.workers))
        held.enter_context(bind_to_cores(set(cores[1:]) or set(cores)))
        other = held.enter_context(running_server(*files.options, workers=options.workers))
        store = resumed.StoreClient(
            server.target.replace("127.0.0.1", "localhost"),
            namespace="quiet",
            credentials=resumed.Credentials(
                ca=directory / "authority.crt", cert=directory / "quiet.crt", key=directory / "quiet.key"
            ),
        )
        store.put(KEY, VALUE, 86_000, deadline=5.0)
        if options.busy_machine:
            for process in process_tree(server.process.pid):
                for thread in Path(f"/proc/{process}/task").iterdir():
                    run_first(int(thread.name))
        run_first(0)
        task = progress.add_task("measuring", total=options.rounds * len(rounds))
        for _ in range(options.rounds):
            for kind, done in rounds.items():
                without = turn(store, server, options)
                control, flooded = (
                    turn(store, server, options, kind, options, target, directory)
                    for target in (other.target, server.target)
                )
                done.append(Round(without, control, flooded))
                progress.advance(task)
    return rounds


def run_first(thread: int) -> None:
    """Give a thread, and its future children, real-time priority if that is permitted."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(1))


def report(rounds: dict[str, list[Round]], *, markdown: bool) -> Table:
    """Return the table of the measurements."""
    table = build_table(
        *("the other tenant", "p99, ms, without", "p99, ms, control", "p99, ms, with"),
        *("p99, with ÷ without", "p99, control ÷ without", "p99, with ÷ control", "p50, with ÷ control"),
        *("failed", "its calls a second", "server, cores, without", "with"),
        markdown=markdown,
    )
    for kind, done in rounds.items():
        answers: Counter[str] = Counter()
        for each in done:
            answers.update({name: rate / len(done) for name, rate in each.flooded.answers.items()})
        table.add_row(
            kind,
            *(spread([turn.p99 * 1e3 for turn in turns]) for turns in zip(*done, strict=True)),
            spread([each.flooded.p99 / each.without.p99 for each in done]),
            spread([each.control.p99 / each.without.p99 for each in done]),
            spread([each.flooded.p99 / each.control.p99 for each in done]),
            spread([each.flooded.p50 / each.control.p50 for each in done]),
            str(sum(each.flooded.failed for each in done)),
            ", ".join(f"{rate:,.0f} {name}" for name, rate in answers.items()),
            f"{statistics.median(each.without.server_cores for each in done):.2f}",
            f"{statistics.median(each.flooded.server_cores for each in done):.2f}",
        )
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn")
    parser.add_argument("--rate", type=float, default=200.0, help="look-ups a second")
    parser.add_argument("--limit", type=int, default=200, help="operations a second that the other tenant may make")
    parser.add_argument("--connections", type=int, default=2, help="of the other tenant")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=FLOODS, help="these floods")
    parser.add_argument("--unlimited", action="store_true", help="without limits, to see what they are good for")
    parser.add_argument("--busy-machine", action="store_true", help="have the server run before all else too, as root")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    with Progress(transient=True) as progress:
        rounds = measure(options, progress)
    console = Console(width=None if os.isatty(1) else 250)
    console.print(report(rounds, markdown=options.markdown))
    console.print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--flood"]:
        be_the_flood(sys.argv[2:])
    else:
        main()
