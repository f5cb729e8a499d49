"""`resumed doctor` with fleets that share tickets: the faults that it finds in real frontends, and its advice."""

from __future__ import annotations

import contextlib
import json
import ssl
from typing import TYPE_CHECKING, Any

import pytest

import resumed
from resumed_server.cli.diagnose import frontend_checks, issued_session
from resumed_server.cli.keyring.keygen import keygen
from support.command import run_command
from support.frontend import listening
from support.relay import Relay
from support.server import running_server
from support.tickets import TicketFrontend
from support.tls import CA, Frontend
from support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.tls import Stack

Steps = dict[str, dict[str, Any]]
EITHER = pytest.mark.parametrize("tls12", [True, False], ids=["tickets in TLS 1.2", "TLS 1.2 stored"])


class Doctor:
    """A store, a keyring, and the command that examines their frontends."""

    def __init__(self, target: str, keyring_file: Path) -> None:
        self.target, self.keyring_file = target, keyring_file
        self.keyring = resumed.Keyring.load(keyring_file)

    def frontend(self, stack: Stack = "ssl", **options: Any) -> TicketFrontend:
        """Return a frontend with tickets."""
        return TicketFrontend(stack, options.pop("target", self.target), self.keyring, **options)

    def examine(self, *frontends: Frontend, namespace: str = "shop", keyring: Path | None = None) -> list[Steps]:
        """Return the checks of each frontend by name."""
        with contextlib.ExitStack() as stack:
            ports = [stack.enter_context(listening(each)) for each in frontends]
            done = run_command(
                *("doctor", self.target, "--namespace", namespace, "--keyring", str(keyring or self.keyring_file)),
                *(option for port in ports for option in ("--frontend", f"localhost:{port}")),
                "--json",
            )
        found = json.loads(done.stdout)["examinations"]
        return [{step["name"]: step for step in found[f"the frontend at localhost:{port}"]} for port in ports]


