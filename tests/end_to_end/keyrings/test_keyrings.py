"""A fleet key is rotated by the procedure of docs/keyrings.md without a lost session or a disclosed key."""

from __future__ import annotations

import json
import resource
import shutil
import stat
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from resumed import Keyring
from resumed_server.cli import app
from resumed_server.cli.keyring.commands import promote, retire, show
from resumed_server.cli.keyring.keygen import keygen
from resumed_server.errors import UserError
from support.server import running_server
from support.tls import STACKS, VERSIONS, Client, Frontend

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from support.server import RunningServer

LIFETIME, WAIT, STEP = 160, 120, 20
"""Seconds that sessions live here, that a changed file takes to the last frontend, and from one session to the next."""


class Clock:
    """The clock of the operator and of all frontends, which a test moves forward."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=timezone.utc)

    def __call__(self) -> datetime:
        """Return the time as the commands ask for it."""
        return self.now

    def seconds(self) -> float:
        """Return the time as frontends ask for it."""
        return self.now.timestamp()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("commands", "file"):
        monkeypatch.setattr(f"resumed_server.cli.keyring.{module}.now", clock)
    return clock


@pytest.fixture
def file(tmp_path: Path, clock: Clock) -> str:
    file = str(tmp_path / "fleet.keys")
    keygen(file)
    return file


def ids(file: str) -> list[str]:
    return Keyring.load(file).key_ids


# --- The procedure --------------------------------------------------------------------------------------------------


class Host:
    """A frontend with a copy of the operator's file."""

    def __init__(self, stack: Any, target: str, file: str, copy: Path, clock: Clock) -> None:
        self._file, self._copy = file, copy
        self.update()
        self.frontend = Frontend(stack, target, Keyring.load(copy), lifetime=LIFETIME, deadline=5.0)
        shim = self.frontend.shim._policy
        shim._clock = shim._write_queue._clock = clock.seconds

    def update(self) -> None:
        """Bring the operator's file to the frontend, as a deployment does: in one step."""
        new = self._copy.with_suffix(".new")
        shutil.copy2(self._file, new)
        new.replace(self._copy)


class Fleet:
    """Two frontends, one of each stack, and clients that come back to both for as long as their sessions live."""

    def __init__(self, target: str, file: str, clock: Clock, directory: Path) -> None:
        self.clock, self.file = clock, file
        self.hosts = [Host(stack, target, file, directory / f"{stack}.keys", clock) for stack in STACKS]
        self.offered = self.lost = 0
        self._clients = cycle([Client(version) for version in VERSIONS])
        self._sessions: list[tuple[datetime, Client, ssl.SSLSession | None, Host]] = []

    def live(self, seconds: float) -> None:
        """Let time pass, in which each host negotiates sessions, and all that live are offered to the other host."""
        for client in islice(self._clients, int(seconds / STEP)):
            for host, other in (self.hosts, self.hosts[::-1]):
                self._sessions.append((self.clock.now, client, client.visit(host.frontend).session, other))
                assert host.frontend.shim.flush(5.0)
            self.clock.now += timedelta(seconds=STEP)
            young = self.clock.now - timedelta(seconds=LIFETIME)
            self._sessions = [each for each in self._sessions if each[0] > young]
            for _, negotiator, session, other in self._sessions:
                self.offered += 1
                self.lost += not negotiator.visit(other.frontend, session).reused

    def roll_out(self) -> None:
        """Copy the operator's file to one host after the other, with the delay of a deployment."""
        for host in self.hosts:
            self.live(WAIT / len(self.hosts))
            host.update()


