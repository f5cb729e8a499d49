"""Every fault of TLS between a command and the store has a diagnosis and a remedy, the same in all commands."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, NamedTuple

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from structlog.testing import capture_logs

import resumed
from resumed_server.cli.ticket_keys.observed_store import ObservedStore
from resumed_server.cli.tls_options import TlsOptions
from support.command import run_command
from support.mtls import HOUR, Authority, Files
from support.ports import free_port
from support.server import PATIENCE, RunningServer, running_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

SHOP = "spiffe://example.org/shop"


class Fault(NamedTuple):
    """The options of a command, the store that it calls, and the beginnings of the problem and of the remedy."""

    options: Sequence[str]
    secured: bool
    problem: str
    remedy: str


FAULTS = {
    "plaintext to TLS": Fault((), True, "the store requires TLS", "give --ca FILE"),
    "TLS to plaintext": Fault(("--ca", "ca.crt"), False, "the store listens without TLS", "omit --ca"),
    "wrong CA": Fault(("--ca", "other.crt", "--cert", "shop.pem"), True, "{}/other.crt did not issue", "give the cert"),
    "CA of the system": Fault(("--cert", "shop.pem"), True, "no authority of this system issued", "give the cert"),
    "wrong name": Fault(
        ("--ca", "ca.crt", "--cert", "shop.pem", "--server-name", "store.example"),
        True,
        "the store's certificate is for localhost, not for store.example",
        "use one of its names",
    ),
    "no client certificate": Fault(
        ("--ca", "ca.crt", "--server-name", "localhost"), True, "the store requires a client certificate", "give --cert"
    ),
    "stranger's certificate": Fault(
        ("--ca", "ca.crt", "--cert", "stranger.pem"), True, "the store does not trust {}/stranger.pem", "use a cert"
    ),
    "server's certificate as client's": Fault(
        ("--ca", "ca.crt", "--cert", "server.pem"),
        True,
        "the store rejects {}/server.pem, a certificate for servers only",
        "use a certificate with the extended key usage",
    ),
    "expired client certificate": Fault(
        ("--ca", "ca.crt", "--cert", "expired.pem"), True, "the client certificate {}/expired.pem is valid", "renew it"
    ),
}


class Stores(NamedTuple):
    """A store with mutual TLS, one without TLS, and the directory of the files of clients."""

    secured: RunningServer
    plain: RunningServer
    files: Path

    def arguments(self, fault: Fault) -> tuple[str, list[str]]:
        """Return the target and the options of a command."""
        server = self.secured if fault.secured else self.plain
        named = any(option == "--server-name" for option in fault.options)
        target = server.target if named else server.target.replace("127.0.0.1", "localhost")
        return target, [str(self.files / text) if text.endswith((".crt", ".pem")) else text for text in fault.options]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    directory = tmp_path_factory.mktemp("tls")
    ours, theirs = Authority(), Authority()
    files = Files(directory).write(ours.server(), ours.pem)
    (directory / "other.crt").write_bytes(theirs.pem)
    for name, pem in (
        ("shop", ours.issue(SHOP)),
        ("stranger", theirs.issue(SHOP)),
        ("server", ours.issue(SHOP, usages=[ExtendedKeyUsageOID.SERVER_AUTH])),
        ("expired", ours.issue(SHOP, lifetime=-HOUR)),
    ):
        (directory / f"{name}.pem").write_bytes(pem.certificate + pem.key)
    with running_server(*files.options) as secured, running_server() as plain:
        yield Stores(secured, plain, directory)


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest, stores: Stores) -> Fault:
    found = FAULTS[request.param]
    return found._replace(problem=found.problem.format(stores.files))


def test_check_and_doctor_name_the_fault_and_its_remedy(stores: Stores, fault: Fault) -> None:
    target, options = stores.arguments(fault)
    done = run_command("check", target, *options, "--json")
    assert done.returncode == 1
    (failed,) = (each for each in json.loads(done.stdout)["checks"] if each["outcome"] == "failed")
    assert failed["note"].startswith(fault.problem)
    assert failed["advice"].startswith(fault.remedy)
    done = run_command("doctor", target, "--namespace", "shop", *options, "--json")
    assert done.returncode == 1
    checks = json.loads(done.stdout)["examinations"][f"the store at {target}"]
    (again,) = (each for each in checks if each["outcome"] == "failed")
    assert (again["note"], again["advice"]) == (failed["note"], failed["advice"])


@pytest.mark.parametrize("command", [("stats",), ("purge", "shop", "--yes")], ids=lambda command: command[0])
def test_stats_and_purge_name_the_fault_and_its_remedy(stores: Stores, fault: Fault, command: tuple[str, ...]) -> None:
    target, options = stores.arguments(fault)
    name, *rest = command
    done = run_command(name, target, *rest, *options)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f": {fault.problem}" in line
    assert f"; {fault.remedy}" in line


def test_the_agent_of_ticket_keys_logs_the_fault_and_its_remedy(stores: Stores, fault: Fault) -> None:
    target, options = stores.arguments(fault)
    given = {option[2:].replace("-", "_"): value for option, value in zip(options[::2], options[1::2], strict=True)}
    with (
        contextlib.closing(ObservedStore(target, TlsOptions(**given), namespace="shop", deadline=PATIENCE)) as store,
        capture_logs() as logged,
    ):
        for _ in range(2):
            with pytest.raises(resumed.StoreError):
                store.batch([resumed.Get(b"key")])
    (line,) = logged
    assert line["event"] == "the store does not answer, the keys stay"
    assert line["cause"].startswith(fault.problem)
    assert line["remedy"].startswith(fault.remedy)


@pytest.mark.parametrize(("secured", "problem"), [(True, "speaks TLS"), (False, "speaks gRPC and not HTTP/1.1")])
def test_top_names_the_address_of_sessions(stores: Stores, secured: bool, problem: str) -> None:
    target = (stores.secured if secured else stores.plain).target
    done = run_command("top", target)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"resumed: http://{target}/metrics {problem}")
    assert line.endswith("; give the address of its --metrics-listen")


def test_a_connection_that_both_sides_accept_has_no_fault(stores: Stores) -> None:
    target = stores.secured.target.replace("127.0.0.1", "localhost")
    options = ("--ca", str(stores.files / "ca.crt"), "--cert", str(stores.files / "shop.pem"))
    assert run_command("check", target, *options).returncode == 0
    assert run_command("stats", stores.secured.target, *options, "--server-name", "localhost").returncode == 0


COMMANDS = (
    ("check", "{}"),
    ("doctor", "{}", "--namespace", "shop"),
    ("stats", "{}"),
    ("purge", "{}", "shop", "--yes"),
    ("top", "{}"),
    ("bench", "{}", "--count", "1"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_all_commands_have_one_exit_status_for_a_store_that_is_down(command: tuple[str, ...]) -> None:
    target = f"127.0.0.1:{free_port()}"
    assert run_command(*(part.format(target) for part in command)).returncode == 3


@pytest.mark.parametrize(
    "command",
    [
        ("check", "{}", "--namespace", "SHOP"),
        ("doctor", "{}", "--namespace", "SHOP"),
        ("stats", "{}", "SHOP"),
        ("purge", "{}", "SHOP", "--yes"),
        ("grants", "check", "/dev/null", "--namespace", "SHOP"),
    ],
    ids=lambda command: command[0],
)
def test_all_commands_have_one_exit_status_for_a_namespace_that_is_none(
    stores: Stores, command: tuple[str, ...]
) -> None:
    done = run_command(*(part.format(stores.plain.target) for part in command))
    assert done.returncode == 2
    assert "'SHOP' is not 1 to 63 characters of [a-z0-9.-]" in done.stderr


def test_all_commands_have_one_exit_status_for_a_keyring_that_is_missing(stores: Stores, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    for command in (
        ("check", stores.plain.target, "--keyring", missing),
        ("doctor", stores.plain.target, "--namespace", "shop", "--keyring", missing),
        ("keyring", "show", missing),
    ):
        assert run_command(*command).returncode == 2, command
