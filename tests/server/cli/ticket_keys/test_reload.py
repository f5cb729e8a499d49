from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from resumed_server.cli.ticket_keys import reload
from resumed_server.cli.ticket_keys.outputs import OutputError
from resumed_server.cli.ticket_keys.reload import ReloadCommand
from resumed_server.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path


def test_the_command_runs_without_a_shell(tmp_path: Path) -> None:
    ReloadCommand(f"touch '{tmp_path}/$HOME; a b'").run()
    assert [each.name for each in tmp_path.iterdir()] == ["$HOME; a b"]


def test_a_command_that_fails_shows_its_status_and_its_last_words() -> None:
    with pytest.raises(OutputError, match="ended with status 3: why it failed"):
        ReloadCommand(f"{sys.executable} -c 'import sys; print(\"why it failed\"); sys.exit(3)'").run()


def test_a_program_that_does_not_exist_is_named() -> None:
    with pytest.raises(OutputError, match="/nonexistent/nginx cannot be run: No such file"):
        ReloadCommand("/nonexistent/nginx -s reload").run()


def test_a_command_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "PATIENCE", 0.01)
    with pytest.raises(OutputError, match="did not end within"):
        ReloadCommand("sleep 60").run()


def test_a_daemon_that_the_command_leaves_behind_delays_nothing(tmp_path: Path) -> None:
    leave = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, file=open('{}', 'w'))".format(
        tmp_path / "pid"
    )
    ReloadCommand(f'{sys.executable} -c "{leave}"').run()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("text", ["", "  ", "nginx 'reload"])
def test_a_command_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(UserError, match="--reload: "):
        ReloadCommand(text)
