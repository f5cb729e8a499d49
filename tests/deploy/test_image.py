"""The image as it runs in a cluster: read-only, without capabilities, not as root, told to stop and gone in time.

`make image-test` builds it first; runc runs it, without a container engine's daemon.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import time
import uuid
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy import image
from support.mtls import Authority, Files, channel
from support.redis import valkey_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MOST_MEGABYTES = 60
UID = 65_532
_PODMAN = ("podman", *image.STORAGE, "--runtime", "runc", "--cgroup-manager", "cgroupfs")
# As a restricted pod: nothing to write to, no capability, no way to get one.
_RESTRICTED = ("--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt", "no-new-privileges")
_HERE = ("--network=host", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")
SETTINGS = {"RESUMED_SHUTDOWN_DELAY": "1s", "RESUMED_WORKERS": "2"}


class Container:
    """A container that runs, on free ports of this machine."""

    def __init__(self, name: str) -> None:
        self.name = name
        with contextlib.ExitStack() as held:
            free = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
            self.target, self.health_target, self.metrics_target = (
                f"127.0.0.1:{listener.getsockname()[1]}" for listener in free
            )

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run something in it."""
        return subprocess.run([*_PODMAN, "exec", self.name, *command], capture_output=True, text=True, check=False)

    def python(self, program: str) -> str:
        """Run a program in the container and return its output."""
        done = self.run("python3", "-c", program)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def health(self, service: str) -> str:
        """Ask its health as a kubelet does."""
        with grpc.insecure_channel(self.health_target) as health:
            stub = health_pb2_grpc.HealthStub(health)
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=2)
        name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        return name

    def stop(self, seconds: int) -> tuple[float, int]:
        """Stop it as a kubelet does; return the seconds it took, and its exit status: 137 if it had to be killed."""
        started = time.monotonic()
        subprocess.run([*_PODMAN, "stop", "--time", str(seconds), self.name], check=True, stdout=subprocess.DEVNULL)
        taken = time.monotonic() - started
        inspected = subprocess.check_output([*_PODMAN, "inspect", "--format", "{{.State.ExitCode}}", self.name])
        return taken, int(inspected)


@contextlib.contextmanager
def running(*options: str, **settings: str) -> Iterator[Container]:
    """Run the image as a restricted pod, until it is ready, with settings in its environment."""
    container = Container(f"resumed-test-{uuid.uuid4().hex[:8]}")
    listening = {
        "RESUMED_LISTEN": container.target,
        "RESUMED_HEALTH_LISTEN": container.health_target,
        "RESUMED_METRICS_LISTEN": container.metrics_target,
    }
    env = [text for name, value in (SETTINGS | listening | settings).items() for text in ("--env", f"{name}={value}")]
    command = [*_PODMAN, "run", "--detach", "--name", container.name, *_HERE, *_RESTRICTED, *env, *options, image.NAME]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(grpc.RpcError):
                if container.health("") == "SERVING":
                    break
            assert time.monotonic() < end, subprocess.check_output([*_PODMAN, "logs", container.name], text=True)
        yield container
    finally:
        subprocess.run(
            [*_PODMAN, "rm", "--force", "--time", "0", container.name], check=True, stdout=subprocess.DEVNULL
        )


def like_an_empty_dir(path: Path) -> Path:
    """Make a directory as a kubelet makes an emptyDir for a pod with an fsGroup."""
    path.mkdir()
    os.chown(path, 0, UID)
    path.chmod(0o2777)
    return path


def like_a_secret(path: Path) -> Path:
    """Make the files of a directory readable by root and the pod's group, as a kubelet does with a Secret."""
    for each in (path, *path.iterdir()):
        os.chown(each, 0, UID)
    path.chmod(0o750)
    for each in path.iterdir():
        each.chmod(0o440)
    return path


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """A store that keeps its sessions itself."""
    sessions = like_an_empty_dir(tmp_path_factory.mktemp("volumes") / "sessions")
    with running("--volume", f"{sessions}:/var/lib/resumed", RESUMED_STORAGE="lmdb:///var/lib/resumed") as container:
        yield container


def test_it_passes_the_check(embedded: Container) -> None:
    target = embedded.target
    for done in (
        subprocess.run([sys.executable, "-m", "resumed_server", "check", target], capture_output=True, check=False),
        embedded.run("python3", "-m", "resumed_server", "check", target),
    ):
        assert done.returncode == 0, done.stdout
    assert embedded.health("live") == embedded.health("resumed.v1.SessionStoreService") == "SERVING"


def test_it_has_no_privileges(embedded: Container) -> None:
    status = dict(re.findall(r"^(\w+):\s+(.*)$", embedded.python("print(open('/proc/1/status').read())"), re.MULTILINE))
    assert status["Uid"].split() == [str(UID)] * 4
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"


def test_it_can_write_to_its_volume_only(embedded: Container) -> None:
    program = "import os; print([where for where, _, _ in os.walk('/', onerror=None) if os.access(where, os.W_OK)])"
    writable = embedded.python(program)
    assert {where for where in re.findall(r"'(.*?)'", writable) if not where.startswith(("/proc", "/sys", "/dev"))} == {
        "/var/lib/resumed"
    }


def test_it_needs_no_shell(embedded: Container) -> None:
    found = embedded.python("import shutil; print([shutil.which(n) for n in ('sh', 'bash', 'dash', 'busybox', 'pip')])")
    assert set(re.findall(r"None|'.*?'", found)) == {"None"}


def test_metrics_are_there(embedded: Container) -> None:
    program = (
        f"import urllib.request as r; print(r.urlopen('http://{embedded.metrics_target}/metrics').read().decode())"
    )
    assert "\nresumed_" in embedded.python(program)


