"""`resumed doctor`: the faults that it finds in servers, keyrings and frontends, and its advice."""

from __future__ import annotations

import contextlib
import json
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from cryptography import x509

import resumed
from resumed_server.cli.diagnose.checks import CheckWarning
from resumed_server.cli.diagnose.frontend_checks import compare_clocks
from resumed_server.cli.diagnose.validity import validity
from resumed_server.cli.diagnosis import Failure
from resumed_server.cli.keyring.keygen import keygen
from support.command import run_command
from support.frontend import listening, running_frontend
from support.mtls import Authority, Files
from support.server import running_server
from support.tls import Frontend

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.server import RunningServer


def examined(*arguments: str) -> dict[str, dict[str, dict[str, Any]]]:
    done = run_command("doctor", *arguments, "--json")
    found = json.loads(done.stdout)
    failed = [check["status"] for checks in found["examinations"].values() for check in checks if check["status"]]
    assert done.returncode == min(failed, default=0)
    assert found["ok"] is (not failed)
    return {
        title.split(" at ")[0]: {step["name"]: step for step in steps} for title, steps in found["examinations"].items()
    }


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Path, str, str]]:
    """A server, a keyring and two frontends."""
    directory = tmp_path_factory.mktemp("fleet")
    keygen(str(directory / "keys"))
    with contextlib.ExitStack() as held:
        store = held.enter_context(running_server())
        options = ("--target", store.target, "--namespace", "shop", "--keyring", str(directory / "keys"))
        one, other = (held.enter_context(running_frontend(directory, *options))["port"] for _ in range(2))
        yield store, directory / "keys", f"localhost:{one}", f"localhost:{other}"


def test_a_working_fleet_passes_all_checks(fleet: tuple[RunningServer, Path, str, str]) -> None:
    store, keys, one, other = fleet
    arguments = (store.target, "--namespace", "shop", "--keyring", str(keys), "--frontend", one, "--frontend", other)
    done = run_command("doctor", *arguments)
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout
    assert done.stdout.count("its own session resumes") == 4  # in TLS 1.2 and 1.3
    assert "the frontend at" in done.stdout


