"""Counts what honest clients get of three virtual hosts over two nginx with the library: `honest.py` (`make honest`).

curl, Go, Java (JSSE), OpenSSL and a browser's hello visit the hosts in turn through a TCP load balancer (HAProxy). One
of the hosts requires client certificates, which every client has. nginx' access log has which visits were resumed. Full
handshakes are expected at the first visit of a client, and where a worker has not yet learned the name. Exits 1 if a
visit failed, or if the library ended a connection after its handshake.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parents[1]))

from contexts.certificates import SITE, Files, new_keyring
from contexts.places import ROOT
from support.ports import free_port
from support.processes import listening_process
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CLIENTS = Path(__file__).parent / "clients"
BUILD = ROOT / ".build" / "honest"
LIBRARY = ROOT / ".build" / "cargo" / "release" / "libresumed_preload.so"
PRIVATE = "mtls.example"
SERVERS, WORKERS = 2, 2
VERSIONS = ("1.3", "1.2")
_VISIT = re.compile(r"^([\d.]+) (\d+) (\S+) (\S+) (\S+) (\d+) (\S+)$", re.MULTILINE)
_COUNTS = re.compile(r"(hits|misses|puts|removals|terminations): ([^;\n]*)")

console = Console(stderr=True)


@dataclass
class Tally:
    """Results of one client with one version of TLS."""

    client: str
    version: str
    visits: int = 0
    resumed: int = 0
    first: int = 0
    unlearned: int = 0
    other: int = 0
    seconds: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)


NGINX = """daemon off; user root; worker_processes {workers}; pid {d}/pid; error_log {d}/error.log info;
events {{ worker_connections 512; }}
http {{
  log_format visits '$msec $pid $ssl_server_name $ssl_session_reused $ssl_protocol $status $http_user_agent';
  access_log {d}/access.log visits;
  client_body_temp_path {d}/body;
  ssl_protocols TLSv1.2 TLSv1.3;
  {hosts}
}}
"""
HOST = """server {{ listen 127.0.0.1:{port} ssl; server_name {name}; {more}
    ssl_certificate {file}; ssl_certificate_key {file}; return 200 "{name}"; }}
"""
BALANCER = """global
  nbthread 1
defaults
  mode tcp
  timeout client 60s
  timeout server 60s
  timeout connect 5s
listen fleet
  bind 127.0.0.1:{port}
  balance roundrobin
{servers}
"""


@contextlib.contextmanager
def process(command: Sequence[str], port: int, log: Path, environment: dict[str, str] | None = None) -> Iterator[None]:
    """Run a server until it is not needed any more."""
    with log.open("wb") as output:
        running = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **(environment or {})}
        )
    with listening_process(running, port, lambda: log.read_text(errors="replace")):
        yield


class Fleet:
    """Two nginx behind a balancer."""

    def __init__(self, directory: Path, files: Files, target: str, library: Path) -> None:
        self.directory, self.library = directory, library
        self.port = free_port()
        self.ports = [free_port() for _ in range(SERVERS)]
        keyring = new_keyring(directory)
        self.environment = {
            "LD_PRELOAD": str(library),
            "RESUMED_TARGET": target,
            "RESUMED_NAMESPACE": "honest",
            "RESUMED_VERIFIED_NAMESPACE": "honest.verified",
            "RESUMED_KEYRING": str(keyring),
            "RESUMED_DEADLINE": "1",
        }
        verify = f"ssl_verify_client on; ssl_client_certificate {files.directory}/ca-one.pem;"
        for number, port in enumerate(self.ports):
            hosts = "".join(
                HOST.format(
                    port=port, name=name, file=files.directory / "site.pem", more=verify if name == PRIVATE else ""
                )
                for name in SITE
            )
            own = directory / str(number)
            own.mkdir()
            (own / "config").write_text(NGINX.format(workers=WORKERS, d=own, hosts=hosts))
        servers = "\n".join(f"  server s{number} 127.0.0.1:{port}" for number, port in enumerate(self.ports))
        (directory / "balancer").write_text(BALANCER.format(port=self.port, servers=servers))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run it."""
        with contextlib.ExitStack() as stack:
            for number, port in enumerate(self.ports):
                own = self.directory / str(number)
                command = ["/usr/sbin/nginx", "-p", str(own), "-e", f"{own}/error.log", "-c", f"{own}/config"]
                stack.enter_context(process(command, port, own / "stderr", self.environment))
            command = ["/usr/sbin/haproxy", "-db", "-f", str(self.directory / "balancer")]
            stack.enter_context(process(command, self.port, self.directory / "balancer.log"))
            yield

    def visits(self) -> list[tuple[str, ...]]:
        """Return time, process, host, whether it was resumed, version, status, and client of all visits so far."""
        texts = [(self.directory / str(number) / "access.log").read_text() for number in range(SERVERS)]
        return [visit for text in texts for visit in _VISIT.findall(text)]

    def counts(self) -> Counter[str]:
        """Return the statistics of the library in all workers, after their end."""
        counted: Counter[str] = Counter()
        for number in range(SERVERS):
            own = self.directory / str(number)
            for path in own / "stderr", own / "error.log":
                for kind, text in _COUNTS.findall(path.read_text(errors="replace")):
                    for reason, count in re.findall(r"(\S+) (\d+)", text):
                        counted[f"{kind} {reason}"] += int(count)
        return counted