def test_it_stops_in_time(tmp_path: Path) -> None:
    sessions = like_an_empty_dir(tmp_path / "sessions")
    volume = "--volume", f"{sessions}:/var/lib/resumed"
    with running(*volume, RESUMED_STORAGE="lmdb:///var/lib/resumed") as container:
        seconds, status = container.stop(30)
    assert (status, 1 <= seconds < 12) == (0, True)
    assert (sessions / "data.mdb").stat().st_uid == UID
    with running(*volume, RESUMED_STORAGE="lmdb:///var/lib/resumed"):
        assert not list(sessions.glob("*set-aside*"))


def test_mutual_tls_before_a_valkey_with_nothing_writable(tmp_path: Path) -> None:
    """Like the replicas of the manifests: certificates from Secrets, sessions elsewhere, no writable volume."""
    authority = Authority()
    (tmp_path / "tls").mkdir()
    Files(tmp_path / "tls").write(authority.server(), client_ca=authority.pem)
    like_a_secret(tmp_path / "tls")
    tls = {"CERT": "tls.crt", "KEY": "tls.key"}
    settings = {f"RESUMED_TLS_{name}": f"/etc/resumed/tls/{file}" for name, file in tls.items()}
    settings |= {"RESUMED_CLIENT_CA": "/etc/resumed/tls/ca.crt"}
    volume = "--volume", f"{tmp_path / 'tls'}:/etc/resumed/tls:ro"
    with valkey_server() as valkey, running(*volume, RESUMED_STORAGE=valkey.url, **settings) as container:
        with channel(container.target, authority.pem, authority.issue("dns:shop")) as secure:
            grpc.channel_ready_future(secure).result(10)
        writable = container.python("import os; print([w for w, _, _ in os.walk('/') if os.access(w, os.W_OK)])")
        assert {
            where for where in re.findall(r"'(.*?)'", writable) if not where.startswith(("/proc", "/sys", "/dev"))
        } == set()
        valkey.client.shutdown(nosave=True)
        end = time.monotonic() + 10
        while container.health("resumed.v1.SessionStoreService") == "SERVING":
            assert time.monotonic() < end
        assert container.health("live") == "SERVING"


def test_every_command_has_what_it_needs(embedded: Container) -> None:
    listed = embedded.run("python3", "-m", "resumed_server", "--help").stdout
    commands = re.findall(r"^│ (\w+) ", listed.partition("Commands")[2], re.MULTILINE)
    assert "serve" in commands
    for command in commands:
        done = embedded.run("python3", "-m", "resumed_server", command, "--help")
        if command == "bench":  # the load generator is not for the image, and names the package that it lacks
            assert (done.returncode, "pip install 'resumed[pyopenssl]'" in done.stderr) == (2, True)
        else:
            assert done.returncode == 0, done.stderr


def test_it_weighs_at_most_60_megabytes_over_its_base() -> None:
    _, *own = image.layers()
    assert len(own) == 4
    assert sum(layer.bytes for layer in own) <= MOST_MEGABYTES * 1e6


def test_the_sbom_lists_what_is_in_the_image() -> None:
    """Each distribution has a version and a licence (protobuf's metadata has none), without packages of the build."""
    _, dependencies, own, sbom, _ = image.layers()
    listed = json.loads(_file(sbom, "usr/share/sbom/resumed.cdx.json"))
    assert listed["bomFormat"] == "CycloneDX"
    assert listed["metadata"]["component"]["name"] == "resumed"
    named = {each["name"].lower().replace("_", "-"): each for each in listed["components"]}
    there = {name.lower().replace("_", "-") for name in {**dependencies.records, **own.records}} - {"resumed"}
    assert set(named) == there
    assert all(each["version"] for each in named.values())
    assert {name for name, each in named.items() if not each.get("licenses")} == {"protobuf"}


def test_a_new_volume_belongs_to_its_user() -> None:
    """A container engine copies the owner of the directory in the image."""
    *_, sessions = image.layers()
    with tarfile.open(sessions.path) as tar:
        directory = tar.getmember("var/lib/resumed")
    assert (directory.isdir(), directory.uid, directory.gid) == (True, UID, UID)


def test_it_knows_its_health(embedded: Container) -> None:
    program = "/opt/resumed/healthy.py"
    assert embedded.run("python3", program).returncode == 0
    elsewhere = "import os, runpy; os.environ['RESUMED_HEALTH_LISTEN'] = '127.0.0.1:1'; runpy.run_path('{}')"
    done = embedded.run("python3", "-c", elsewhere.format(program))
    assert (done.returncode, "127.0.0.1:1: UNAVAILABLE" in done.stderr) == (1, True)


def test_it_insists_on_certificates_where_other_containers_reach_it() -> None:
    done = subprocess.run(
        [*_PODMAN, "run", "--rm", *_HERE, *_RESTRICTED, image.NAME], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--tls-cert" in done.stderr
    assert "--insecure" in done.stderr


def test_it_says_what_it_is() -> None:
    config = json.loads(subprocess.check_output(["buildah", *image.STORAGE, "inspect", image.NAME]))["OCIv1"]["config"]
    assert config["User"] == f"{UID}:{UID}"
    assert (config["Entrypoint"], config["Cmd"]) == (["python3", "-m", "resumed_server"], ["serve"])
    assert set(config["ExposedPorts"]) == {"7400/tcp", "7401/tcp", "9464/tcp"}
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items()}
    with contextlib.suppress(PackageNotFoundError):
        assert labels["version"] == version("resumed")
    assert re.fullmatch("[0-9a-f]{40}", labels["revision"])
    assert labels["licenses"] == "Apache-2.0"


def _file(layer: image.Layer, name: str) -> bytes:
    with tarfile.open(layer.path) as tar:
        file = tar.extractfile(name)
        assert file
        return file.read()
