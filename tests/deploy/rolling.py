"""Rolls the store's pods under live TLS traffic, by the manifests' own sequence, and reports the effects on clients.

    python tests/deploy/rolling.py [--dns SECONDS] [--deadline SECONDS] [--only WORD] [--markdown]      (make rolling)

Four frontends, `ssl` and pyOpenSSL, with mutual TLS to the store by its Service's name; the traffic is that of `make
faults`. Frontends keep a journal, so that each miss is listed with its reason and the state of the pods.
Exit status 1 if a handshake failed, or if with Valkey less than 99 % of the offered sessions resumed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import resumed
from chaos.traffic import Traffic
from deploy.cluster import Cluster, Rollout, service, workload
from deploy.frontend import JOURNAL
from deploy.kubernetes import kustomized
from support.mtls import Authority, Files, grant
from support.redis import valkey_server
from support.tls import CERTIFICATE, STACKS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chaos.rig import Rig

BEFORE, AFTER = 10.0, 5.0
"""Seconds of traffic."""
PATIENCE = 60.0
ENOUGH = 0.99
"""What share of the sessions that were offered must have resumed."""
SERVICE = "resumed.resumed.svc.cluster.local"
_TOLD = 3
"""Number of misses that are listed for each reason in each phase."""
IDENTITY = "spiffe://cluster.local/ns/shop/sa/shop"


class Scenario(NamedTuple):
    """A workload to roll."""

    title: str
    overlay: str
    address: str
    """Of the pods, but for its last number."""
    volume: bool = True
    """Whether sessions outlive their pod, with the embedded engine."""


SCENARIOS = [
    Scenario("Valkey, three replicas", "valkey", "127.0.10"),
    Scenario("embedded, with a volume", "embedded", "127.0.11"),
    Scenario("embedded, without", "embedded", "127.0.12", volume=False),
]


class Frontends(NamedTuple):
    """Where the frontends are, as the traffic wants to know."""

    shared: list[int]
    once: list[int]
    journals: dict[int, Path]
    """By port."""
    tickets: bool = False


class Miss(NamedTuple):
    """A session that was offered and did not resume.

    Attributes:
        seconds: When, from the beginning of the rollout.
        reason: The frontend's.
        phase: The last event of a pod.
        calls: The calls of that frontend that failed in that time.
        stall: How many seconds too late the machine woke a process with nothing to do, about then.
    """

    seconds: float
    reason: str
    phase: str
    calls: list[str]
    stall: float

    def __str__(self) -> str:
        """Return a line for people."""
        calls = "; ".join(self.calls) or "no call had failed"
        return f"{self.seconds:+.2f} s: {self.reason}; {self.phase}; machine late by {self.stall * 1e3:.0f} ms; {calls}"


class Result(NamedTuple):
    """Result of a rollout."""

    scenario: Scenario
    rollout: Rollout
    handshakes: int
    failures: list[str]
    wrong: list[str]
    before: float
    during: float
    kept: float
    without: float | None
    """Seconds from the rollout's beginning until resumption was there for good."""
    slowest: float
    misses: list[Miss]
    """Before the rollout and during it."""
    stall: float
    """Seconds by which the machine woke a process with nothing to do too late, at worst."""

    def reasons(self) -> Counter[str]:
        """Return how many sessions did not resume during the rollout, by reason."""
        return Counter(miss.reason for miss in self.misses if miss.seconds >= 0)

    @property
    def good(self) -> bool:
        """Whether it is as promised."""
        return not (self.failures or self.wrong or self.rollout.killed) and (
            self.scenario.overlay == "embedded" or self.during >= ENOUGH
        )