def test_frontends_that_choose_ciphers_by_other_orders_are_found_out(
    fleet: tuple[RunningServer, Path, str, str],
) -> None:
    store, keys, one, _ = fleet
    frontend = Frontend("pyopenssl", store.target, resumed.Keyring.load(keys))
    frontend.context.set_tls13_ciphersuites(b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384")
    with listening(frontend) as port:
        other = f"localhost:{port}"
        done = run_command(
            "doctor",
            *(store.target, "--namespace", "shop", "--keyring", str(keys), "--json"),
            *("--frontend", one, "--frontend", other),
        )
    steps = {step["name"]: step for step in json.loads(done.stdout)["examinations"][f"the frontend at {other}"]}
    assert steps["another frontend's session"]["outcome"] == "ok"
    assert steps["another's TLS 1.3 sessions"]["outcome"] == "failed"
    assert "it chooses TLS_AES_128_GCM_SHA256" in steps["another's TLS 1.3 sessions"]["note"]
    assert "SSL_OP_CIPHER_SERVER_PREFERENCE" in steps["another's TLS 1.3 sessions"]["advice"]


def test_a_frontend_of_another_keyring_is_found_out(
    fleet: tuple[RunningServer, Path, str, str], tmp_path: Path
) -> None:
    store, _, one, _ = fleet
    keygen(str(tmp_path / "other"))
    used = str(tmp_path / "other")
    steps = examined(store.target, "--namespace", "shop", "--keyring", used, "--frontend", one)["the frontend"]
    assert steps["session"]["outcome"] == "failed"
    assert "resumed keyring show" in steps["session"]["advice"]
    assert steps["resumption"]["outcome"] == "not tried"


def test_a_frontend_of_another_namespace_is_found_out(fleet: tuple[RunningServer, Path, str, str]) -> None:
    store, keys, one, other = fleet
    arguments = (store.target, "--keyring", str(keys), "--frontend", one)
    examined(*arguments, "--namespace", "shop", "--frontend", other)  # the namespace has sessions
    steps = examined(*arguments, "--namespace", "pay")["the frontend"]
    assert steps["session"]["outcome"] == "failed"
    assert steps["session"]["note"] == "its sessions are of the namespace shop, not pay"


def test_a_store_that_is_down_and_a_frontend_without_shim(tmp_path: Path) -> None:
    keygen(str(tmp_path / "keys"))
    with running_frontend(tmp_path) as ports:
        found = examined(
            *("127.0.0.1:1", "--namespace", "shop", "--keyring", str(tmp_path / "keys")),
            *("--frontend", f"localhost:{ports['port']}", "--frontend", "127.0.0.1:1"),
        )
    assert all(step["outcome"] == "ok" for step in found["this machine"].values())
    assert "resumed serve" in found["the store"]["connect"]["advice"]


def test_a_store_with_mutual_tls_is_reached_with_the_frontends_files(tmp_path: Path) -> None:
    authority = Authority()
    files = Files(tmp_path).write(authority.server(), authority.pem)
    client = tmp_path / "client.pem"
    pem = authority.issue("spiffe://example.org/shop")
    client.write_bytes(pem.certificate + pem.key)
    tls = ("--ca", str(tmp_path / "ca.crt"), "--cert", str(client))
    with running_server(*files.options) as server:
        target = server.target.replace("127.0.0.1", "localhost")
        found = examined(target, "--namespace", "shop", *tls)
        assert {step["outcome"] for step in found["the store"].values()} <= {"ok", "warning"}, found["the store"]
        assert "valid for" in found["this machine"]["certificates"]["note"]
        assert examined(target, "--namespace", "shop", "--deadline", "1")["the store"]["connect"]["outcome"] == "failed"
    done = run_command("doctor", target, "--namespace", "shop", "--ca", str(tmp_path / "none.pem"))
    assert done.returncode == 2
    assert done.stderr.startswith("resumed: --ca, --cert, --key: ")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "--namespace"),
        (("--namespace", "Shop"), "--namespace"),
        (("--namespace", "shop", "--frontend", "here:1"), "--frontend: needs --keyring"),
        (("--namespace", "shop", "--key", "key.pem"), "key goes with cert"),
    ],
)
def test_bad_usage_is_one_line(arguments: tuple[str, ...], part: str) -> None:
    done = run_command("doctor", "127.0.0.1:1", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert part in line


@pytest.mark.parametrize(
    ("off", "note"), [(0, ""), (-3, "behind"), (3, "ahead"), (60, "ahead"), (-3600, "behind this machine's")]
)
def test_a_clock_that_is_off_is_a_warning(off: float, note: str) -> None:
    now = datetime.now(timezone.utc).timestamp()
    if abs(off) > 5:
        with pytest.raises(CheckWarning, match=note):
            compare_clocks(now + off, now)
    else:
        assert note in compare_clocks(now + off, now)


@pytest.mark.parametrize(
    ("begins", "ends", "outcome"),
    [(-1, 30, None), (-1, 3, CheckWarning), (-9, -1, Failure), (1, 30, Failure)],
)
def test_a_warning_precedes_the_end_of_a_certificate(begins: int, ends: int, outcome: type[Exception] | None) -> None:
    now = datetime.now(timezone.utc)
    leaf = trustme.CA().issue_cert(
        "x", not_before=now + timedelta(days=begins), not_after=now + timedelta(days=ends, hours=1)
    )
    certificate = x509.load_pem_x509_certificate(leaf.cert_chain_pems[0].bytes())
    if outcome:
        with pytest.raises(outcome):
            validity(certificate)
    else:
        assert validity(certificate) == "valid for 30 days"
