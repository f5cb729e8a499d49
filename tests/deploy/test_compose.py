"""The services of examples/compose, run without a container engine: frontends, a store, and Prometheus."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from deploy.containers import Composition, Image, env_file, is_possible, load
from support.redis import VALKEY
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

TREE = Path(__file__).parents[2]
DIRECTORY = TREE / "examples/compose"
DOCKERFILE = (TREE / "deploy/docker/Dockerfile").read_text()
SERVICES: dict[str, dict[str, Any]] = load(DIRECTORY / "compose.yaml", {})["services"]
LASTING = {name: each for name, each in SERVICES.items() if name not in {"certificates", "operator"}}
ENGINES = {"valkey": ".env", "embedded": "embedded.env"}
NOT_HERE = {"grafana"}
"""No package registry has it: its files are examined instead."""
TLS = ("--ca=/etc/resumed/tls/ca.crt", "--cert=/etc/resumed/tls/tls.crt", "--key=/etc/resumed/tls/tls.key")
VISIT = """
import socket, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[1])
context.maximum_version = ssl.TLSVersion.TLSv1_2  # its session is there after the handshake
session = None
def visit(address):
    global session
    with socket.create_connection((address, 8443), 20) as connection:
        with context.wrap_socket(connection, server_hostname="localhost", session=session) as tls:
            tls.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
            answer = b"".join(iter(lambda: tls.recv(4096), b""))
            session = session or tls.session
    return answer.rpartition(b": ")[2].decode().strip()
print(visit(sys.argv[2]))
for address in sys.argv[3:]:  # lookups have 50 ms, and may be late on a loaded machine
    print(next(iter(report for report in (visit(address) for _ in range(200)) if report == "resumed"), "never"))