def run(scenario: Scenario, dns_seconds: float, deadline: float) -> Result:
    """Roll once."""
    with contextlib.ExitStack() as held:
        directory = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="rolling-")))
        hosts = directory / "hosts"
        # The whole URL before the path in it.
        replaced = {} if scenario.volume else {"lmdb:///var/lib/resumed": "lmdb:"}
        replaced |= _surroundings(directory)
        replaced["redis://valkey:6379"] = held.enter_context(valkey_server()).url
        objects = kustomized(f"kustomize/overlays/{scenario.overlay}")
        cluster = held.enter_context(
            Cluster(
                workload(objects),
                service(objects),
                SERVICE,
                replaced=replaced,
                hosts=hosts,
                dns_seconds=dns_seconds,
                address=scenario.address,
            )
        )
        frontends = held.enter_context(_frontends(directory, hosts, deadline))
        stalls = directory / "stalls"
        held.callback(subprocess.Popen([sys.executable, Path(__file__).with_name("stalls.py"), stalls]).terminate)
        traffic = held.enter_context(Traffic(cast("Rig", frontends)))
        time.sleep(BEFORE)
        traffic.save()
        began = time.monotonic()
        rollout = cluster.roll()
        over = time.monotonic()
        time.sleep(AFTER)
        before, during = traffic.rate(began - BEFORE / 2, began), traffic.rate(began, over)
        return Result(
            scenario,
            rollout,
            traffic.handshakes,
            traffic.failures,
            traffic.wrong,
            before or 0.0,
            during or 0.0,
            traffic.kept(),
            traffic.back(began),
            traffic.slowest(began, over),
            list(_misses(traffic, frontends, rollout, (began, over), _entries(stalls))),
            max((each["late"] for each in _entries(stalls) if began <= each["at"] < over), default=0.0),
        )


def _entries(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()]


def _misses(
    traffic: Traffic, frontends: Frontends, rollout: Rollout, span: tuple[float, float], stalls: list[dict[str, Any]]
) -> Iterator[Miss]:
    """Look up in the journals why sessions did not resume."""
    began, over = span
    journals = {port: _entries(frontends.journals[port]) for port in frontends.shared}
    for each in traffic.missed(began - BEFORE / 2, over):
        entries = [entry for entry in journals[each.port] if each.at <= entry["at"] <= each.ended]
        reasons = [entry["miss"] for entry in entries if "miss" in entry]
        yield Miss(
            each.at - began,
            # Another one's at the same time is one that must not resume any more, which the store does not know.
            next((reason for reason in reasons if reason != "unknown"), "unknown" if reasons else "never asked"),
            rollout.phase(each.at),
            [_call(entry, each.at) for entry in entries if "call" in entry],
            max(
                (one["late"] for one in stalls if each.at <= one["at"] + one["late"] and one["at"] <= each.ended),
                default=0.0,
            ),
        )


def _call(entry: dict[str, Any], at: float) -> str:
    return f"{entry['call']} {entry['at'] - at:+.3f} s after {entry['seconds'] * 1e3:.0f} ms: {entry['error']}"


def _surroundings(directory: Path) -> dict[str, str]:
    """Make what pods and frontends mount; return what takes the place of what in the pods' environment."""
    authority = Authority()
    for name in ("tls", "grants", "sessions", "shop"):
        (directory / name).mkdir(mode=0o700)
    Files(directory / "tls").write(authority.issue(f"dns:{SERVICE}"), client_ca=authority.pem)
    Files(directory / "shop").write(authority.issue(IDENTITY), client_ca=authority.pem)
    (directory / "grants/grants.toml").write_text(
        grant(IDENTITY, ["shop", "shop-once"], ["put", "get", "take", "remove"])
    )
    for name, content in (
        ("fleet.keys", resumed.Keyring.generate().encode()),
        ("frontend.pem", CERTIFICATE.private_key_and_cert_chain_pem.bytes()),
    ):
        (directory / name).touch(0o600)
        (directory / name).write_bytes(content)
    return {"/etc/resumed": str(directory), "/var/lib/resumed": str(directory / "sessions")}


