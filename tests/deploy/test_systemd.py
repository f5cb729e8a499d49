"""The systemd units are valid and hardened, and their commands do what the units expect of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import resumed
from docs.quick_start import answers
from resumed_server.config.settings import Settings
from resumed_server.config.types import Duration
from support.mtls import Authority, Files, grant
from support.ports import free_port
from support.server import PATIENCE, RunningServer, running_server
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

UNITS = Path(__file__).parents[2] / "deploy/systemd"
FRONTEND = UNITS.parents[1] / "examples/systemd/shop@.service"
STORE, AGENT = UNITS / "resumed.service", UNITS / "resumed-ticket-keys@.service"
MAX_EXPOSURE = 1.2
"""Of `systemd-analyze security`, from 0 to 10; 2 and less is its best grade."""
WITHOUT_WRITABLE_CODE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(65, 1, 0, 0, 0)  # PR_SET_MDWE, which MemoryDenyWriteExecute= sets; an error before Linux 6.3
os.execv(sys.argv[1], sys.argv[1:])
"""

pytestmark = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")


def values(unit: Path, key: str) -> list[str]:
    """Return the values of a key of a unit."""
    return re.findall(rf"^{key}=(.*)$", unit.read_text(), re.MULTILINE)


def value(unit: Path, key: str) -> str:
    (only,) = values(unit, key)
    return only


def variables(text: str) -> dict[str, str]:
    """Return the variables of an environment file."""
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))


def command(unit: Path, files: Path, environment: Mapping[str, str], instance: str = "edge") -> list[str]:
    """Return the command of a unit as systemd puts it together: ${X} is one word, $X as many as it has."""
    words: list[str] = []
    for word in shlex.split(moved(value(unit, "ExecStart"), files).replace("%i", instance)):
        if whole := re.fullmatch(r"\$(\w+)", word):
            words += environment[whole[1]].split()
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda match: environment[match[1]], word))
    program = {"resumed": [sys.executable, "-m", "resumed_server"], "python": [sys.executable]}
    installed = words.pop(0)
    return [sys.executable, "-c", WITHOUT_WRITABLE_CODE, *program[installed.removeprefix("/opt/resumed/bin/")], *words]


def start(unit: Path, files: Path, environment: Mapping[str, str]) -> RunningServer:
    return RunningServer(command(unit, files, environment), environment)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Path]:
    """Directories in the places of those that the units name."""
    authority = Authority()
    store = tmp_path / "etc/resumed"
    store.mkdir(parents=True)
    (tmp_path / "var/lib/resumed").mkdir(parents=True)
    edge = grant("spiffe://example.org/edge", ["edge"], ["put", "get", "remove", "watch"])
    Files(store).write(authority.server(), client_ca=authority.pem, grants=edge)
    (store / "tls.crt").rename(store / "store.crt")
    (store / "tls.key").rename(store / "store.key")
    agent = tmp_path / "etc/resumed-ticket-keys"
    agent.mkdir()
    Files(agent).write(authority.issue("spiffe://example.org/edge"), client_ca=authority.pem)
    (agent / "fleet.keys").touch(0o440)
    (agent / "fleet.keys").write_bytes(resumed.Keyring.generate().encode())
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="resumed-") as memory:
        (tmp_path / "run").symlink_to(memory)
        (tmp_path / "run/resumed-ticket-keys/edge").mkdir(parents=True)
        yield tmp_path


def moved(text: str, files: Path) -> str:
    return re.sub(r"/(?=etc/resumed|var/lib/resumed|run/resumed)", f"{files}/", text)


def store_environment(files: Path) -> dict[str, str]:
    given = variables(moved((UNITS / "resumed.env").read_text(), files))
    settings = {f"RESUMED_{each.name.upper()}" for each in dataclasses.fields(Settings)}
    assert set(given) <= settings, "no such setting"
    own = dict(each.split("=", 1) for each in values(STORE, "Environment"))
    free = {"RESUMED_LISTEN": "127.0.0.1:0", "RESUMED_METRICS_LISTEN": "127.0.0.1:0", "RESUMED_WORKERS": "2"}
    return {name: moved(text, files) for name, text in own.items()} | given | free


@pytest.mark.parametrize(
    "unit",
    [*UNITS.glob("*.service"), *UNITS.glob("*.path"), FRONTEND],
    ids=lambda unit: unit.name,
)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    for name in ("resumed", "python"):
        (tmp_path / name).symlink_to(sys.executable)
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/resumed/bin", str(tmp_path)))
    verify = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(copy)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", [STORE, AGENT, FRONTEND], ids=lambda unit: unit.name)
