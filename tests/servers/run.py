"""Puts libresumed-preload under Debian's servers, unmodified: `python tests/servers/run.py` (`make servers`).

Two instances of each server of servers.toml share a store, a namespace and a keyring. A client visits them by turns,
has connections reset and ended by fatal alerts, shows certificates, and comes four times at once. Exits 1 if a result
is not as servers.toml has it. --write puts the table into docs/servers.md. It needs root: the servers have a root
directory of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from contexts.client import Visit, provoke_alert, reset, visit
from contexts.places import ROOT, Host, Library, Place, Profile, Settings, environment_of
from contexts.run import Driver, judge
from contexts.table import Row
from servers.debian import LIBRARY, Debian
from servers.table import FILES, VERSIONS, Server, servers
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PAGE = ROOT / "docs" / "servers.md"
BEGIN, END = "<!-- table: written by `make servers` -->", "<!-- end of the table -->"
TURNS, CLIENTS, RETURNS = 12, 4, 25
START_PATIENCE = 10.0
"""Seconds that a server may take to serve after it listens; only a broken one takes them."""
REMOVAL_PATIENCE = 5.0
"""Seconds that a removal may take to reach the other instance; only one that does not come takes them."""
PUBLIC, REQUIRED, OTHER = Profile(), Profile(verify="require"), Profile(verify="require", ca="two")

console = Console(stderr=True)


@dataclass
class Result:
    """The outcome of one server in one version of TLS."""

    server: Server
    version: str
    own_alone: bool = False
    own: bool = False
    turns: int = 0
    reset_keeps: bool = False
    alert_removes: bool = False
    load: int = 0
    errors: list[str] = field(default_factory=list)

    def complaints(self) -> list[str]:
        """Return the differences from servers.toml."""
        found = list(self.errors)
        if self.version not in self.server.shared:
            if self.turns or self.load:
                found.append(f"a session of the other instance resumed {self.turns} and {self.load} times")
            if self.own != (self.own_alone and self.version not in self.server.loses):
                found.append(f"it resumes its own sessions: {self.own}, without the library: {self.own_alone}")
            return found
        if self.server.partly:
            return found if self.turns and self.load else [*found, f"resumed {self.turns} and {self.load} times"]
        if self.turns < TURNS:
            found.append(f"resumed {self.turns} of {TURNS} by turns")
        if self.load < CLIENTS * RETURNS:
            found.append(f"resumed {self.load} of {CLIENTS * RETURNS} at once")
        if not self.reset_keeps:
            found.append("a reset ended the session")
        if self.server.alert != "any" and self.alert_removes != (self.server.alert == "removes"):
            found.append(f"a fatal alert {'ended' if self.alert_removes else 'did not end'} the session")
        return found

    def cell(self) -> str:
        """Return the cell of the table."""
        if self.errors:
            return "**failed**"
        if self.version not in self.server.shared:
            return "full" if not self.own else "its own"
        return f"{self.turns} of {TURNS}, {self.load} of {CLIENTS * RETURNS}"


class Fleet(Driver):
    """Starts servers in a root directory of their own."""

    def __init__(self, target: str, debian: Debian, backend: int, chosen: Sequence[Server]) -> None:
        self.debian, self.backend = debian, backend
        self.servers = {server.name: server for server in chosen}
        users = sorted({"root", *(server.user for server in chosen)})
        super().__init__(target, debian.write_files(users), Debian.keyring("root"))

    def start(self, server: str, hosts: Sequence[Host], settings: Settings | None, library: Library) -> Place:
        """Start a server, and wait until it serves a client."""
        kind = self.servers[server].kind(self.debian.root, self.backend)
        place = Place(server.split(maxsplit=1)[0].lower(), hosts, FILES, settings, library, kind=kind)
        try:
            self._await_service(place, self.servers[server].offers[-1], hosts[0].profile)
        except BaseException:
            place.stop()
            raise
        return place

    def _await_service(self, place: Place, version: str, profile: Profile) -> None:
        certificate = self.files.directory / f"client-{profile.ca}.pem" if profile.verify else None
        end = time.monotonic() + START_PATIENCE
        while not (made := visit(place, version, certificate=certificate)).served:
            if time.monotonic() > end:
                raise RuntimeError(f"it serves no client: {made.answer} {made.detail}\n{place.log()}")
            time.sleep(0.1)

    @contextlib.contextmanager
    def pair(self, server: Server, library: Library | None, lines: list[str]) -> Iterator[tuple[Place, Place]]:
        """Run two instances; `lines` gets the lines that the library has written."""
        host, started = Host("", "public", PUBLIC), list[Place]()
        unused = library or Library(LIBRARY, Path(), [])
        settings = None if library is None else Settings(
            library, self.target, f"servers-{uuid.uuid4().hex}", Debian.keyring(server.user), mirror=True,
            verified="verified" in server.settings, ignore_id_context="ignore" in server.settings,
        )  # fmt: skip
        try:
            for _ in range(2):
                started.append(self.start(server.name, [host], settings, unused))
            yield started[0], started[1]
        finally:
            for place in started:
                lines += [line for line in place.stop() if line not in lines]


def served(place: Place, version: str, session: Any = None, **more: Any) -> Visit:
    """Visit a place that has to serve the client."""
    made = visit(place, version, session=session, **more)
    if not made.served:
        raise RuntimeError(f"the server did not serve the client: {made.answer} {made.detail}")
    return made


def _take_turns(places: tuple[Place, Place], version: str, count: int) -> int:
    """Return how many of the connections resumed that each offered to one instance a session of the other one."""
    session, resumed = served(places[0], version).session, 0
    for number in range(count):
        made = served(places[(number + 1) % 2], version, session)
        resumed += made.resumed
        session = made.session or session
    return resumed


def _ends_by_alert(places: tuple[Place, Place], version: str) -> bool:
    session, end = served(places[0], version, end=provoke_alert).session, time.monotonic() + REMOVAL_PATIENCE
    while served(places[1], version, session).resumed:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _resumes_itself(place: Place, version: str) -> bool:
    return served(place, version, served(place, version).session).resumed


def measure(fleet: Fleet, server: Server, library: Library, lines: list[str]) -> list[Result]:
    """Return the outcome in each version of TLS that a server has."""
    results = [Result(server, version) for version in server.offers]
    with fleet.pair(server, None, []) as places:
        for result in results:
            result.own_alone = _resumes_itself(places[0], result.version)
            if served(places[1], result.version, served(places[0], result.version).session).resumed:
                result.errors.append("resumes without the library as well")
    with fleet.pair(server, library, lines) as places:
        for result in results:
            for place in places:  # a process learns from a full handshake which context serves a name
                served(place, result.version)
            result.own = _resumes_itself(places[0], result.version)
            result.turns = _take_turns(places, result.version, TURNS)
            if result.version in server.shared:
                session = served(places[0], result.version, end=reset).session
                result.reset_keeps = served(places[1], result.version, session).resumed
                result.alert_removes = _ends_by_alert(places, result.version)
            with ThreadPoolExecutor(CLIENTS) as pool:
                version = result.version
                loads = pool.map(lambda _, version=version: _take_turns(places, version, RETURNS), range(CLIENTS))
                result.load = sum(loads)
    return results


def certificate_rows(server: Server) -> list[Row]:
    """Return rows for tests/contexts about a server that requires client certificates; the last one may resume."""
    public, required, other = Host("", "public", PUBLIC), Host("", "required", REQUIRED), Host("", "other", OTHER)
    settings = ["", "verified ignore mirror"]

    def case_row(case: str, first: Host, second: Host, client: str, must: str) -> Row:
        return Row(
            case, server.name, server.name, [first], [second], must, settings, client=client, client_second=client
        )

    return [
        case_row("public session, a certificate is required", public, required, "", "not"),
        case_row("session of authority one, authority two is trusted", required, other, "one", "not"),
        case_row("the same requirement twice", required, required, "one", "same"),
    ]


def try_certificates(fleet: Fleet, server: Server, library: Library) -> tuple[str, list[str]]:
    """Return the cell about client certificates, and the failures."""
    if not server.verify:
        return "not tried", []
    complaints, resumed = list[str](), False
    for row in certificate_rows(server):
        alone = fleet.run(row, library, alone=True)
        result = fleet.run(row, library, alone=False)
        complaints += [f"{row.case}: {complaint}" for complaint in judge(row, alone, result)]
        resumed = any(trial.offered.resumed for trial in result.trials)
    if complaints:
        return "**failed**", complaints
    return "held to, resumes" if resumed else "held to, full", []


@dataclass
class Report:
    """All about a server."""

    server: Server
    results: list[Result] = field(default_factory=list)
    certificates: str = ""
    complaints: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def report(fleet: Fleet, server: Server, library: Library) -> Report:
    """Run everything with a server."""
    made, started = Report(server), time.monotonic()
    try:
        made.results = measure(fleet, server, library, made.lines)
        made.complaints = [f"TLS {result.version}: {text}" for result in made.results for text in result.complaints()]
        made.certificates, complaints = try_certificates(fleet, server, library)
        made.complaints += complaints
    except Exception as error:  # noqa: BLE001  # the other servers are tried
        made.complaints.append(f"{type(error).__name__}: {error}")
    console.print(f"{server.name}: {'; '.join(made.complaints) or 'as it must be'}, {time.monotonic() - started:.0f} s")
    for line in made.lines if made.complaints else []:
        console.print(f"    log: {line}", markup=False)
    return made


def row(made: Report, debian: Debian) -> str:
    """Return the row of a server in its table."""
    server, cells = made.server, {result.version: result.cell() for result in made.results}
    versions = [cells.get(version, "no such version" if cells else "**failed**") for version in VERSIONS]
    head = [server.name, debian.version(server.packages[0]), *versions]
    if not server.shared:
        return f"| {' | '.join([*head, server.note])} |"
    word = {"removes": "yes", "keeps": "no", "any": "in part"}[server.alert]
    settings = f"{server.how}. {server.note}".removesuffix(". ")
    return f"| {' | '.join([*head, word, made.certificates, settings])} |"


def markdown(rows: Mapping[str, str]) -> str:
    """Return the tables of the page, of rows by the server's name."""
    head = "| Server | Debian's version | TLS 1.2 | TLS 1.3 |"
    shared = [f"{head} A fatal alert ends a session | Client certificates | Settings |", "|---" * 7 + "|"]
    alone = [f"{head} Why |", "|---" * 5 + "|"]
    for server in servers():
        if server.name in rows:
            (shared if server.shared else alone).append(rows[server.name])
    return "\n".join([*shared, "", "### Servers that are left alone", "", *alone])


