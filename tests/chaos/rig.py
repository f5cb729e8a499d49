"""The processes under test: a store, two frontends that share sessions, and two that use each session once.

One frontend of each pair is an `ssl` server, the other a pyOpenSSL one; each is a separate process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

import resumed
from chaos.network import Network
from support.frontend import frontend_command
from support.server import RunningServer, running_server
from support.tls import CERTIFICATE, STACKS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from typing_extensions import Self

_HEALTH_SECONDS = 1.0


class Place(NamedTuple):
    """The directory and the deadline of a rig."""

    directory: Path
    """Has the keyring, certificate, logs and files of the scenario."""
    deadline: float
    """Seconds that a handshake may wait for the store."""
    tickets: bool = False
    """Whether the clients keep the sessions, in tickets."""


class Rig:
    """The processes; a context manager that ends them.

    Args:
        place: Its directory and deadline.
        url: The store's engine.
        options: Further options of `resumed serve`.
        workers: The number of processes of the server.
        networked: Whether the frontends reach the server through a Network, which the fault can cut.
        env: Environment variables of the server.
        frontend_env: Environment variables of the `ssl` frontends.

    Attributes:
        network: The Network between the frontends and the server, if `networked`.
        shared: The ports of the frontends that share sessions.
        once: The ports of those that use each session once.
        tickets: Whether the clients keep the sessions.
    """

    def __init__(
        self,
        place: Place,
        url: str,
        *options: str,
        workers: int = 1,
        networked: bool = False,
        env: Mapping[str, str] | None = None,
        frontend_env: Mapping[str, str] | None = None,
    ) -> None:
        directory, self._deadline, self.tickets = place
        self._directory = directory
        self._options, self._workers, self._env = ("--storage", url, *options), workers, env
        self._networked, self._frontend_env = networked, frontend_env
        self._keyring, self._certificate = directory / "fleet.keys", directory / "frontend.pem"
        for path, content in (
            (self._keyring, resumed.Keyring.generate().encode()),
            (self._certificate, CERTIFICATE.private_key_and_cert_chain_pem.bytes()),
        ):
            path.touch(0o600)
            path.write_bytes(content)
        self._running = contextlib.ExitStack()
        self._serving = self._running.enter_context(contextlib.ExitStack())
        self._servers: list[RunningServer] = []
        self._address = "127.0.0.1:0"

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as unless_started:
            unless_started.callback(self._running.close)
            self.serve()
            self._target = self._address
            if self._networked:
                self.network = self._running.enter_context(Network(self._address))
                self._target = self.network.target
            shared = [self._frontend(stack, "shop") for stack in STACKS]
            once = [self._frontend(stack, "shop-once", "--single-use") for stack in STACKS]
            self.shared = [_port(process) for process in shared]
            self.once = [_port(process) for process in once]
            unless_started.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    @property
    def server(self) -> RunningServer:
        """The server that was started last."""
        return self._servers[-1]

    def serve(self, *options: str) -> None:
        """Start the server at the same address as before, with further `options`."""
        server = running_server(*self._options, *options, listen=self._address, workers=self._workers, env=self._env)
        self._servers.append(self._serving.enter_context(server))
        self._address = self.server.target

    def kill_server(self) -> None:
        """End the server with SIGKILL."""
        self.server.kill()
        self._serving.close()

    def health(self) -> str:
        """Return the health of the server."""
        with grpc.insecure_channel(self._address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=_HEALTH_SECONDS
                )
            except grpc.RpcError:
                return "no answer"
        name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        return name

    def server_log(self) -> list[dict[str, Any]]:
        """Return the log lines of all servers so far."""
        return [line for server in self._servers for line in server.log_lines()]

    def frontend_log(self) -> list[str]:
        """Return the log lines of all frontends so far."""
        return [line for path in sorted(self._directory.glob("*.log")) for line in path.read_text().splitlines()]

    def _frontend(self, stack: str, namespace: str, *options: str) -> subprocess.Popen[str]:
        command = frontend_command(stack, self._certificate, *options, "--keyring", str(self._keyring))
        command += ["--target", self._target, "--namespace", namespace, "--deadline", str(self._deadline)]
        command += ["--sessions", "tickets", "--tickets-tls12"] if self.tickets else []
        env = os.environ | dict(self._frontend_env or {}) if stack == STACKS[0] else None
        log = self._running.enter_context((self._directory / f"{namespace}-{stack}.log").open("w"))
        process = self._running.enter_context(
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        )
        self._running.callback(process.terminate)
        return process


def _port(frontend: subprocess.Popen[str]) -> int:
    assert frontend.stdout
    port: int = json.loads(frontend.stdout.readline())["port"]
    return port
