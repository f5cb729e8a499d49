"""A simulation of Kubernetes for rollouts on one machine: pods are processes, controlled by the manifests.

Each pod has a loopback address of its own, with the ports of the manifests. Its readiness is probed as a kubelet does.
The Service's name resolves to the pods that are ready and not stopping, after the delay of DNS. A
Deployment or StatefulSet is rolled as its controller rolls it. TLS, grants and the storage's URL are the test's own.
"""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.server import start_server

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from typing_extensions import Self

    from deploy.kubernetes import Object
    from support.server import RunningServer

_TICK = 0.1


@dataclass
class Pod:
    """A process and its state in the cluster."""

    generation: int
    address: str
    server: RunningServer
    next_probe: float
    failures: int = 0
    ready_since: float | None = None
    told_to_stop: float | None = None
    drained: bool = False

    def __str__(self) -> str:
        """Return its generation and its address' last number."""
        return f"{'new' if self.generation else 'old'} pod {self.address.rpartition('.')[2]}"


@dataclass
class Rollout:
    """Course of a rollout.

    Attributes:
        seconds: From its beginning until the last old pod had ended and all new ones were available.
        stops: The seconds that each old pod took to end.
        killed: How many had not ended within their grace period.
        events: Events of pods with their time.monotonic().
    """

    seconds: float = 0.0
    stops: list[float] = field(default_factory=list)
    killed: int = 0
    events: list[tuple[float, str]] = field(default_factory=list)

    def happened(self, what: str, pod: Pod) -> None:
        """Record an event of a pod."""
        self.events.append((time.monotonic(), f"{pod} {what}"))

    def phase(self, at: float) -> str:
        """Return the last event before `at`, and the time since then."""
        before = [(when, what) for when, what in sorted(self.events) if when <= at]
        return f"{before[-1][1]} for {at - before[-1][0]:.2f} s" if before else "nothing had happened"