def write(rows: Mapping[str, str]) -> None:
    """Put rows into the page; those of other servers stay."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    table, _, after = rest.partition(END)
    present = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines() if line.startswith("| ")}
    PAGE.write_text(f"{before}{BEGIN}\n\n{markdown({**present, **rows})}\n\n{END}{after}", encoding="utf-8")


def backend() -> int:
    """Start an HTTP server for proxies, which keeps its connections; return its port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while connection.recv(65536):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nserved")

    def accept() -> None:
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def main() -> int:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(prog="make servers", description=__doc__)
    built = ROOT / ".build" / "cargo" / "release" / "libresumed_preload.so"
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="servers whose name has it")
    parser.add_argument("--library", type=Path, default=built, help="libresumed_preload.so")
    parser.add_argument("--suite", default="bookworm", help="of Debian (bookworm)")
    parser.add_argument("--root", type=Path, help="the servers' root directory (.build/servers/SUITE)")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="servers at once (2)")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/servers.md")
    arguments = parser.parse_args()
    if os.getuid():
        parser.error("needs root, for chroot and for servers that change their user")
    started, every = time.monotonic(), servers()
    debian = Debian(arguments.root or ROOT / ".build" / "servers" / arguments.suite)
    debian.make(
        arguments.suite,
        {package for server in every for package in server.packages if not server.unpacked},
        {package for server in every for package in server.packages if server.unpacked},
    )
    debian.install(arguments.library)
    chosen = [each for each in every if not arguments.only or any(text in each.name for text in arguments.only)]
    for server in [server for server in chosen if not debian.version(server.packages[0])]:
        console.print(f"left out: {server.name} is not in {debian.root}, which a new run makes anew if it is deleted")
        chosen.remove(server)
    library = Library(LIBRARY, Path(), [ROOT / "client" / "python", ROOT / "server"])
    with running_server(env=environment_of(library)) as store:
        fleet = Fleet(store.target, debian, backend(), chosen)
        with ThreadPoolExecutor(arguments.at_once) as pool:
            reports = list(pool.map(lambda server: report(fleet, server, library), chosen))
    rows = {each.server.name: row(each, debian) for each in reports}
    sys.stdout.write(f"{markdown(rows)}\n")
    if arguments.write:
        write(rows)
    wrong = sum(bool(each.complaints) for each in reports)
    console.print(f"{len(reports)} servers, not as they must be: {wrong}, {time.monotonic() - started:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