@dataclass
class Client:
    """A program that visits the hosts in turn."""

    name: str
    version: str
    visits: int
    command: list[str]
    text: str = ""


def clients(fleet: Fleet, files: Files, visits: int, browser: Path) -> list[Client]:
    """Return the clients that this machine has."""
    authority, certificate = str(files.directory / "ca-servers.pem"), str(files.directory / "client-one.pem")
    port, each, hosts = str(fleet.port), visits // len(VERSIONS), list(SITE)
    found = []
    for version in VERSIONS:
        last = [authority, certificate, version, str(each), *hosts]
        found.append(Client("openssl", version, each, [sys.executable, str(CLIENTS / "standard.py"), port, *last]))
        command = ["curl", "--no-progress-meter", "--config", "-"]
        found.append(Client("curl", version, each, command, _curl(fleet, files, version, each)))
        if shutil.which("go"):
            found.append(Client("go", version, each, [str(BUILD / "go"), f"127.0.0.1:{port}", *last]))
        if shutil.which("javac"):
            last[1] = str(files.directory / "client.p12")
            found.append(Client("java", version, each, ["java", "-cp", str(BUILD), "Visits", port, *last]))
    if browser.exists():
        command = [str(browser), str(CLIENTS / "browser.py"), port, authority, certificate, certificate]
        found.append(Client("browser", "1.3", visits, [*command, str(visits), *hosts]))
    return found


def _curl(fleet: Fleet, files: Files, version: str, visits: int) -> str:
    """Return the configuration for a process of curl that visits the hosts: it keeps sessions, but no connections."""
    lines = []
    for number in range(1, visits + 1):
        host = SITE[number % len(SITE)]
        lines += [
            f'url = "https://{host}:{fleet.port}/"',
            f'resolve = "{host}:{fleet.port}:127.0.0.1"',
            f'cacert = "{files.directory}/ca-servers.pem"',
            f'cert = "{files.directory}/client-one.pem"',
            "tlsv1.3" if version == "1.3" else "tlsv1.2",
            f'tls-max = "{version}"',
            'header = "Connection: close"',
            'user-agent = "curl"',
            'output = "/dev/null"',
            'write-out = "%{response_code} %{errormsg}\\n"',
            "http1.1",
            "next",
        ]
    return "\n".join(lines[:-1]) + "\n"


def build(files: Files) -> None:
    """Compile the clients that are compiled."""
    BUILD.mkdir(parents=True, exist_ok=True)
    if shutil.which("go"):
        subprocess.run(["go", "build", "-o", str(BUILD / "go"), str(CLIENTS / "visits.go")], check=True)
    if shutil.which("javac"):
        subprocess.run(["javac", "-d", str(BUILD), str(CLIENTS / "Visits.java")], check=True)
    own = str(files.directory / "client-one.pem")
    subprocess.run(
        ["openssl", "pkcs12", "-export", "-in", own, "-inkey", own, "-out", str(files.directory / "client.p12"),
         "-passout", "pass:secret"], check=True,
    )  # fmt: skip


