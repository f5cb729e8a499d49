"""What sslyze, a scanner that auditors use, says of a frontend that has the shim. `make fuzz` installs it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import resumed
from support.server import running_server
from support.tls import PATIENCE, STACKS, Frontend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.tls import Stack

SSLYZE = Path(__file__).parents[1] / ".build" / "sslyze" / "bin" / "sslyze"


@pytest.fixture(scope="module", params=STACKS)
def findings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Scan results of a frontend of each stack."""
    if not SSLYZE.exists():
        pytest.skip("sslyze is not here; `make fuzz` installs it")
    found: dict[str, Any] = scan(request.param, tmp_path_factory.mktemp("sslyze") / "findings.json")
    return found


def scan(stack: Stack, report: Path) -> Any:
    """Scan a frontend, and return the result of each check."""
    with running_server() as store, socket.create_server(("127.0.0.1", 0)) as listener:
        keyring = resumed.Keyring.from_keys([os.urandom(32)])
        frontend = Frontend(stack, store.target, keyring, deadline=PATIENCE)
        with accepting(listener, frontend):
            where = f"127.0.0.1:{listener.getsockname()[1]}"
            checks = ("--resum", "--reneg", "--early_data", "--heartbleed", "--openssl_ccs", "--robot", "--ems")
            command = [str(SSLYZE), *checks, f"--json_out={report}", "--sni=localhost", where]
            subprocess.run(command, check=False, capture_output=True, timeout=100)
        assert not frontend.shim.stats.misses["internal-error"]
        frontend.shim.uninstall()
    [result] = json.loads(report.read_text())["server_scan_results"]
    assert result["scan_status"] == "COMPLETED"
    return {name: check["result"] for name, check in result["scan_result"].items() if check.get("result")}


@contextlib.contextmanager
def accepting(listener: socket.socket, frontend: Frontend) -> Iterator[None]:
    """Serve all clients while the context lasts."""

    def accept() -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=frontend.serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_sessions_resume_by_their_ids(findings: dict[str, Any]) -> None:
    """Without stateless tickets, which would resume without the store."""
    resumption = findings["session_resumption"]
    assert resumption["session_id_resumption_result"] == "FULLY_SUPPORTED"
    assert resumption["tls_ticket_resumption_result"] == "NOT_SUPPORTED"


def test_nothing_else_is_wrong(findings: dict[str, Any]) -> None:
    assert findings["tls_1_3_early_data"]["supports_early_data"] is False
    assert findings["session_renegotiation"]["supports_secure_renegotiation"] is True
    assert findings["session_renegotiation"]["is_vulnerable_to_client_renegotiation_dos"] is False
    assert findings["heartbleed"]["is_vulnerable_to_heartbleed"] is False
    assert findings["openssl_ccs_injection"]["is_vulnerable_to_ccs_injection"] is False
    assert findings["robot"]["robot_result"].startswith("NOT_VULNERABLE")
    assert findings["tls_extended_master_secret"]["supports_ems_extension"] is True
