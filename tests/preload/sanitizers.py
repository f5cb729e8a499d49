"""Looks for memory errors and leaks in libresumed: `python tests/preload/sanitizers.py` (`make sanitizers`).

client/c/tests/handshakes.c makes full and resumed handshakes, removes sessions, sends and receives fatal alerts, makes
and frees contexts, forks, and meets a store whose answers are malformed: with AddressSanitizer, LeakSanitizer and
UndefinedBehaviorSanitizer in the C, AddressSanitizer and overflow checks in the Rust (where a nightly toolchain is
installed; else the Rust is the usual one), and then as it is installed, under valgrind's memcheck. So do contexts.c,
which offers sessions where they may resume and where they must not, and tickets.c. Under memcheck, too: nginx with
libresumed-preload, in one process. Exits 1 if anything was found.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

import resumed
from conformance.liar import Liar, lying_store
from preload.servers import ROOT, context_files, serving, settings
from resumed_server.cli.tls_client import Client, Endpoint, HandshakeFailed
from support.server import running_server
from support.tls import CA

if TYPE_CHECKING:
    from OpenSSL import SSL

CLIENT_C = ROOT / "client" / "c"
BUILD = ROOT / ".build" / "sanitizers"
PLAIN = ROOT / ".build" / "c"
LINKED = ("-lssl", "-lcrypto", "-lpthread", "-ldl", "-lm", "-lgcc_s")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-O1", "-g")
FOUND = 99
MEMCHECK = (
    "valgrind", f"--error-exitcode={FOUND}", "--leak-check=full", "--show-leak-kinds=definite,indirect",
    "--errors-for-leak-kinds=definite", "--num-callers=40", "--fair-sched=yes",
)  # fmt: skip
OF_NGINX = f"--suppressions={CLIENT_C / 'tests' / 'nginx.supp'}"
FORKED = f"--suppressions={CLIENT_C / 'tests' / 'fork.supp'}"
SHAPES = {
    "all endings": ("--threads", "2", "--children", "3"),
    "mirror": ("--threads", "2", "--mirror", "1000000"),
    "single use": ("--threads", "2", "--single-use"),
    "malformed answers": ("--threads", "2", "--lies"),
}
LIMIT = 3600
"""Seconds that a run may take; only a broken one takes them."""


class Fleet(NamedTuple):
    """What frontends of one run share."""

    certificate: Path
    keys: Path
    keyring: resumed.Keyring

    @classmethod
    def in_directory(cls, directory: Path) -> Fleet:
        """Make one."""
        certificate, keys = directory / "certificate.pem", directory / "fleet.keys"
        certificate.write_bytes(CA.issue_cert("localhost").private_key_and_cert_chain_pem.bytes())
        keys.touch(0o600)
        keys.write_text(resumed.Keyring.generate() + "\n", encoding="ascii")
        return cls(certificate, keys, resumed.Keyring.load(keys))


class Outcome(NamedTuple):
    """Result of a run."""

    handshakes: int
    resumed: int
    report: str
    """Findings of the sanitizers, or an empty string."""


def spoil_some(liar: Liar, keyring: resumed.Keyring, seed: int) -> None:
    """Have a store answer two of three look-ups with malformed values, sealed rightly or not."""
    chance = random.Random(seed)  # to be repeated, not to be secret

    def mutated(data: bytes) -> bytes:
        changed = bytearray(data[: chance.choice((len(data), chance.randrange(len(data))))])
        for _ in range(chance.randrange(4)):
            if changed:
                changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)

    def spoil(key: bytes, value: bytes) -> bytes:
        match chance.randrange(3):
            case 0:
                return mutated(value)
            case 1:
                session, not_after = keyring.open(key, value, time.time())
                return keyring.seal(key, mutated(session), not_after)
        return value

    liar.spoil = spoil


def sanitized() -> tuple[Path, ...]:
    """Build handshakes.c, contexts.c, tickets.c and libresumed with sanitizers, and return the programs."""
    nightly = subprocess.run(["cargo", "+nightly", "--version"], capture_output=True, check=False).returncode == 0
    library = BUILD / "cargo" / "debug"
    command, environment = ["cargo", "build", "--quiet", "--locked"], {"CARGO_TARGET_DIR": str(BUILD / "cargo")}
    if nightly:
        host = re.search("host: (.*)", subprocess.check_output(["rustc", "+nightly", "-vV"], text=True))
        assert host
        # A target of its own, or the sanitizer would be in build scripts as well.
        command = ["cargo", "+nightly", *command[1:], "--target", host[1]]
        environment["RUSTFLAGS"] = "-Zsanitizer=address"
        library = BUILD / "cargo" / host[1] / "debug"
    subprocess.run(command, cwd=CLIENT_C, env={**os.environ, **environment}, check=True)
    programs = tuple(BUILD / name for name in ("handshakes", "contexts", "tickets"))
    for program in programs:
        source = CLIENT_C / "tests" / f"{program.name}.c"
        inputs = (f"-I{CLIENT_C / 'include'}", str(source), str(library / "libresumed.a"))
        subprocess.run(["cc", *SANITIZE, *inputs, *LINKED, "-o", str(program)], check=True)
    return programs


def contexts(command: tuple[str, ...], life: int = 30) -> Outcome:
    """Run contexts.c, whose client certificate ends so many seconds after it has begun."""
    with tempfile.TemporaryDirectory(prefix="resumed-sanitizers-") as directory, running_server() as store:
        fleet = Fleet.in_directory(Path(directory))
        files = context_files(Path(directory), seconds=life)
        named = {"target": store.target, "keyring": fleet.keys, **files}
        return _outcome([*command, *(f"--{name}={value}" for name, value in named.items()), "--life", str(life)])


def tickets(command: tuple[str, ...]) -> Outcome:
    """Run tickets.c."""
    with tempfile.TemporaryDirectory(prefix="resumed-sanitizers-") as directory, running_server() as store:
        fleet = Fleet.in_directory(Path(directory))
        files = context_files(Path(directory), seconds=0)
        named = {"target": store.target, "keyring": fleet.keys, **{name: files[name] for name in ("certificate", "ca")}}
        return _outcome([*command, *(f"--{name}={value}" for name, value in named.items())])


def _outcome(command: list[str]) -> Outcome:
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace", timeout=LIMIT)
    made, reused = map(int, done.stdout.split()) if done.stdout else (0, 0)
    return Outcome(made, reused, done.stderr if done.returncode else "")


def handshakes(command: tuple[str, ...], shape: str, families: int) -> Outcome:
    """Run handshakes.c, with a store that lies if it has to."""
    with tempfile.TemporaryDirectory(prefix="resumed-sanitizers-") as directory, contextlib.ExitStack() as held:
        fleet = Fleet.in_directory(Path(directory))
        if "--lies" in SHAPES[shape]:
            liar = held.enter_context(lying_store())
            spoil_some(liar, fleet.keyring, families)
            target = liar.target
        else:
            target = held.enter_context(running_server()).target
        arguments = ["--certificate", str(fleet.certificate), "--target", target, "--namespace", "shop"]
        arguments += ["--keyring", str(fleet.keys), "--families", str(families), *SHAPES[shape]]
        done = subprocess.run(
            [*command, *arguments], check=False, capture_output=True, text=True, errors="replace", timeout=LIMIT
        )
    counted = dict(line.split() for line in done.stdout.splitlines() if line.count(" ") == 1)
    report = done.stderr if done.returncode else ""
    return Outcome(int(counted.get("handshakes", 0)), int(counted.get("resumed", 0)), report)


def nginx(families: int, *, lies: bool) -> Outcome:
    """Run nginx with libresumed-preload under memcheck, in one process."""
    with tempfile.TemporaryDirectory(prefix="resumed-sanitizers-") as name, contextlib.ExitStack() as held:
        fleet = Fleet.in_directory(Path(name))
        log = Path(name) / "memcheck.log"
        if lies:
            liar = held.enter_context(lying_store())
            spoil_some(liar, fleet.keyring, families)
            target = liar.target
        else:
            target = held.enter_context(running_server()).target
        environment = settings(target, "shop", fleet.keys, deadline="10", mirror="0" if lies else "1MiB")
        under = (*MEMCHECK, OF_NGINX, f"--log-file={log}")
        with serving("nginx", fleet.certificate, environment, workers=0, under=under) as server:
            made = reused = 0
            endpoint = Endpoint.resolve("127.0.0.1", server.port)
            clients = [Client("localhost", version, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") for version in ("1.2", "1.3")]
            for number in range(families):
                session: SSL.Session | None = None
                for _ in range(4):
                    made += 1
                    try:
                        visit = clients[number % 2].visit(endpoint, session)
                    except HandshakeFailed:
                        if not lies:  # a correctly sealed value may contain a session that the client cannot decode
                            raise
                    else:
                        session, reused = visit.session, reused + visit.resumed
            server.process.terminate()
            found = server.process.wait(LIMIT)
        return Outcome(made, reused, log.read_text(errors="replace") if found == FOUND else "")


def main() -> int:
    """Run all, print, and return 0 if nothing was found."""
    parser = argparse.ArgumentParser(prog="make sanitizers", description=__doc__)
    parser.add_argument("--families", type=int, default=800, help="of four handshakes and more, with each sanitizer")
    parser.add_argument(
        "--only", nargs="*", choices=("asan", "memcheck", "nginx"), default=("asan", "memcheck", "nginx")
    )
    options = parser.parse_args()
    table = Table("watched by", "program", "what", "handshakes", "resumed", "errors")
    console, failed = Console(), 0

    def add(tool: str, program: str, what: str, outcome: Outcome) -> None:
        nonlocal failed
        failed += bool(outcome.report)
        table.add_row(
            tool,
            program,
            what,
            f"{outcome.handshakes:,}",
            f"{outcome.resumed:,}",
            "[red]see above" if outcome.report else "0",
        )
        console.print(f"{tool}, {program}, {what}: {outcome.handshakes:,} handshakes")
        if outcome.report:
            console.print(outcome.report, markup=False)

    if "asan" in options.only:
        program, program_of_contexts, program_of_tickets = sanitized()
        for shape in SHAPES:
            add("ASan, LSan, UBSan", "handshakes.c", shape, handshakes((str(program),), shape, options.families))
        add("ASan, LSan, UBSan", "contexts.c", "docs/contexts.md", contexts((str(program_of_contexts),)))
        add("ASan, LSan, UBSan", "contexts.c", "tickets", contexts((str(program_of_contexts), "--tickets=1")))
        add("ASan, LSan, UBSan", "tickets.c", "resumed.h", tickets((str(program_of_tickets),)))
    # Some thirty times slower.
    few = max(8, options.families // 10)
    if "memcheck" in options.only:
        for shape, arguments in SHAPES.items():
            forks = (FORKED,) if "--children" in arguments else ()
            add(
                "memcheck",
                "handshakes.c",
                shape,
                handshakes((*MEMCHECK, *forks, str(PLAIN / "resumed-handshakes")), shape, few),
            )
        add("memcheck", "contexts.c", "docs/contexts.md", contexts((*MEMCHECK, str(PLAIN / "resumed-contexts")), 150))
        add("memcheck", "tickets.c", "resumed.h", tickets((*MEMCHECK, FORKED, str(PLAIN / "resumed-tickets"))))
    if "nginx" in options.only:
        for lies in False, True:
            what = "malformed answers" if lies else "full, resumed"
            add("memcheck", "nginx with preload", what, nginx(options.families // 4, lies=lies))
    console.print(table)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
