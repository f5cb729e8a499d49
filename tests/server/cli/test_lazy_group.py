"""Commands are imported when they run, not before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from resumed_server.cli import app
from resumed_server.cli.lazy_group import COMMANDS, EPILOG, load
from resumed_server.errors import EXIT_STATUSES
from support.command import run_command

_HELP = """
import sys
from resumed_server.cli import main
sys.argv = ["resumed", "--help"]
try:
    main()
except SystemExit:
    print(*sys.modules, sep="\\n")
"""


def test_help_imports_neither_grpc_nor_the_client() -> None:
    done = subprocess.run([sys.executable, "-c", _HELP], capture_output=True, text=True, check=True)
    modules = set(done.stdout.splitlines())
    assert not modules & {"grpc", "resumed", "resumed_server.config.settings"}
    assert all(name in done.stdout and summary[:30] in done.stdout for name, (_, summary) in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_imported_and_has_help(name: str) -> None:
    command = load(name)
    assert command.name == name or command.commands
    assert command.help


def test_the_help_of_every_command_has_the_exit_statuses() -> None:
    for command in (load(name) for name in COMMANDS):
        for each in (command, *getattr(command, "commands", {}).values()):
            assert each.epilog == EPILOG
    assert [f" {status:d}, {meaning}" in EPILOG for status, meaning in EXIT_STATUSES.items()] == [True] * 4
    assert EPILOG in " ".join(run_command("--help").stdout.split())
    assert EPILOG in " ".join(run_command("keyring", "promote", "--help").stdout.split())


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "ticket-keys"])
def test_every_command_that_prints_a_result_prints_it_as_json_on_request(name: str) -> None:
    command = load(name)
    for each in getattr(command, "commands", {"": command}).values():
        assert any("--json" in parameter.opts for parameter in each.params)


def test_a_command_leaves_the_environment_of_its_process_alone() -> None:
    """Servers that a test starts later would inherit it, and not count refused handshakes with GRPC_VERBOSITY."""
    before = dict(os.environ)
    assert CliRunner().invoke(app, ["keyring", "--help"]).exit_code == 0
    assert dict(os.environ) == before


def test_the_server_imports_neither_the_rest_of_the_client_nor_rich() -> None:
    """They take a third of the time in which it starts."""
    code = "import sys, resumed_server.cli.serve, resumed_server.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"resumed._public", "rich", "twisted"} & set(done.stdout.split())


def test_settings_need_no_typer() -> None:
    code = "import sys, resumed_server.preflight; sys.exit('typer' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