@contextlib.contextmanager
def _frontends(directory: Path, hosts: Path, deadline: float) -> Iterator[Frontends]:
    """Run two frontends that share sessions, and two that use each once; `hosts` is their DNS."""
    library = next(Path("/usr/lib").glob("*/libnss_wrapper.so"))
    env = os.environ | {"LD_PRELOAD": str(library), "NSS_WRAPPER_HOSTS": str(hosts)}
    journals: dict[int, Path] = {}
    with contextlib.ExitStack() as held:

        def start(stack: str, namespace: str, *options: str) -> int:
            command = [sys.executable, str(Path(__file__).with_name("frontend.py"))]
            for option, name in {"--ca": "ca.crt", "--cert": "tls.crt", "--key": "tls.key"}.items():
                command += [option, str(directory / "shop" / name)]
            command += ["--stack", stack, "--name", stack, "--certificate", str(directory / "frontend.pem"), *options]
            command += ["--target", f"dns:///{SERVICE}:7400", "--keyring", str(directory / "fleet.keys")]
            command += ["--deadline", str(deadline)]
            journal = directory / f"{namespace}-{stack}.journal"
            process = held.enter_context(
                subprocess.Popen(
                    [*command, "--namespace", namespace],
                    stdout=subprocess.PIPE,
                    text=True,
                    env=env | {JOURNAL: str(journal)},
                )
            )
            held.callback(process.terminate)
            assert process.stdout
            port: int = json.loads(process.stdout.readline())["port"]
            journals[port] = journal
            return port

        yield Frontends(
            [start(stack, "shop") for stack in STACKS],
            [start(stack, "shop-once", "--single-use") for stack in STACKS],
            journals,
        )


def table(results: list[Result], *, markdown: bool) -> str:
    """Return a line for each."""
    rows: list[tuple[Any, ...]] = [
        (
            "",
            "took",
            "stops",
            "handshakes",
            "failed",
            "wrong",
            "before",
            "during",
            "kept",
            "back after",
            "slowest",
            "machine late",
            "misses",
        )
    ]
    for each in results:
        stops = f"{min(each.rollout.stops):.0f} to {max(each.rollout.stops):.0f} s"
        counts = ", ".join(f"{reason} {count}" for reason, count in each.reasons().items()) or "none"
        rows.append(
            (
                *(each.scenario.title, f"{each.rollout.seconds:.0f} s", stops, each.handshakes, len(each.failures)),
                *(len(each.wrong), *(f"{share:.1%}" for share in (each.before, each.during, each.kept))),
                "never" if each.without is None else f"{each.without:.1f} s",
                *(f"{each.slowest * 1e3:.0f} ms", f"{each.stall * 1e3:.0f} ms", counts),
            )
        )
    if markdown:
        rows.insert(1, ("---",) * len(rows[0]))
        return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
    return "\n\n".join(
        "\n".join(f"{name:<14}{cell}" for name, cell in zip(rows[0], row, strict=True)) for row in rows[1:]
    )


def told(misses: list[Miss]) -> Iterator[str]:
    """Yield how many misses there were of each reason in each phase of the pods, and the first of them."""
    phases: dict[str, list[Miss]] = {}
    for miss in misses:
        phases.setdefault(f"{miss.reason}; {miss.phase.partition(' for ')[0]}", []).append(miss)
    for phase, those in phases.items():
        yield f"missed {len(those)} times: {phase}"
        yield from (f"    {miss}" for miss in those[:_TOLD])


def main() -> int:
    """Roll each, print the results, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dns", type=float, default=5.0, metavar="SECONDS", help="how late DNS is (default: 5)")
    parser.add_argument(
        "--deadline",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="of the frontends (default: 1, for busy machines)",
    )
    parser.add_argument("--only", metavar="WORD", default="", help="scenarios with this in their title")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    results = [run(each, options.dns, options.deadline) for each in SCENARIOS if options.only in each.title]
    print(table(results, markdown=options.markdown))  # noqa: T201
    for each in results:
        for problem in (*each.failures, *each.wrong, *told(each.misses)):
            print(f"{each.scenario.title}: {problem}")  # noqa: T201
    return 0 if all(each.good for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
