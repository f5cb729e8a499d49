"""Runs the services of a compose file on Linux, as root, without a container engine.

A service has network, mount, IPC and process namespaces of its own. Its root file system is this machine's, read-only,
with the service's volumes at their places; its user and capabilities are those of the file; /etc/hosts resolves the
names of the services. In place of an image a program of this machine runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PATIENCE = 60.0
Service = dict[str, Any]

_ENTER = """
set -e
echo > "$STATE/created"
read -r _   # until it has its network interface
ip link set lo up
if ip link show eth0 > /dev/null 2>&1; then ip address add "$ADDRESS/24" dev eth0; ip link set eth0 up; fi
mount -t tmpfs tmpfs "$STATE/root"
cd "$STATE/root"
mkdir changes work root
mount -t overlay overlay -o lowerdir=/,upperdir=changes,workdir=work root
chmod go+rx root/root   # for programs below it
cp "$STATE/hosts" root/etc/hosts
while read -r source target mode; do
  if [ -d "$source" ]; then mkdir -p "root$target"; else mkdir -p "root$(dirname "$target")"; : > "root$target"; fi
  mount --bind "$source" "root$target"
  [ "$mode" = rw ] || mount -o remount,bind,ro "root$target"
done < "$STATE/mounts"
[ -z "$READ_ONLY" ] || mount -o remount,bind,ro root
while read -r target; do mount -t tmpfs tmpfs "root$target"; done < "$STATE/tmpfs"
mount -t proc proc root/proc
mount --rbind /dev root/dev
exec chroot root "$@"
"""


class Image(NamedTuple):
    """The stand-in for an image.

    Attributes:
        entrypoint: The beginning of the command.
        command: Its arguments, unless the service has others or another entrypoint.
        path: Directories of its programs, before those of this machine.
        user: User and group of its processes, unless the service has others.
        owned: Directories of the image that belong to that user; so does a new volume there.
        environment: Variables of the image.
    """

    entrypoint: Sequence[str] = ()
    command: Sequence[str] = ()
    path: Sequence[str] = ()
    user: str = "0:0"
    owned: Sequence[str] = ()
    environment: Mapping[str, str] = {}


def load(file: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return a compose file with its variables replaced."""

    def value(match: re.Match[str]) -> str:
        return environment.get(match[1]) or match[2] or ""

    parsed: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", value, file.read_text()))
    return parsed


def env_file(file: Path) -> dict[str, str]:
    """Return the variables of an environment file."""
    lines = (line for line in file.read_text().splitlines() if line and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)


def is_possible() -> bool:
    """Return whether this machine can run services: as root, with overlayfs and network namespaces."""
    mount = "mount -t tmpfs t /mnt && cd /mnt && mkdir a b c && mount -t overlay o -o lowerdir=/,upperdir=a,workdir=b c"
    return (
        os.geteuid() == 0
        and all(map(shutil.which, ("ip", "nsenter", "setpriv", "unshare")))
        and not subprocess.run(
            ["unshare", "--net", "--mount", "sh", "-c", mount], capture_output=True, check=False
        ).returncode
    )


class Container:
    """A service that runs, or has run."""

    def __init__(self, name: str, process: subprocess.Popen[str], command: Sequence[str], state: Path) -> None:
        self.name, self._process, self._state = name, process, state
        self._entry = command

    @property
    def log(self) -> str:
        """The output so far."""
        return (self._state / "log").read_text()

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as the service's user."""
        entering = ("nsenter", "--target", str(self._pid), "--mount", "--net", "--ipc", "--pid", "--root", "--wd")
        # One after the other: nsenter changes the root last, and setpriv is found there.
        return subprocess.run(
            [*entering, *self._entry, *command], capture_output=True, text=True, check=False, timeout=PATIENCE
        )

    def stop(self, seconds: float = 30.0) -> int:
        """Send SIGTERM, and return the exit status; SIGKILL after some seconds."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    @property
    def _pid(self) -> int:
        """The first process in its namespaces, of which `unshare` is the parent."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        assert children, f"{self.name} has ended\n{self.log}"
        return int(children[0])


