"""Drives the rows of cases.toml and prints the table: `python tests/contexts/run.py` (`make contexts`).

Each row runs without the library, and with it: two processes share a store, a namespace and a keyring; a session that
the first one negotiated is offered to the second one, before it has made a full handshake for the name and after it.
Exits 1 if a row is not as it must be. --write puts the table into docs/contexts.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from contexts import client
from contexts.certificates import Files, new_keyring
from contexts.places import BUILD, ROOT, SERVERS, Library, Place, Settings, available, environment_of
from contexts.table import Row, rows
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from contexts.client import Visit
    from contexts.places import Host

PAGE = ROOT / "docs" / "contexts.md"
BEGIN, END = "<!-- table: written by `make contexts` -->", "<!-- end of the table -->"
LINKED = ("-lssl", "-lcrypto", "-lpthread", "-ldl", "-lm", "-lgcc_s")
VERSIONS = ("1.3", "1.2")
ALONE, BEFORE, AFTER, TICKETS = "Alone", "Before", "With the library", "With tickets"
AGREEMENT_PATIENCE = 1.0
"""Seconds that a process may take to agree on ticket secrets."""
VALID_SECONDS = 2.0, 8.0, 32.0
"""How long a client certificate is valid that expires between the handshakes; longer where it was refused at once."""

console = Console(stderr=True)


@dataclass
class Trial:
    """A session that was offered to the second place, and the outcome."""

    version: str
    settings: str
    warm: bool
    first: Visit
    offered: Visit

    @property
    def label(self) -> str:
        """Return which trial it was."""
        return f"TLS {self.version}, {self.settings or 'default settings'}, {'warm' if self.warm else 'cold'}"


@dataclass
class Result:
    """What became of a row without the library, or with one version of it."""

    trials: list[Trial] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    error: str = ""

    def cell(self) -> str:
        """Return the cell of the table; results common to all versions appear once."""
        if self.error:
            return f"error: {self.error.splitlines()[0][:80]}"
        seen: dict[str, set[str]] = {}
        for trial in self.trials:
            seen.setdefault(str(trial.offered), set()).add(trial.version)
        everywhere = {trial.version for trial in self.trials}
        return "; ".join(
            text if versions == everywhere else f"{'/'.join(sorted(versions))}: {text}"
            for text, versions in seen.items()
        )


class Driver:
    """Runs rows with one store and one set of certificates."""

    def __init__(self, target: str, files: Files, keyring: Path, *, tickets: bool = False) -> None:
        self.target, self.files, self.keyring, self.tickets = target, files, keyring, tickets

    def run(self, row: Row, library: Library, *, alone: bool, quick: bool = False) -> Result:
        """Run a row without the library (`alone`) or with it."""
        result = Result()
        try:
            if alone:
                self._alone(row, library, result)
            else:
                self._with(row, library, result, quick=quick)
        except Exception as error:  # noqa: BLE001  # the other rows are tried
            result.error = f"{type(error).__name__}: {error}"
        return result

    def _alone(self, row: Row, library: Library, result: Result) -> None:
        places = self._places(row, None, library)
        try:
            for version in VERSIONS:
                self._switch(row, places[1], on=False)
                result.trials += self._try(row, places, version, "", warm=False, alone=True)[:1]
        finally:
            self._stop(places)

    def _with(self, row: Row, library: Library, result: Result, *, quick: bool) -> None:
        for number, words in enumerate(row.settings[-1:] if quick else row.settings):
            settings = Settings(
                library, self.target, f"contexts-{uuid.uuid4().hex}", self.keyring, verified="verified" in words,
                ignore_id_context="ignore" in words, single_host="single" in words,
                mirror="mirror" in words, single_use="take" in words, tickets=self.tickets,
            )  # fmt: skip
            places = self._places(row, settings, library)
            try:
                if self.tickets:
                    self._await_agreement(row, places)
                # Which version is tried before the process has learned anything is another one with other settings.
                for version in VERSIONS if number % 2 == 0 else VERSIONS[::-1]:
                    if row.cold or (row.must != "resume" and row.client != "expiring"):  # which takes its time
                        self._switch(row, places[1], on=False)
                        result.trials += self._try(row, places, version, words, warm=False)
                    if not row.cold:
                        self._warm(row, places[1], version)
                        if self.tickets and row.must == "resume":  # hosts may have namespaces of their own
                            certificate = self._certificate(row.client)
                            self._resume_itself(places[0], version, row.ask, certificate)
                            self._resume_itself(places[1], version, row.ask_second, certificate)
                        result.trials += self._try(row, places, version, words, warm=True)
            finally:
                for place in places:
                    result.lines += [line for line in place.stop() if line not in result.lines]

    def start(self, server: str, hosts: Sequence[Host], settings: Settings | None, library: Library) -> Place:
        """Start a server."""
        return Place(server, hosts, self.files.directory, settings, library)

    def _places(self, row: Row, settings: Settings | None, library: Library) -> tuple[Place, Place]:
        with ThreadPoolExecutor(2) as pool:
            started = [
                pool.submit(self.start, row.first_server, row.first, settings, library),
                pool.submit(self.start, row.server, row.second, settings, library),
            ]
        try:
            return started[0].result(), started[1].result()
        except BaseException:
            for each in started:
                if not each.exception():
                    each.result().stop()
            raise

    def _try(
        self, row: Row, places: tuple[Place, Place], version: str, settings: str, *, warm: bool, alone: bool = False
    ) -> list[Trial]:
        first, certificate = self._negotiated(row, places[1] if row.here else places[0], version, alone=alone)
        if first.session is None or first.answer == "refused":
            raise RuntimeError(f"no session of {row.first_server} in TLS {version}: {first.answer} {first.detail}")
        if row.switched:
            self._switch(row, places[1], on=True)

        def offer(session: object) -> Visit:
            return client.visit(
                places[1], version, name=row.ask_second, certificate=certificate, session=session,
                alpn=row.alpn_second, path=row.path_second,
            )  # fmt: skip

        # Without the library, a process that resumes its own sessions says nothing of a full handshake.
        offered = offer(None if row.here and alone else first.session)
        trials = [Trial(version, settings, warm, first, offered)]
        if row.must == "ended" and offered.resumed and offered.session is not None:
            # A session of a connection that was ended, offered again where its client has access.
            trials.append(Trial(version, settings, warm, first, offer(offered.session)))
        return trials

    def _negotiated(self, row: Row, place: Place, version: str, *, alone: bool) -> tuple[Visit, Path | None]:
        """Return the visit whose session is offered, and the certificate that is shown then."""

        def negotiate(certificate: Path | None) -> Visit:
            visit = client.visit(place, version, name=row.ask, certificate=certificate, path=row.path)
            for _ in range(row.resumes):
                visit = client.visit(
                    place, version, name=row.ask, certificate=certificate, session=visit.session, path=row.path
                )
            return visit

        if row.client != "expiring":
            return negotiate(self._certificate(row.client)), self._certificate(row.client_second)
        if alone:  # no session of another process resumes, so there is nothing to wait for
            return negotiate(self._certificate("one")), self._expiring(-1.0)
        for seconds in VALID_SECONDS:
            certificate, expires = self._expiring(seconds), time.time() + seconds
            first = negotiate(certificate)
            if first.answer != "refused":
                break
        time.sleep(max(0.0, expires - time.time()) + 1.2)  # whole seconds
        return first, certificate

    def _expiring(self, seconds: float) -> Path:
        return self.files.expiring(f"expiring-{uuid.uuid4().hex}", seconds)

    def _warm(self, row: Row, place: Place, version: str) -> None:
        """Make a full handshake for the name, with a certificate that is accepted."""
        self._switch(row, place, on=False)
        profile = row.serving.profile
        name = (
            {"both": "one", "twin": ""}.get(profile.ca, profile.ca) if profile.verify and not profile.location else ""
        )
        client.visit(place, version, name=row.ask_second, certificate=self._certificate(name))

    def _await_agreement(self, row: Row, places: Sequence[Place]) -> None:
        """Wait until processes have ticket secrets, by visits for a name that no row uses; not all share sessions."""
        for place, profile in zip(places, (row.first[0].profile, row.second[0].profile), strict=True):
            certificate = self._certificate("one" if profile.verify and not profile.location else "")
            self._resume_itself(place, "1.3", "agreement.example", certificate)

    @staticmethod
    def _resume_itself(place: Place, version: str, name: str, certificate: Path | None) -> None:
        """Visit a place until it resumes its own session, or a second has passed."""
        end, session, resumed = time.monotonic() + AGREEMENT_PATIENCE, None, False
        while not resumed and time.monotonic() < end:
            visit = client.visit(place, version, name=name, certificate=certificate, session=session)
            session, resumed = visit.session, visit.resumed

    def _certificate(self, name: str) -> Path | None:
        return self.files.directory / f"client-{name}.pem" if name else None

    @staticmethod
    def _switch(row: Row, place: Place, *, on: bool) -> None:
        if row.switched:
            place.switch.touch() if on else place.switch.unlink(missing_ok=True)

    @staticmethod
    def _stop(places: Iterable[Place]) -> None:
        for place in places:
            place.stop()


def judge(row: Row, alone: Result, result: Result) -> list[str]:
    """Return the failures of a row."""
    if alone.error or result.error:
        return [f"error: {alone.error or result.error}"]
    reference = {trial.version: trial.offered for trial in alone.trials}
    complaints = []
    for trial in result.trials:
        if row.known_version == trial.version:
            continue
        offered, full = trial.offered, reference[trial.version]
        if row.must == "resume":
            wrong = not (offered.resumed and offered.served and offered.answer == full.answer)
        elif row.must == "not":
            wrong = offered.resumed or offered.answer != full.answer
        elif row.must == "ended":
            wrong = offered.answer != ("refused" if offered.resumed else full.answer)
        else:
            wrong = offered.answer != full.answer
        if wrong:
            complaints.append(
                f"{trial.label}: {offered} ({offered.answer} {offered.detail}); alone: {full} ({full.answer})"
            )
    return complaints


def let_in(row: Row, alone: Result, result: Result) -> bool:
    """Return whether a client was served that the server alone refuses, or as another client than there."""
    reference = {trial.version: trial.offered for trial in alone.trials}
    return any(
        trial.offered.served and trial.offered.answer != reference[trial.version].answer
        for trial in result.trials
        if trial.version in reference
    )


def build_c_server(library: Path, include: Path, output: Path) -> Path:
    """Compile server.c with a libresumed.a and its header; return the program, which is not there if that failed."""
    archive = library.with_name("libresumed.a")
    header = include / "resumed.h"
    if not archive.exists() or not header.exists() or not shutil.which("cc"):
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    features = {"-DFINGERPRINTS": "single_host", "-DTICKETS": "tickets_tls12"}
    text = header.read_text(encoding="utf-8")
    flags = [flag for flag, option in features.items() if option in text]
    source, fresh = str(Path(__file__).with_name("server.c")), output.with_name(f"{output.name}.{os.getpid()}")
    subprocess.run(
        ["cc", "-O1", "-Wall", "-Wextra", *flags, source, f"-I{include}", str(archive), *LINKED, "-o", str(fresh)],
        check=True,
    )
    fresh.replace(output)  # another run may use it
    return output


def revision(name: str) -> tuple[Path, Path]:
    """Check a revision out and build its libraries; return its tree and its preloaded library."""
    tree = BUILD / "before"
    if not tree.exists():
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), name], cwd=ROOT, check=True)
    subprocess.run(["git", "checkout", "--quiet", "--detach", name], cwd=tree, check=True)
    target = tree / ".build" / "cargo"
    console.print(f"building {name}")
    subprocess.run(
        ["cargo", "build", "--quiet", "--release", "--locked", "--workspace"], cwd=tree / "client" / "c", check=True,
        env={**os.environ, "CARGO_TARGET_DIR": str(target)},
    )  # fmt: skip
    return tree, target / "release" / "libresumed_preload.so"


def library(preload: Path, python: Path, include: Path, name: str) -> Library:
    """Return a version of the clients, with its own server.c."""
    c_server = build_c_server(preload, include, BUILD / f"server-{name}")
    return Library(preload, c_server, [python, python.parents[1] / "server"])


def markdown(chosen: list[Row], columns: dict[str, list[Result]], verdicts: list[str]) -> str:
    """Return the table: the servers of a case that agree share a line."""
    notes = list(dict.fromkeys(row.known for row in chosen if row.known))
    words = {"resume": "resumes", "not": "full handshake", "same": "answer as alone", "ended": "not served"}
    heads = ["Case", "Servers", "Must", *columns, "As it must be"]
    servers: dict[tuple[str, ...], list[str]] = {}
    for number, row in enumerate(chosen):
        name = row.server if row.server == row.first_server else f"{row.first_server} to {row.server}"
        note = f" [{notes.index(row.known) + 1}]" if row.known else ""
        cells = [words[row.must], *(results[number].cell() for results in columns.values()), verdicts[number] + note]
        servers.setdefault((row.case, *cells), []).append(name)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join([case, ', '.join(names), *cells])} |" for (case, *cells), names in servers.items()]
    explained = [f"[{number}] {text}  " for number, text in enumerate(notes, 1)]
    return "\n".join([*lines, *(["", *explained] if notes else [])])


def select(only: Sequence[str], servers: Sequence[str], usable: Library) -> list[Row]:
    """Return the selected rows that can run here."""
    chosen = [row for row in rows() if not servers or row.server in servers]
    if only:
        chosen = [row for row in chosen if any(fnmatch.fnmatch(row.name, f"*{pattern}*") for pattern in only)]
    missing = {name for row in chosen for name in (row.server, row.first_server) if not available(name, usable)}
    for name in sorted(missing):
        console.print(f"left out: {name} is not installed")
    return [row for row in chosen if not {row.server, row.first_server} & missing]


def main() -> int:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(prog="make contexts", description=__doc__)
    built = ROOT / ".build" / "cargo" / "release" / "libresumed_preload.so"
    parser.add_argument("--only", nargs="*", default=[], metavar="PATTERN", help="rows whose `server: case` has it")
    parser.add_argument("--servers", nargs="*", default=[], choices=SERVERS, metavar="NAME", help=", ".join(SERVERS))
    parser.add_argument(
        "--library", type=Path, default=built, help="libresumed_preload.so, with libresumed.a beside it"
    )
    parser.add_argument("--include", type=Path, default=ROOT / "client" / "c" / "include", help="where resumed.h is")
    parser.add_argument("--client-python", type=Path, default=ROOT / "client" / "python", help="the Python client")
    parser.add_argument("--before", metavar="REVISION", help="a second column: this revision, which is built first")
    parser.add_argument("--before-tree", type=Path, help="a second column: a checked-out tree")
    parser.add_argument("--before-library", type=Path, help="and its built library")
    parser.add_argument("--at-once", type=int, default=4, metavar="N", help="rows at once (4)")
    parser.add_argument("--quick", action="store_true", help="only the settings that could let most in")
    parser.add_argument(
        "--tickets", action="store_true", help="a further column: clients keep the sessions, in tickets"
    )
    parser.add_argument("--verbose", action="store_true", help="all that was wrong with a row")
    parser.add_argument("--markdown", action="store_true", help="print the whole table")
    parser.add_argument("--write", action="store_true", help="put the table into docs/contexts.md")
    arguments = parser.parse_args()
    started = time.monotonic()
    libraries = _libraries(arguments)
    chosen = select(arguments.only, arguments.servers, libraries[AFTER])
    columns = _columns(chosen, libraries, arguments.at_once, quick=arguments.quick, tickets=arguments.tickets)
    failures = {
        title: [judge(*each) for each in zip(chosen, columns[ALONE], column, strict=True)]
        for title, column in columns.items()
        if title != ALONE
    }
    verdicts = [_verdict(row, number, columns, failures) for number, row in enumerate(chosen)]
    table = markdown(chosen, columns, verdicts)
    if arguments.markdown:
        sys.stdout.write(f"{table}\n")
    for title, complaints in failures.items():
        for number, row in enumerate(chosen):
            if complaints[number]:
                severe = let_in(row, columns[ALONE][number], columns[title][number])
                _report(
                    title, row, complaints[number], columns[title][number], severe=severe, verbose=arguments.verbose
                )
    if arguments.write:
        _write(table)
    wrong = {
        title: sum(bool(each) and not row.known for row, each in zip(chosen, complaints, strict=True))
        for title, complaints in failures.items()
    }
    console.print(f"{len(chosen)} rows, not as they must be: {wrong}, {time.monotonic() - started:.0f} s")
    return 1 if wrong[AFTER] or wrong.get(TICKETS) else 0


def _libraries(arguments: argparse.Namespace) -> dict[str, Library]:
    after = library(arguments.library, arguments.client_python, arguments.include, "after")
    if arguments.before:
        arguments.before_tree, arguments.before_library = revision(arguments.before)
    if not arguments.before_tree:
        return {AFTER: after}
    tree = arguments.before_tree
    before = library(arguments.before_library, tree / "client" / "python", tree / "client" / "c" / "include", "before")
    return {BEFORE: before, AFTER: after}


def _columns(
    chosen: list[Row], libraries: dict[str, Library], at_once: int, *, quick: bool, tickets: bool
) -> dict[str, list[Result]]:
    with tempfile.TemporaryDirectory(prefix="resumed-contexts-") as name:
        directory = Path(name)
        directory.chmod(0o755)  # servers change their user
        files, keyring = Files(directory), new_keyring(directory)
        with running_server(env=environment_of(libraries[AFTER])) as store:
            driver = Driver(store.target, files, keyring)
            columns = {
                title: _column(driver, chosen, which, title, at_once, quick=quick)
                for title, which in {ALONE: libraries[AFTER], **libraries}.items()
            }
            if tickets:
                driver = Driver(store.target, files, keyring, tickets=True)
                columns[TICKETS] = _column(driver, chosen, libraries[AFTER], TICKETS, at_once, quick=quick)
            return columns


def _report(title: str, row: Row, complaints: list[str], result: Result, *, severe: bool, verbose: bool) -> None:
    word = "LET IN" if severe and row.must != "resume" else "not as it must be"
    shown = complaints if verbose else complaints[:2]
    lines = [f"{title}: {word}: {row.name}", *([f"    known: {row.known}"] if row.known else [])]
    lines += [f"    {complaint}" for complaint in shown]
    if len(shown) < len(complaints):
        lines.append(f"    and {len(complaints) - len(shown)} more (--verbose)")
    lines += [f"    log: {line}" for line in result.lines]
    sys.stdout.write("\n".join([*lines, ""]))


def _column(
    driver: Driver, chosen: list[Row], which: Library, title: str, at_once: int, *, quick: bool
) -> list[Result]:
    done = 0

    def run(row: Row) -> Result:
        nonlocal done
        result = driver.run(row, which, alone=title == ALONE, quick=quick)
        done += 1
        if done % 20 == 0 or done == len(chosen):
            console.print(f"{title}: {done} of {len(chosen)} rows")
        return result

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(run, chosen))


def _verdict(row: Row, number: int, columns: dict[str, list[Result]], failures: dict[str, list[list[str]]]) -> str:
    wrong = [title for title in (AFTER, TICKETS) if title in failures and failures[title][number]]
    if not wrong:
        return "yes"
    severe = row.must != "resume" and any(
        let_in(row, columns[ALONE][number], columns[title][number]) for title in wrong
    )
    return "**let in**" if severe else "**no**"


def _write(table: str) -> None:
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    if not begin:
        before, rest = f"{before.rstrip()}\n\n## Held to it\n\n", END + "\n"
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