"""

needs_namespaces = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("redis-cli") and is_possible()),
    reason="needs root, namespaces, overlayfs, Prometheus and redis-cli",
)


def images(programs: Path) -> dict[str, Image]:
    """Return the stand-ins: the image of the Dockerfile is this tree."""
    instructions = dict(re.findall(r"^(ENTRYPOINT|CMD|USER) (.*)$", DOCKERFILE, re.MULTILINE))
    redis_cli = shutil.which("redis-cli")
    assert redis_cli
    for name, program in {"valkey-server": VALKEY, "valkey-cli": redis_cli}.items():
        (programs / name).symlink_to(program)
    return {
        "localhost/resumed": Image(
            json.loads(instructions["ENTRYPOINT"]),
            json.loads(instructions["CMD"]),
            path=[str(Path(sys.executable).parent)],
            user=instructions["USER"],
            owned=re.findall(r"^COPY .*--chown=65532:65532 \S+ (/\S+)$", DOCKERFILE, re.MULTILINE),
            environment={"PYTHONPATH": f"{TREE}/server:{TREE}/client/python", "PYTHONDONTWRITEBYTECODE": "1"},
        ),
        "valkey/valkey": Image(path=[str(programs)]),
        "prom/prometheus": Image(["prometheus"], user="65534:65534", owned=["/prometheus"]),
    }


@pytest.fixture(scope="module", params=ENGINES)
def composition(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composition]:
    """All services, once with each engine."""
    programs = tmp_path_factory.mktemp("programs")
    for path in (programs, *programs.parents):
        if path.stat().st_uid == os.getuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    variables = env_file(DIRECTORY / ENGINES[request.param])
    with contextlib.closing(Composition(DIRECTORY, images(programs), variables)) as composition:
        composition.up(without=sorted(NOT_HERE))
        yield composition


@needs_namespaces
def test_frontends_resume_each_others_sessions(composition: Composition, tmp_path: Path) -> None:
    reports = _visits(composition, tmp_path, "frontend-a", "frontend-b", "frontend-a")
    assert reports == ["full handshake", "resumed", "resumed"]


@needs_namespaces
def test_prometheus_has_data_of_all(composition: Composition, tmp_path: Path) -> None:
    _visits(composition, tmp_path, "frontend-a", "frontend-b")
    until(lambda: _query(composition, "sum(up)") == 3)
    until(lambda: _query(composition, "sum(resumed_frontend_foreign_hits_total)") >= 1)
    until(lambda: _query(composition, "sum(resumed_operations_total{operation='put',outcome='stored'})") >= 1)
    rules = _prometheus(composition, "rules")["groups"]
    assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"}
    assert rules


@needs_namespaces
def test_the_operator_counts_and_purges_sessions(composition: Composition, tmp_path: Path) -> None:
    _visits(composition, tmp_path, "frontend-a")
    until(lambda: "shop" in _operator(composition, "stats", "store:7400"))
    _operator(composition, "purge", "store:7400", "shop", "--yes")


@needs_namespaces
def test_services_can_write_to_their_volumes_only(composition: Composition) -> None:
    program = (
        "for _, place, _, options, *_ in map(str.split, open('/proc/self/mounts')):"
        " options.startswith('rw') and not place.startswith(('/proc', '/dev')) and print(place)"
    )
    for name, volumes in {"store": ["/var/lib/resumed"], "frontend-a": []}.items():
        done = composition.containers[name].execute("python3", "-c", program)
        assert done.stdout.split() == volumes, done.stderr


@needs_namespaces
def test_the_store_cannot_read_the_keyring(composition: Composition) -> None:
    holders = {name for name, each in SERVICES.items() if any(v.startswith("shop:") for v in each.get("volumes", []))}
    assert holders == {"certificates", "frontend-a", "frontend-b"}
    assert composition.containers["frontend-a"].execute("cat", "/etc/shop/fleet.keys").returncode == 0
    assert composition.containers["store"].execute("cat", "/etc/shop/fleet.keys").returncode == 1


@needs_namespaces
def test_renewed_certificates_come_into_use_without_a_restart(composition: Composition, tmp_path: Path) -> None:
    """Sessions stay, because the keyring does."""
    store = composition.containers["store"]
    composition.start("certificates")
    composition.wait_for("certificates", "service_completed_successfully")
    until(lambda: '"reloaded"' in store.log)
    until(lambda: composition.is_healthy("store"))
    assert _visits(composition, tmp_path, "frontend-a", "frontend-b") == ["full handshake", "resumed"]


@needs_namespaces
def test_the_store_stops_in_time(composition: Composition) -> None:
    """The last test of each engine: it ends the store, and starts it again."""
    period = float(SERVICES["store"]["stop_grace_period"].removesuffix("s"))
    assert composition.containers["store"].stop(period) == 0
    composition.start("store")
    until(lambda: composition.is_healthy("store"))


@pytest.mark.parametrize("name", LASTING)
def test_the_service_is_hardened_and_bounded(name: str) -> None:
    service = LASTING[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert service["healthcheck"]["test"][0] == "CMD"


def test_only_this_machine_reaches_the_published_ports() -> None:
    published = [port for each in SERVICES.values() for port in each.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_grafana_finds_its_dashboards_and_prometheus() -> None:
    mounts = {target: source for source, target, _ in (each.split(":") for each in SERVICES["grafana"]["volumes"][:3])}
    providers = (DIRECTORY / mounts["/etc/grafana/provisioning/dashboards/resumed.yaml"]).read_text()
    (provider,) = yaml.safe_load(providers)["providers"]
    dashboards = DIRECTORY / mounts[provider["options"]["path"]]
    titles = {json.loads(path.read_text())["title"] for path in dashboards.glob("*.json")}
    assert titles == {"resumed: the store", "resumed: frontends"}
    source = mounts["/etc/grafana/provisioning/datasources/prometheus.yaml"]
    (datasource,) = yaml.safe_load((DIRECTORY / source).read_text())["datasources"]
    assert datasource["type"] == "prometheus"
    address = urllib.parse.urlsplit(datasource["url"])
    assert address.hostname == "prometheus"
    assert f"127.0.0.1:{address.port}:{address.port}" in SERVICES["prometheus"]["ports"]


def _visits(composition: Composition, directory: Path, *frontends: str) -> list[str]:
    """Visit frontends, each with the session of the first one, and return their reports."""
    authority = directory / "ca.crt"
    authority.write_text(composition.containers["frontend-a"].execute("cat", "/etc/shop/ca.crt").stdout)
    addresses = map(composition.address, frontends)
    return composition.run(sys.executable, "-c", VISIT, str(authority), *addresses).splitlines()


def _operator(composition: Composition, *command: str) -> str:
    container = composition.start("operator", *command, *TLS)
    composition.wait_for("operator", "service_completed_successfully")
    return container.log


def _query(composition: Composition, query: str) -> float:
    result = _prometheus(composition, f"query?{urllib.parse.urlencode({'query': query})}")["result"]
    return float(result[0]["value"][1]) if result else 0.0


def _prometheus(composition: Composition, path: str) -> Any:
    url = f"http://{composition.address('prometheus')}:9090/api/v1/{path}"
    program = f"import urllib.request; print(urllib.request.urlopen({url!r}).read().decode())"
    return json.loads(composition.run(sys.executable, "-c", program))["data"]