def test_the_unit_is_hardened(unit: Path) -> None:
    threshold = f"--threshold={MAX_EXPOSURE * 10:.0f}"
    audit = ["systemd-analyze", "security", "--offline=true", threshold, "--no-pager", str(unit)]
    done = subprocess.run(audit, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_store_serves_and_stops_as_its_unit_expects(files: Path) -> None:
    """Even where no memory can be writable and executable. KillMode=mixed sends SIGTERM to the first process only."""
    server = start(STORE, files, store_environment(files))
    try:
        target = server.wait_for_log("listening")[0]["addresses"][0].replace("127.0.0.1", "localhost")
        server.wait_for_log("ready", 2)
        agent = files / "etc/resumed-ticket-keys"
        credentials = resumed.Credentials(ca=agent / "ca.crt", cert=agent / "tls.crt", key=agent / "tls.key")
        with contextlib.closing(
            resumed.StoreClient(target, namespace="edge", deadline=PATIENCE, credentials=credentials)
        ) as store:
            store.put(bytes(32), b"sealed", 60.0)
        assert (files / "var/lib/resumed/data.mdb").exists()
        assert value(STORE, "KillMode") == "mixed"
        assert server.stop() == 0
    finally:
        server.kill()


def test_wrong_settings_end_the_store_for_good(files: Path) -> None:
    server = start(STORE, files, store_environment(files) | {"RESUMED_TLS_CERT": ""})
    assert server.wait() == int(value(STORE, "RestartPreventExitStatus")) == 2


def test_the_store_has_time_for_its_drain() -> None:
    delay = next(each for each in dataclasses.fields(Settings) if each.name == "shutdown_delay").metadata["default"]
    assert Duration.parse(value(STORE, "TimeoutStopSec")) > Duration.parse(delay) + 7


def test_the_agent_writes_keys_and_leaves_them(files: Path) -> None:
    etc = files / "etc/resumed"
    options = ("--tls-cert", f"{etc}/store.crt", "--tls-key", f"{etc}/store.key", "--client-ca", f"{etc}/ca.crt")
    with running_server(*options) as store:
        environment = variables(moved((UNITS / "ticket-keys.env").read_text(), files))
        environment["TARGET"] = store.target.replace("127.0.0.1", "localhost")
        agent = start(AGENT, files, environment | {"TMPDIR": str(files)})
        try:
            written = files / "run/resumed-ticket-keys/edge/ticket-keys.conf"
            until(written.exists)
            assert agent.stop() == 0
        finally:
            agent.kill()
    assert written.exists()
    assert value(AGENT, "RuntimeDirectoryPreserve") == "yes"
    path = value(UNITS / "resumed-ticket-keys-nginx@.path", "PathChanged").replace("%i", "edge")
    assert moved(path, files) == str(written)


def test_frontends_of_the_example_resume_each_others_sessions(files: Path) -> None:
    """With the files that LoadCredential= names, and no memory that is writable and executable."""
    shop = files / "shop"
    (files / "etc/resumed-ticket-keys").rename(shop)
    authority = shop / "ca.crt"
    for name, source in {"shop.crt": "tls.crt", "shop.key": "tls.key"}.items():
        (shop / name).write_bytes((shop / source).read_bytes())
    for suffix in ("crt", "key"):
        (shop / f"tls.{suffix}").write_bytes((files / f"etc/resumed/store.{suffix}").read_bytes())
    assert {each.split(":")[0] for each in values(FRONTEND, "LoadCredential")} == {each.name for each in shop.iterdir()}
    client = ssl.create_default_context(cafile=authority)
    client.maximum_version = ssl.TLSVersion.TLSv1_2  # whose session is there after the handshake
    with contextlib.ExitStack() as stack:
        store = start(STORE, files, store_environment(files) | {"RESUMED_GRANTS": ""})
        stack.callback(store.kill)
        target = store.wait_for_log("listening")[0]["addresses"][0].replace("127.0.0.1", "localhost")
        store.wait_for_log("ready", 2)
        ports = [free_port(), free_port()]
        for port in ports:
            environment = dict(each.split("=", 1) for each in value(FRONTEND, "Environment").split())
            environment |= {"RESUMED_TARGET": target, "PORT": str(port), "METRICS_PORT": "0", "FILES": str(shop)}
            program = command(FRONTEND, files, environment, str(port))
            program[-1] = program[-1].replace("/opt/shop", str(UNITS.parents[1] / "examples/compose"))
            process = subprocess.Popen(program, env={**os.environ, **environment})
            stack.callback(process.wait)
            stack.callback(process.terminate)
        for port in ports:
            until(lambda port=port: answers(str(port)))  # type: ignore[misc]
        session, report = visit(ports[0], client, None)
        assert report == b"full handshake\n"
        until(lambda: visit(ports[1], client, session)[1] == b"resumed\n")  # a lookup may be late on a loaded machine


def visit(port: int, client: ssl.SSLContext, session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bytes]:
    """Visit a frontend; return the session of the connection, and the report."""
    with (
        socket.create_connection(("localhost", port), PATIENCE) as connection,
        client.wrap_socket(connection, server_hostname="localhost", session=session) as tls,
    ):
        tls.sendall(b"GET / HTTP/1.0\r\n\r\n")
        report = b"".join(iter(lambda: tls.recv(4096), b"")).rpartition(b": ")[2]
        return tls.session, report


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_keyring_is_not_for_the_store(tmp_path: Path) -> None:
    """systemd-sysusers and systemd-tmpfiles in an empty root directory."""
    (tmp_path / "etc").mkdir()
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}", UNITS / "sysusers.d/resumed.conf"], check=True)
    ids = {line.split(":")[0]: int(line.split(":")[3]) for line in (tmp_path / "etc/passwd").read_text().splitlines()}
    for directory, names in {"resumed": ["store.key"], "resumed-ticket-keys": ["fleet.keys", "tls.key"]}.items():
        (tmp_path / "etc" / directory).mkdir()
        for name in names:
            (tmp_path / "etc" / directory / name).touch(0o600)
    create = ["systemd-tmpfiles", f"--root={tmp_path}", "--create", str(UNITS / "tmpfiles.d/resumed.conf")]
    subprocess.run(create, check=True)
    for directory, group in ids.items():
        for path in (each := tmp_path / "etc" / directory, *each.iterdir()):
            found = path.stat()
            assert (found.st_uid, found.st_gid, found.st_mode & 0o027) == (0, group, 0), path
    assert set(ids) == {"resumed", "resumed-ticket-keys"}
    assert {value(STORE, "User"), value(AGENT, "User")} == set(ids)
