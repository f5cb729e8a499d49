from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from support.command import run_command

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def keyring_file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.keys"
    path.write_text("a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s=\n")
    path.chmod(0o600)
    return path


def refuse(keyring: Path, *options: str) -> str:
    """Return the problem of the one line that the command logs, in the format of its log."""
    done = run_command("ticket-keys", "127.0.0.1:1", "--namespace", "shop", "--keyring", str(keyring), *options)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    if "--log-format" in options:
        return line
    logged = json.loads(line)
    assert (logged["event"], logged["level"]) == ("cannot start", "critical")
    problem: str = logged["problem"]
    return problem


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "nothing to do: give --sds, --nginx, --haproxy or --trafficserver"),
        (["--apache", "keys"], "--apache: Apache 2.4 with OpenSSL 3 authenticates its tickets with a key of zeros"),
        (["--hitch", "/run/keys"], "--hitch: Hitch has no setting for ticket keys"),
        (["--sds", "127.0.0.1:1"], "--sds: 127.0.0.1:1 is no unix socket; give unix:PATH"),
        (["--sds", "unix:/nonexistent/sds"], "--sds: cannot listen on unix:/nonexistent/sds"),
        (["--nginx", "/nonexistent"], "--nginx: there is no directory /nonexistent; create it"),
        (["--haproxy-socket", "/run/haproxy"], "--haproxy-socket: needs --haproxy DIR as well"),
        (["--nginx", "/dev/shm", "--reload", ""], "--reload: the command is empty"),
        (["--rotation", "0"], "--rotation: 0 is outside 1 to 604800 seconds"),
        (["--rotation", "1y"], "--rotation: '1y' is neither a number of seconds nor a duration"),
        (["--lifetime", "8d"], "--lifetime: 8d is outside 1 to 604800 seconds"),
        (["--lead", "31m"], "--lead: 31m is outside 0 to 1800 seconds"),
        (["--log-format", "xml"], "--log-format: 'xml' is none of json, console"),
        (["--log-level", "all"], "--log-level: 'all' is none of debug, info, warning, error"),
        (["--cert", "/nonexistent", "--nginx", "/dev/shm"], "/nonexistent"),
    ],
)
def test_an_option_that_cannot_be_used_is_an_error_that_says_what_to_do(
    keyring_file: Path, options: list[str], problem: str
) -> None:
    assert problem in refuse(keyring_file, *options)


def test_a_namespace_outside_the_pattern_is_an_error(keyring_file: Path) -> None:
    done = run_command("ticket-keys", "127.0.0.1:1", "--namespace", "Shop", "--keyring", str(keyring_file))
    assert "--namespace: 'Shop' is not 1 to 63 characters" in done.stderr


def test_a_directory_on_a_disk_is_refused(keyring_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resumed_server.cli.ticket_keys.key_files.file_system", lambda _: "ext4")
    assert f"--haproxy: {tmp_path} is on a disk (ext4)" in refuse(keyring_file, "--haproxy", str(tmp_path))
    file = str(tmp_path / "keys")
    assert f"--trafficserver: {tmp_path} is on a disk" in refuse(keyring_file, "--trafficserver", file)


def test_a_keyring_that_others_can_read_is_refused(keyring_file: Path) -> None:
    keyring_file.chmod(0o644)
    assert "chmod 600" in refuse(keyring_file, "--nginx", "/dev/shm")