class Cluster:
    """The pods of one workload, from entering it to leaving it.

    Args:
        workload: The Deployment or StatefulSet.
        service: Its Service. If that is not headless, DNS has its address from the beginning, and each pod has it in
            turn.
        name: The Service's name in DNS.
        replaced: Replacements in the pods' environment.
        hosts: The file that resolves the Service's name.
        dns_seconds: How much later than the Service DNS knows a change.
        address: The first pod's; others follow. The last number counts.
    """

    def __init__(
        self,
        workload: Object,
        service: Object,
        name: str,
        *,
        replaced: Mapping[str, str],
        hosts: Path,
        dns_seconds: float,
        address: str,
    ) -> None:
        self._spec, self._in_turns = workload["spec"], workload["kind"] == "StatefulSet"
        template = self._spec["template"]["spec"]
        (self._container,) = template["containers"]
        self._probe = self._container["readinessProbe"]
        self._grace = template["terminationGracePeriodSeconds"]
        self._name, self._replaced, self._hosts, self._dns_seconds = name, replaced, hosts, dns_seconds
        self._headless = service["spec"].get("clusterIP") == "None"
        numbers = itertools.count(1) if self._headless else itertools.repeat(1)
        self._addresses = (f"{address}.{number}" for number in numbers)
        self._pods: list[Pod] = []
        self._generation = 0
        self._resolved: frozenset[str] = frozenset()
        self._changes: list[tuple[float, frozenset[str]]] = []
        self._rollout = Rollout()
        self._enough = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._hosts.write_text("")
        self._thread.start()
        self._wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()
        for pod in self._pods:
            pod.server.kill()

    def roll(self) -> Rollout:
        """Replace all pods, as after a change of their template."""
        started = time.monotonic()
        with self._lock:
            self._rollout = Rollout()
            self._generation += 1
        self._wait()
        self._rollout.seconds = time.monotonic() - started
        return self._rollout

    def _wait(self) -> None:
        """Wait until all pods are of this generation and available, and DNS knows."""
        while not self._enough.wait(_TICK):
            with self._lock:
                new = [pod for pod in self._pods if pod.generation == self._generation]
                if (
                    len(new) == len(self._pods) == self._spec["replicas"] == len(self._available())
                    and not self._changes
                ):
                    return
            assert self._thread.is_alive()

    def _run(self) -> None:
        while not self._enough.wait(_TICK):
            with self._lock:
                for pod in self._pods:
                    self._look_at(pod)
                self._bury()
                self._control()
                self._resolve()

    def _look_at(self, pod: Pod) -> None:
        """Probe a pod when it is time, as its kubelet does."""
        now = time.monotonic()
        if now < pod.next_probe:
            return
        pod.next_probe = now + self._probe["periodSeconds"]
        if self._serves(pod):
            pod.failures = 0
            if not pod.ready_since:
                pod.ready_since = now
                self._rollout.happened("ready", pod)
        else:
            pod.failures += 1
            if pod.failures >= self._probe["failureThreshold"]:
                pod.ready_since = None

    def _serves(self, pod: Pod) -> bool:
        asked = health_pb2.HealthCheckRequest(service=self._probe["grpc"]["service"])
        with grpc.insecure_channel(f"{pod.address}:{self._probe['grpc']['port']}") as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=self._probe.get("timeoutSeconds", 1))
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def _bury(self) -> None:
        """Take pods away that have ended; kill those whose grace period is over."""
        for pod in [pod for pod in self._pods if pod.told_to_stop]:
            taken = time.monotonic() - (pod.told_to_stop or 0)
            drains = pod.server.log_lines("draining")
            if drains and taken >= drains[0]["seconds"] and not pod.drained:
                pod.drained = True
                self._rollout.happened("drained", pod)
            if pod.server.process.poll() is not None:
                self._rollout.stops.append(taken)
                self._rollout.happened("ended", pod)
                self._pods.remove(pod)
            elif taken > self._grace:
                self._rollout.killed += 1
                pod.server.kill()

    def _control(self) -> None:
        """Take the controller's next step."""
        replicas, live = self._spec["replicas"], [pod for pod in self._pods if not pod.told_to_stop]
        old = [pod for pod in live if pod.generation < self._generation]
        if self._in_turns:
            if not self._pods:
                self._start()
            elif old:
                self._stop(old[0])
            return
        rolling = self._spec["strategy"]["rollingUpdate"]
        if len(live) < replicas + (rolling["maxSurge"] if old else 0) and len(live) - len(old) < replicas:
            self._start()
        if old and len(self._available()) > replicas - rolling["maxUnavailable"]:
            self._stop(old[0])

    def _available(self) -> list[Pod]:
        """Return the pods that count as there."""
        since = time.monotonic() - self._spec.get("minReadySeconds", 0)
        return [pod for pod in self._pods if pod.ready_since and pod.ready_since <= since and not pod.told_to_stop]

    def _start(self) -> None:
        address, env = next(self._addresses), {}
        for each in self._container["env"]:
            value = each["value"].replace("0.0.0.0", address)
            for text, other in self._replaced.items():
                value = value.replace(text, other)
            env[each["name"]] = value
        pod = Pod(self._generation, address, start_server(env=env), time.monotonic())
        self._pods.append(pod)
        self._rollout.happened("started", pod)

    def _stop(self, pod: Pod) -> None:
        pod.told_to_stop = time.monotonic()
        self._rollout.happened("told to stop", pod)
        pod.server.signal()

    def _resolve(self) -> None:
        """Have DNS know, a while later, which pods are ready and not told to stop."""
        now = time.monotonic()
        resolved = frozenset(
            pod.address for pod in self._pods if not self._headless or (pod.ready_since and not pod.told_to_stop)
        )
        if not resolved and not self._headless:
            return
        if resolved != self._resolved:
            self._resolved = resolved
            self._changes.append((now + (self._dns_seconds if self._headless else 0), resolved))
        while self._changes and self._changes[0][0] <= now:
            _, addresses = self._changes.pop(0)
            new = self._hosts.with_suffix(".new")
            new.write_text("".join(f"{address} {self._name}\n" for address in sorted(addresses)))
            new.rename(self._hosts)
            self._rollout.events.append((time.monotonic(), "DNS changed"))


def workload(objects: list[Object]) -> Any:
    """Return the Deployment or StatefulSet."""
    (found,) = [each for each in objects if each["kind"] in {"Deployment", "StatefulSet"}]
    return found


def service(objects: list[Object]) -> Any:
    """Return the Service."""
    (found,) = [each for each in objects if each["kind"] == "Service"]
    return found