@pytest.fixture
def fleet(store: RunningServer, file: str, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """A fleet whose frontends check their keyrings at each use instead of once a second."""
    monkeypatch.setattr("resumed._reload.CHECK_SECONDS", 0.0)
    return Fleet(store.target, file, clock, tmp_path)


def test_a_rotation_loses_no_session(fleet: Fleet) -> None:
    file, (old,) = fleet.file, ids(fleet.file)
    fleet.live(WAIT)
    keygen(file, append=True)
    new = ids(file)[1]
    fleet.roll_out()
    promote(file, None, wait=f"{WAIT}s", force=False)
    assert ids(file) == [new, old]
    fleet.roll_out()
    fleet.live(LIFETIME - STEP)
    with pytest.raises(UserError, match="may live another 20s"):
        retire(file, None, lifetime=f"{LIFETIME}s", wait=f"{WAIT}s", force=False)
    fleet.live(STEP)
    retire(file, None, lifetime=f"{LIFETIME}s", wait=f"{WAIT}s", force=False)
    assert ids(file) == [new]
    fleet.roll_out()
    fleet.live(WAIT)
    assert fleet.offered > 300
    assert fleet.lost == 0


@pytest.mark.parametrize("early", ["promote", "retire"])
def test_with_a_shorter_wait_sessions_are_lost(fleet: Fleet, early: str) -> None:
    """This shows that the waits are necessary and that the previous test can fail."""
    fleet.live(WAIT)
    keygen(fleet.file, append=True)
    if early == "retire":
        fleet.roll_out()
    promote(fleet.file, None, wait="5m", force=True)
    fleet.roll_out()
    if early == "retire":
        fleet.live(LIFETIME - WAIT)
        assert not fleet.lost
        retire(fleet.file, None, lifetime="24h", wait="5m", force=True)
        fleet.roll_out()
    assert fleet.lost


# --- The commands ---------------------------------------------------------------------------------------------------


def test_a_key_that_was_just_added_is_not_promoted(file: str, clock: Clock) -> None:
    """The frontends may not have it; --force says that they do."""
    keygen(file, append=True)
    first, second = ids(file)
    with pytest.raises(UserError, match="wait another 5m"):
        promote(file, None, wait="5m", force=False)
    assert ids(file) == [first, second]
    clock.now += timedelta(minutes=4)
    with pytest.raises(UserError, match="wait another 60s"):
        promote(file, second, wait="5m", force=False)
    promote(file, second, wait="5m", force=True)
    assert ids(file) == [second, first]


def test_a_key_that_was_just_sealing_is_not_retired(
    file: str, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    keygen(file, append=True)
    first, second = ids(file)
    promote(file, None, wait="5m", force=True)
    clock.now += timedelta(hours=24)
    with pytest.raises(UserError, match="may live another 5m"):
        retire(file, None, lifetime="24h", wait="5m", force=False)
    with pytest.raises(UserError, match="promote another key first"):
        retire(file, second, lifetime="24h", wait="5m", force=True)
    clock.now += timedelta(minutes=5)
    retire(file, None, lifetime="24h", wait="5m", force=False)
    assert f"deleted {first}" in capsys.readouterr().out
    assert ids(file) == [second]


def test_a_key_that_never_sealed_may_go_at_once(file: str) -> None:
    keygen(file, append=True)
    first, second = ids(file)
    retire(file, second, lifetime="24h", wait="5m", force=False)
    assert ids(file) == [first]


def test_an_ambiguous_key_id_is_rejected(file: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has only one key: add one"):
        promote(file, None, wait="5m", force=True)
    with pytest.raises(UserError, match="has only one key: add one"):
        retire(file, None, lifetime="24h", wait="5m", force=True)
    with pytest.raises(UserError, match="has no key 00000000"):
        promote(file, "00000000", wait="5m", force=True)
    with pytest.raises(UserError, match="is the first key"):
        promote(file, ids(file)[0], wait="5m", force=True)
    keygen(file, append=True)
    keygen(file, append=True)
    with pytest.raises(UserError, match="name the key, one of"):
        promote(file, None, wait="5m", force=True)
    with pytest.raises(UserError, match="--wait"):
        promote(file, ids(file)[1], wait="soon", force=False)
    bare = tmp_path / "bare.keys"
    bare.touch(0o600)
    bare.write_text(f"{Keyring.generate()}\n{Keyring.generate()}\n")
    with pytest.raises(UserError, match="does not record until when"):
        retire(str(bare), ids(str(bare))[1], lifetime="24h", wait="5m", force=False)
    promote(str(bare), ids(str(bare))[1], wait="5m", force=False)


def test_the_operators_comments_and_the_files_mode_stay(file: str) -> None:
    path = Path(file)
    path.write_text(
        "# ours\n" + path.read_text() + "\n# spare, from the safe\n" + Keyring.generate() + " # two\n# end\n"
    )
    path.chmod(0o440)
    link = path.with_name("link.keys")
    link.symlink_to(path.name)
    with path.open() as reader:
        promote(str(link), ids(file)[1], wait="5m", force=True)
        assert ids(file)[0] not in reader.read()
    lines = path.read_text().splitlines()
    assert lines[0] == "# ours"
    assert lines[-1] == "# end"
    spare = lines.index("# spare, from the safe")
    assert lines[spare + 2].endswith(" # two")
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o440
    assert {each.name for each in path.parent.iterdir()} == {"fleet.keys", "link.keys"}


def test_show_prints_ids_and_ages_and_no_key(file: str, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    clock.now += timedelta(days=30)
    keygen(file, append=True)
    promote(file, None, wait="5m", force=True)
    keygen(file, append=True)
    clock.now += timedelta(hours=3)
    capsys.readouterr()
    show(file, as_json=True)
    described = json.loads(capsys.readouterr().out)["keys"]
    assert [key["id"] for key in described] == ids(file)
    assert [key["seals"] for key in described] == [True, False, False]
    assert [key["age_seconds"] for key in described] == [3 * 3600, 30 * 86400 + 3 * 3600, 3 * 3600]
    assert described[1]["sealing_since"] == "2026-01-01T00:00:00Z"
    assert described[1]["sealing_until"] == described[0]["sealing_since"] == "2026-01-31T00:00:00Z"
    show(file, as_json=False)
    table = capsys.readouterr().out
    assert all(key_id in table for key_id in ids(file))
    assert "sealed until 3h ago" in table
    for line in Path(file).read_text().splitlines():
        assert line.startswith("#") or line[:12] not in table + json.dumps(described)


def test_a_file_that_others_may_read_is_not_touched(file: str) -> None:
    Path(file).chmod(0o644)
    before = Path(file).read_bytes()
    steps: tuple[Callable[[], None], ...] = (
        lambda: keygen(file, append=True),
        lambda: show(file, as_json=True),
        lambda: promote(file, None, wait="5m", force=True),
    )
    for step in steps:
        with pytest.raises(UserError, match="chmod 600"):
            step()
    assert Path(file).read_bytes() == before


def test_the_commands_follow_their_options(file: str) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, [*arguments, file])

    assert run("keygen", "--append").exit_code == 0
    assert "wait another" in str(run("keyring", "promote", "--wait", "1h").exception)
    assert run("keyring", "promote", "--wait", "0s").exit_code == 0
    assert "may live another 2h" in str(run("keyring", "retire", "--lifetime", "1h", "--wait", "1h").exception)
    assert run("keyring", "retire", "--lifetime", "0s", "--wait", "0s").exit_code == 0
    (key,) = json.loads(run("keyring", "show", "--json").output)["keys"]
    assert key["seals"]


# --- Core dumps -----------------------------------------------------------------------------------------------------

ABORTS = """
import ctypes, json, os, resource, sys, resumed
os.chdir(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
if sys.argv[2] == "forbid":
    resumed.forbid_core_dumps()
if not os.fork():
    os.abort()
dumped = os.WCOREDUMP(os.wait()[1])
print(json.dumps([hard, dumped, ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE)]))
"""


def test_a_frontend_that_forbids_core_dumps_leaves_none(tmp_path: Path) -> None:
    def aborted(how: str) -> list[Any]:
        command = [sys.executable, "-c", ABORTS, str(tmp_path), how]
        told: list[Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        return told

    hard, dumped, dumpable, _ = aborted("allow")
    assert dumpable == 1
    if hard:
        assert dumped, "without it there is one, or this test shows nothing"
    _, dumped, dumpable, limit = aborted("forbid")
    assert (dumped, dumpable, limit) == (False, 0, [0, 0])


def test_the_store_leaves_no_core_dump_without_the_option(store: RunningServer) -> None:
    """Its memory contains the TLS key and sealed sessions."""
    assert core_limit(store) == "0"
    usual = resource.getrlimit(resource.RLIMIT_CORE)[0]
    with running_server("--core-dumps") as server:
        assert core_limit(server) == ("unlimited" if usual == resource.RLIM_INFINITY else str(usual))


def core_limit(server: RunningServer) -> str:
    """Return the core dump limit of a server as the kernel reports it."""
    limits = Path(f"/proc/{server.process.pid}/limits").read_text().splitlines()
    return next(line.split()[4] for line in limits if line.startswith("Max core file size"))