def run(client: Client, progress: Progress, limit: float) -> Tally:
    """Run a client to its end, or for `limit` seconds."""
    tally = Tally(client.name, client.version)
    task = progress.add_task(f"{client.name} {client.version}", total=client.visits)
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as given:
        given.write(client.text)
        given.seek(0)
        running = subprocess.Popen(
            client.command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    assert running.stdout
    lines = 0
    for line in running.stdout:
        if line.startswith("failed: "):
            tally.failures[re.sub(r"\d{4,}", "N", line.strip())[8:120]] += 1
        elif client.name == "curl":
            lines += 1
            if not line.startswith("200 "):
                tally.failures[re.sub(r"\d{4,}", "N", line.strip())[:120]] += 1
            if lines % 100 == 0:
                progress.update(task, completed=lines)
        elif line.strip().isdigit():
            progress.update(task, completed=int(line))
        else:
            tally.failures[line.strip()[:120]] += 1
        if time.monotonic() - started > limit:
            running.terminate()
            break
    running.wait()
    running.stdout.close()
    progress.update(task, completed=client.visits)
    tally.seconds = time.monotonic() - started
    return tally


def account(tallies: list[Tally], visits: list[tuple[str, ...]]) -> None:
    """Count full handshakes by cause."""
    seen: set[tuple[str, str]] = set()
    met: set[tuple[str, str, str]] = set()
    by_name = {(tally.client, f"TLSv{tally.version}"): tally for tally in tallies}
    for _, worker, host, reused, version, _, client in sorted(visits, key=lambda visit: float(visit[0])):
        tally = by_name.get((client, version))
        if tally is None:
            continue
        tally.visits += 1
        new_client, new_worker = (client, version, host) not in met, (worker, host) not in seen
        met.add((client, version, host))
        seen.add((worker, host))
        if reused == "r":
            tally.resumed += 1
        elif new_client:
            tally.first += 1
        elif new_worker:
            tally.unlearned += 1
        else:
            tally.other += 1


def markdown(tallies: list[Tally], counts: Counter[str]) -> str:
    """Return the summary."""
    heads = [
        "Client",
        "TLS",
        "visits",
        "resumed",
        "full: first visit",
        "full: new to the worker",
        "full: other",
        "failed",
        "ms a visit",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for tally in tallies:
        cells = [
            tally.client,
            tally.version,
            f"{tally.visits:,}",
            f"{tally.resumed:,}",
            tally.first,
            tally.unlearned,
            tally.other,
        ]
        cells += [sum(tally.failures.values()), f"{1000 * tally.seconds / max(tally.visits, 1):.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    counted = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    terminations = sum(count for name, count in counts.items() if name.startswith("terminations"))
    return "\n".join(
        [*lines, "", f"Connections ended after the handshake: {terminations}. The library counted: {counted}."]
    )


def main() -> int:
    """Run, print."""
    parser = argparse.ArgumentParser(prog="make honest", description=__doc__)
    parser.add_argument(
        "--visits", type=int, default=10_000, metavar="N", help="of each client, half in each version (10,000)"
    )
    parser.add_argument("--only", nargs="*", default=[], metavar="CLIENT", help="openssl, curl, go, java, browser")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="for each client and version (600)")
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--browser-python", type=Path, default=BUILD / "bin" / "python", help="a Python with curl_cffi")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="resumed-honest-") as name, running_server() as store:
        directory = Path(name)
        directory.chmod(0o755)
        files = Files(directory)
        build(files)
        fleet = Fleet(directory, files, store.target, arguments.library)
        tallies = []
        chosen = clients(fleet, files, arguments.visits, arguments.browser_python)
        left_out = {"openssl", "curl", "go", "java", "browser"} - {client.name for client in chosen}
        for client_name in sorted(left_out):
            console.print(f"left out: {client_name} is not here")
        with fleet.running(), Progress(console=console) as progress:
            tallies += [
                run(client, progress, arguments.limit)
                for client in chosen
                if not arguments.only or client.name in arguments.only
            ]
            visited = fleet.visits()
        counts = fleet.counts()
    account(tallies, visited)
    sys.stdout.write(markdown(tallies, counts) + "\n")
    for tally in tallies:
        for failure, count in tally.failures.most_common(5):
            console.print(f"{tally.client} {tally.version}: {count} times: {failure}")
    ended = sum(count for kind, count in counts.items() if kind.startswith("terminations"))
    return 1 if ended or any(tally.failures for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