class Composition:
    """The services of a compose file, each with an address on one network. Volumes are directories; close() ends all.

    Args:
        directory: The directory of compose.yaml.
        images: Stand-ins by the name of the image, without its tag.
        environment: Variables of the file.
    """

    def __init__(self, directory: Path, images: Mapping[str, Image], environment: Mapping[str, str]) -> None:
        self._directory, self._images = directory, images
        self.services: dict[str, Service] = load(directory / "compose.yaml", environment)["services"]
        profiles = {"", *environment.get("COMPOSE_PROFILES", "").split(",")}
        self.active = [
            name for name, each in self.services.items() if profiles.intersection(each.get("profiles", [""]))
        ]
        self._addresses = {name: f"10.89.0.{number}" for number, name in enumerate(self.services, 2)}
        self._stack = contextlib.ExitStack()
        self._state = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="compose-")))
        self._network = self._holder()
        self.containers: dict[str, Container] = {}

    def close(self) -> None:
        """End all services at once, and delete their volumes."""
        self._stack.close()

    def up(self, *, without: Sequence[str] = ()) -> None:
        """Start the active services in the order of their dependencies, and wait until all are healthy."""
        started: list[str] = []
        while waiting := [name for name in self.active if name not in (*started, *without)]:
            name = next(each for each in waiting if self._dependencies(each) <= {*started, *without})
            for dependency, how in self.services[name].get("depends_on", {}).items():
                if dependency in started:
                    self.wait_for(dependency, how["condition"])
            self.start(name)
            started.append(name)
        for name in started:
            if "healthcheck" in self.services[name]:
                self.wait_for(name, "service_healthy")

    def wait_for(self, name: str, condition: str) -> None:
        """Wait for a condition of `depends_on`."""
        container = self.containers[name]
        if condition == "service_completed_successfully":
            until(lambda: container.status is not None)
            assert container.status == 0, container.log
        else:
            until(lambda: self.is_healthy(name))

    def is_healthy(self, name: str) -> bool:
        """Run the health check of a service."""
        container = self.containers[name]
        assert container.status is None, f"{name} ended with {container.status}\n{container.log}"
        kind, *command = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD", "images have no shell"
        return container.execute(*command).returncode == 0

    def start(self, name: str, *command: str) -> Container:
        """Start a service, with another command if one is given."""
        service = self.services[name]
        image = self._images[re.sub(r":[^/]*$", "", service["image"])]
        state = self._state / f"{name}-{time.monotonic_ns()}"
        (state / "root").mkdir(parents=True)
        (state / "hosts").write_text(self._hosts(name))
        (state / "mounts").write_text("".join(map(self._mount(image), service.get("volumes", []))))
        (state / "tmpfs").write_text("".join(f"{path}\n" for path in service.get("tmpfs", [])))
        environment = {
            "PATH": ":".join((*image.path, "/usr/local/bin:/usr/bin:/bin")),
            **image.environment,
            **service.get("environment", {}),
        }
        user, group = service.get("user", image.user).split(":")
        kept = ",".join(["-all", *(f"+{each.lower()}" for each in service.get("cap_add", []))])
        entry = [
            *("setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"),
            *(f"--bounding-set={kept}", f"--inh-caps={kept}", "--no-new-privs"),
            *("env", "-i", *(f"{key}={value}" for key, value in environment.items())),
        ]
        arguments = command or service.get("command", () if "entrypoint" in service else image.command)
        inside = [*service.get("entrypoint", image.entrypoint), *arguments]
        with (state / "log").open("w") as log:
            process = subprocess.Popen(
                [
                    *("unshare", "--net", "--mount", "--ipc", "--pid", "--fork", "--kill-child"),
                    *("sh", "-c", _ENTER, name, *entry, *inside),
                ],
                env={
                    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                    "STATE": str(state),
                    "ADDRESS": self._addresses[name],
                    "READ_ONLY": "yes" if service.get("read_only") else "",
                },
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        container = Container(name, process, entry, state)
        self._stack.callback(_end, process)
        until((state / "created").exists)
        if service.get("network_mode") != "none":
            self._connect(self._addresses[name], process.pid)
        assert process.stdin
        with process.stdin:
            process.stdin.write("\n")
        self.containers[name] = container
        return container

    def run(self, *command: str) -> str:
        """Run a command of this machine in the network of the services, as their clients do, and return its output."""
        entering = ("nsenter", f"--net=/proc/{self._network}/ns/net")
        return subprocess.run(
            [*entering, *command], check=True, stdout=subprocess.PIPE, text=True, timeout=PATIENCE, input=""
        ).stdout

    def address(self, name: str) -> str:
        """Return the address of a service."""
        return self._addresses[name]

    def _dependencies(self, name: str) -> set[str]:
        return set(self.services[name].get("depends_on", {})) & set(self.active)

    def _hosts(self, name: str) -> str:
        """Return the names that a service can resolve: those of the services that share a network with it."""
        networks = set(self.services[name].get("networks", []))
        shared = (each for each in self.active if networks & set(self.services[each].get("networks", [])))
        return "127.0.0.1 localhost\n" + "".join(f"{self._addresses[each]} {each}\n" for each in shared)

    def _mount(self, image: Image) -> Any:
        def line(volume: str) -> str:
            source, target, mode = (*volume.split(":"), "rw")[:3]
            path = self._directory / source if source.startswith(".") else self._volume(source, target, image)
            return f"{path.resolve()} {target} {mode}\n"

        return line

    def _volume(self, name: str, target: str, image: Image) -> Path:
        """Return the directory of a named volume; a new one has the owner of its place in the image."""
        path = self._state / "volumes" / name
        if not path.exists():
            path.mkdir(parents=True)
            if target in image.owned:
                os.chown(path, *map(int, image.user.split(":")))
        return path

    def _holder(self) -> int:
        """Create the network, which lives as long as a process in it; return the process."""
        holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        self._stack.callback(_end, holder)
        own = Path("/proc/self/ns/net").stat().st_ino
        until(lambda: Path(f"/proc/{holder.pid}/ns/net").stat().st_ino != own)
        self._network = holder.pid
        for command in (
            "ip link set lo up",
            "ip link add fleet type bridge",
            "ip address add 10.89.0.1/24 dev fleet",
            "ip link set fleet up",
        ):
            self.run(*shlex.split(command))
        return holder.pid

    def _connect(self, address: str, process: int) -> None:
        """Give the network namespace of a process an interface on the network."""
        port = f"port{address.rpartition('.')[2]}-{process % 1000}"
        self.run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(process))
        self.run("ip", "link", "set", port, "master", "fleet", "up")


def _end(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.wait()