@pytest.fixture
def doctor(tmp_path: Path) -> Iterator[Doctor]:
    """Return the command with a store and a keyring of its own."""
    keygen(str(tmp_path / "keys"))
    with running_server() as store:
        yield Doctor(store.target, tmp_path / "keys")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give sessions and removals more time on a busy machine, in tests in which all of them arrive."""
    monkeypatch.setattr(issued_session, "STORED_SECONDS", PATIENCE)
    monkeypatch.setattr(frontend_checks, "STORED_SECONDS", PATIENCE)
    monkeypatch.setattr(frontend_checks, "REMOVAL_SECONDS", PATIENCE)


def outcomes(steps: Steps) -> set[str]:
    return {step["outcome"] for step in steps.values()}


@EITHER
@pytest.mark.parametrize("single_use", [False, True])
@pytest.mark.usefixtures("patient")
def test_a_working_fleet_passes_all_checks(doctor: Doctor, tls12: bool, single_use: bool) -> None:
    options = {"tickets_tls12": tls12, "single_use": single_use}
    one, other = doctor.examine(doctor.frontend("ssl", **options), doctor.frontend("pyopenssl", **options))
    assert outcomes(one) == outcomes(other) == {"ok"}, (one, other)
    assert one["session"]["note"].startswith("tickets of" if tls12 else "stored sessions of")
    assert other["another frontend's session"]["note"].endswith("resumes")
    assert other["another's TLS 1.3 sessions"]["note"].endswith("resumes")
    assert other["removal in TLS 1.3"]["note"] == "a session that was removed does not resume"


@pytest.mark.usefixtures("patient")
def test_frontends_with_tls13_only_pass_all_checks(doctor: Doctor) -> None:
    frontends = [doctor.frontend(), doctor.frontend()]
    for each in frontends:
        each.context.minimum_version = ssl.TLSVersion.TLSv1_3
    one, other = doctor.examine(*frontends)
    assert one["handshake"]["note"] == "TLS 1.3 only"
    assert outcomes(one) == outcomes(other) == {"ok"}, (one, other)
    assert other["another frontend's session"]["note"].endswith("resumes")


def test_tickets_of_another_namespace_are_named(doctor: Doctor) -> None:
    (steps,) = doctor.examine(doctor.frontend(), namespace="pay")
    assert steps["session"]["note"] == "its sessions are of the namespace shop, not pay"


def test_tickets_of_another_keyring_are_recognised(doctor: Doctor, tmp_path: Path) -> None:
    keygen(str(tmp_path / "other"))
    (steps,) = doctor.examine(doctor.frontend(), keyring=tmp_path / "other")
    assert steps["session"]["note"] == "its tickets are of another keyring or namespace"
    assert "resumed keyring show" in steps["session"]["advice"]


def test_a_server_without_the_library_is_recognised(doctor: Doctor) -> None:
    (steps,) = doctor.examine(Frontend("ssl", None))
    assert steps["session"]["outcome"] == "failed"
    assert "resumed.install()" in steps["session"]["advice"]


@EITHER
def test_a_frontend_that_stores_sessions_beside_one_with_tickets_fails(doctor: Doctor, tls12: bool) -> None:
    stored = Frontend("ssl", doctor.target, doctor.keyring)
    _, steps = doctor.examine(doctor.frontend(tickets_tls12=tls12), stored)
    failed = steps["another frontend's session" if tls12 else "another's TLS 1.3 sessions"]
    assert failed["outcome"] == "failed"
    assert "it stores its sessions, and localhost" in failed["note"]
    assert "tickets_tls12" in failed["advice"]


@pytest.mark.usefixtures("patient")
def test_a_frontend_with_tickets_beside_one_that_stores_sessions_is_a_warning(doctor: Doctor) -> None:
    _, steps = doctor.examine(Frontend("ssl", doctor.target, doctor.keyring), doctor.frontend())
    assert steps["another frontend's session"]["outcome"] == "warning"
    assert steps["another's TLS 1.3 sessions"]["outcome"] == "warning"
    assert steps["removal in TLS 1.3"]["outcome"] == "ok"


@EITHER
def test_frontends_whose_certificates_have_other_names_are_found_out(doctor: Doctor, tls12: bool) -> None:
    other = doctor.frontend(tickets_tls12=tls12, certificate=CA.issue_cert("localhost", "another.example"))
    _, steps = doctor.examine(doctor.frontend(tickets_tls12=tls12), other)
    failed = steps["another frontend's session"]
    assert failed["outcome"] == "failed"
    assert "its certificates have other names than those of localhost" in failed["note"]


def test_frontends_that_verify_clients_in_another_way_are_found_out(doctor: Doctor) -> None:
    one, other = doctor.frontend(), doctor.frontend()
    CA.configure_trust(other.context)
    other.context.verify_mode = ssl.CERT_OPTIONAL
    _, steps = doctor.examine(one, other)
    assert (
        "it verifies client certificates in another way than localhost" in steps["another frontend's session"]["note"]
    )


@pytest.mark.parametrize(
    ("is_agreed", "note"),
    [
        (False, "the secret of its tickets is not in this store"),
        (True, "it uses another ticket secret than the store has for the same epoch"),
    ],
)
def test_a_frontend_at_another_store_is_found_out(doctor: Doctor, is_agreed: bool, note: str) -> None:
    if is_agreed:
        doctor.frontend()
    with running_server() as other:
        (steps,) = doctor.examine(doctor.frontend(target=other.target))
    assert steps["stored"]["note"] == note
    assert "compare the targets" in steps["stored"]["advice"]


def test_a_frontend_that_receives_no_removals_is_found_out(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend_checks, "REMOVAL_SECONDS", 0.2)
    relay = Relay(doctor.target)
    frontend = doctor.frontend(target=relay.target)
    relay.delay = 3600.0
    (steps,) = doctor.examine(frontend)
    relay.close()
    assert steps["resumption"]["outcome"] == "ok"
    assert steps["removal"]["outcome"] == "failed"
    assert "removals_live" in steps["removal"]["advice"]
