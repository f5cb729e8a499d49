"""Pairs of real servers, each with an agent of its own as on another machine, resume each other's tickets."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from resumed_server.cli.tls_client import HandshakeFailed
from support.ticket_servers import MEMORY, PROGRAMS, TicketServer, running_agent, ticket_server, write_reload_script
from support.tls import CA
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from OpenSSL import SSL

    from support.server import RunningServer

ROTATION, LIFETIME, LEAD = 5, 60, 1
"""Seconds. Keys change while the tests run; no test waits for one of these times."""
pytestmark = pytest.mark.slow

KINDS = ("nginx", "haproxy", "envoy", "envoy-delta", "trafficserver")
VERSIONS = ("1.2", "1.3")


@dataclass
class Machine:
    """An agent and its servers."""

    directory: Path
    agent: RunningServer
    servers: dict[str, TicketServer] = field(default_factory=dict)

    def encrypting(self) -> str:
        """Return the name of the key that encrypts."""
        return str(self.agent.log_lines("keys")[-1]["encrypts"])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("certificate") / "localhost.pem"
    path.write_bytes(CA.issue_cert("localhost").private_key_and_cert_chain_pem.bytes())
    return path


@pytest.fixture(scope="module")
def keyring_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keyring") / "fleet.keys"
    path.write_text("a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s=\n")
    path.chmod(0o600)
    return path


@contextlib.contextmanager
def machine(store: RunningServer, keyring: Path, certificate: Path) -> Iterator[Machine]:
    """Run an agent for all servers that are installed, and those."""
    if not MEMORY.is_dir():
        pytest.skip("needs a tmpfs in /dev/shm")
    with contextlib.ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="resumed-keys-", dir=MEMORY))
        stack.callback(shutil.rmtree, directory)
        for name in "nginx", "haproxy":
            (directory / name).mkdir()
        made: dict[str, TicketServer] = {}
        reload_script = directory / "reload"
        update_script = write_reload_script(reload_script, lambda: list(made.values()))
        agent = stack.enter_context(
            running_agent(
                store.target, keyring,
                "--rotation", str(ROTATION), "--lifetime", str(LIFETIME), "--lead", str(LEAD),
                "--sds", f"unix:{directory}/sds", "--nginx", f"{directory}/nginx",
                "--haproxy", f"{directory}/haproxy", "--haproxy-socket", f"{directory}/haproxy-admin",
                "--trafficserver", f"{directory}/trafficserver", "--reload", str(reload_script),
            )
        )  # fmt: skip
        agent.wait_for_log("published", 4)
        found = Machine(directory, agent, made)
        places = {
            "nginx": (directory / "nginx" / "ticket-keys.conf", "", ""),
            "haproxy": (directory / "haproxy" / "ticket-keys", "", ""),
            "envoy": (directory / "sds", "ticket-keys", "GRPC"),
            "envoy-delta": (directory / "sds", "shop", "DELTA_GRPC"),
            "trafficserver": (directory / "trafficserver", "", ""),
        }
        for kind, (keys, more, api) in places.items():
            program = kind.partition("-")[0]
            if not Path(PROGRAMS[program]).exists():
                continue
            server = stack.enter_context(ticket_server(program, certificate, keys, more=more, api=api))
            made[kind] = server
            if kind == "haproxy":
                (directory / "haproxy-admin").symlink_to(server.directory / "admin")
        update_script()
        yield found


@pytest.fixture(scope="module")
def fleet(store: RunningServer, keyring_file: Path, certificate: Path) -> Iterator[tuple[Machine, Machine]]:
    with machine(store, keyring_file, certificate) as one, machine(store, keyring_file, certificate) as other:
        yield one, other


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, fleet: tuple[Machine, Machine]) -> tuple[TicketServer, TicketServer]:
    one, other = fleet
    if request.param not in one.servers:
        pytest.skip(f"{request.param} is not installed")
    return one.servers[request.param], other.servers[request.param]


def resumes(first: TicketServer, second: TicketServer, version: str) -> bool:
    """Return whether the second server resumes a new ticket of the first."""
    return second.visit(version, first.visit(version).session).resumed


@pytest.mark.parametrize("version", VERSIONS)
def test_each_of_two_servers_resumes_the_tickets_of_the_other(
    pair: tuple[TicketServer, TicketServer], version: str
) -> None:
    one, other = pair
    until(lambda: resumes(one, other, version))
    until(lambda: resumes(other, one, version))


@pytest.mark.parametrize("version", VERSIONS)
def test_tickets_outlive_rotations_and_the_other_server_opens_them(
    fleet: tuple[Machine, Machine], pair: tuple[TicketServer, TicketServer], version: str
) -> None:
    one, other = pair

    def outlives_a_rotation() -> bool:
        ticket = one.visit(version).session
        names = [each.encrypting() for each in fleet]
        until(partial(have_rotated, fleet, names))
        names = [each.encrypting() for each in fleet]
        # A server that has not loaded the keys yet makes a full handshake. HAProxy drops the key at the next rotation.
        while not have_rotated(fleet, names):
            if opens(other, version, ticket):
                return True
        return False

    for _ in range(2):
        until(outlives_a_rotation)


def have_rotated(fleet: tuple[Machine, Machine], before: list[str]) -> bool:
    return all(each.encrypting() != name for each, name in zip(fleet, before, strict=True))


def opens(server: TicketServer, version: str, ticket: SSL.Session | None) -> bool:
    return server.visit(version, ticket).resumed


@pytest.mark.parametrize("version", VERSIONS)
def test_unlike_servers_make_full_handshakes_with_each_others_tickets(
    fleet: tuple[Machine, Machine], version: str
) -> None:
    one, other = (list(each.servers.values()) for each in fleet)
    offers = [(first, second) for first in one for second in other if first.name != second.name]
    assert not any(resumes(first, second, version) for first, second in offers)


@pytest.mark.skipif(not Path(PROGRAMS["haproxy"]).exists(), reason="HAProxy is not installed")
@pytest.mark.parametrize("version", VERSIONS)
def test_haproxy_does_not_bind_client_authentication_as_the_docs_warn(
    fleet: tuple[Machine, Machine], certificate: Path, tmp_path: Path, version: str
) -> None:
    """If this fails with a later HAProxy, docs/ticket-keys.md can promise more."""
    one, _ = fleet
    authority = tmp_path / "ca.pem"
    CA.cert_pem.write_to_path(str(authority))
    keys = one.directory / "haproxy" / "ticket-keys"
    more = f"verify required ca-file {authority}"
    with ticket_server("haproxy", certificate, keys, more=more) as verifying:
        with pytest.raises(HandshakeFailed):
            verifying.visit(version)
        # Its keys are those of its start.
        until(partial(admits, verifying, one.servers["haproxy"], version))


def admits(verifying: TicketServer, other: TicketServer, version: str) -> bool:
    try:
        return resumes(other, verifying, version)
    except HandshakeFailed:
        return False


def test_no_connection_fails_while_keys_change(
    fleet: tuple[Machine, Machine], pair: tuple[TicketServer, TicketServer]
) -> None:
    changes = [len(each.agent.log_lines("keys")) for each in fleet]
    failures: list[Exception] = []
    resumed: list[bool] = []
    done = threading.Event()

    def come_back() -> None:
        session = None
        while not done.wait(0.02):
            for server in pair:
                try:
                    visit = server.visit("1.3", session)
                except Exception as error:  # noqa: BLE001 - shown by the test
                    failures.append(error)
                else:
                    session = visit.session
                    resumed.append(visit.resumed)

    visitor = threading.Thread(target=come_back)
    visitor.start()
    try:
        until(lambda: all(len(each.agent.log_lines("keys")) >= n + 3 for each, n in zip(fleet, changes, strict=True)))
    finally:
        done.set()
        visitor.join()
    assert not failures
    assert any(resumed)
