"""The agent as a process: outages, restarts, purges, signals, health and metrics."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import resumed
from resumed._crypto.ticket_secret import Epoch, epoch_of_name
from support.ports import free_port
from support.server import running_server
from support.ticket_servers import MEMORY, running_agent
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.server import RunningServer


@pytest.fixture
def keyring_file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.keys"
    path.write_text(resumed.Keyring.generate() + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def keys() -> Iterator[Path]:
    """A directory in memory."""
    if not MEMORY.is_dir():
        pytest.skip("needs a tmpfs in /dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="resumed-keys-", dir=MEMORY))
    yield directory / "keys"
    shutil.rmtree(directory)


def names_in(keys: Path) -> list[bytes]:
    content = keys.read_bytes()
    return [content[at : at + 16] for at in range(0, len(content), 48)]


def is_of_fleet(name: bytes, keyring_file: Path) -> bool:
    (fleet_key,) = resumed.Keyring.load(keyring_file).fleet_keys
    return epoch_of_name("shop", fleet_key, name) is not None


def test_two_agents_have_the_same_keys_in_files_of_their_own(
    store: RunningServer, keyring_file: Path, keys: Path
) -> None:
    other = keys.with_name("other")
    with (
        running_agent(store.target, keyring_file, "--trafficserver", str(keys)) as one,
        running_agent(store.target, keyring_file, "--trafficserver", str(other)) as two,
    ):
        one.wait_for_log("published")
        two.wait_for_log("published")
        # Either may have missed a key on which the other one agreed a moment later.
        until(lambda: keys.read_bytes() == other.read_bytes())
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    first = names_in(keys)[0]
    (fleet_key,) = resumed.Keyring.load(keyring_file).fleet_keys
    epoch = epoch_of_name("shop", fleet_key, first)
    assert epoch
    assert epoch.rotation == 3600
    assert Epoch.at(epoch.start, 3600) == epoch


def test_in_an_outage_at_the_start_servers_get_a_temporary_key_and_the_fleets_key_later(
    keyring_file: Path, keys: Path
) -> None:
    port = free_port()
    with running_agent(f"127.0.0.1:{port}", keyring_file, "--trafficserver", str(keys)) as agent:
        agent.wait_for_log("published")
        (temporary,) = names_in(keys)
        assert not is_of_fleet(temporary, keyring_file)
        with running_server(listen=f"127.0.0.1:{port}"):
            agent.wait_for_log("published", 2)
            assert all(is_of_fleet(name, keyring_file) for name in names_in(keys))


def test_an_agent_that_restarts_in_an_outage_leaves_the_keys_in_place(keyring_file: Path, keys: Path) -> None:
    with running_server() as store, running_agent(store.target, keyring_file, "--trafficserver", str(keys)) as agent:
        agent.wait_for_log("published")
    assert keys.exists(), "the end of the agent took the keys away"
    content = keys.read_bytes()
    health = free_port()
    options = ("--trafficserver", str(keys), "--health-listen", f"127.0.0.1:{health}")
    with running_agent(store.target, keyring_file, *options) as agent:
        agent.wait_for_log("the store does not answer, the keys stay")
        until(lambda: serves(health))
        assert keys.read_bytes() == content


def serves(port: int) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answers = [stub.Check(health_pb2.HealthCheckRequest(service=name)).status for name in ("", "live")]
        except grpc.RpcError:
            return False
    return answers == [health_pb2.HealthCheckResponse.SERVING] * 2


def test_a_purge_replaces_all_keys(store: RunningServer, keyring_file: Path, keys: Path) -> None:
    options = ("--trafficserver", str(keys), "--rotation", "1h")
    with running_agent(store.target, keyring_file, *options, namespace="purged") as agent:
        agent.wait_for_log("published")
        before = set(names_in(keys))
        resumed.Admin(store.target, deadline=30).purge("purged")
        until(lambda: not before & set(names_in(keys)))
        agent.wait_for_log("the namespace was purged: keys from before end")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_agent_ends_with_its_socket_and_leaves_the_keys(
    store: RunningServer, keyring_file: Path, keys: Path, number: signal.Signals
) -> None:
    sds = keys.with_name("sds")
    with running_agent(store.target, keyring_file, "--trafficserver", str(keys), "--sds", f"unix:{sds}") as agent:
        agent.wait_for_log("published", 2)
        assert stat.S_IMODE(sds.stat().st_mode) & 0o077 == 0
        agent.signal(number)
        assert agent.wait() == 0
    assert not sds.exists()
    assert keys.exists()
    assert [line["event"] for line in agent.log_lines()][-1] == "stopped"


def test_the_reload_command_inherits_no_blocked_signal(
    store: RunningServer, keyring_file: Path, keys: Path, tmp_path: Path
) -> None:
    command = f"sh -c 'grep SigBlk /proc/self/status > {tmp_path}/mask'"
    options = ("--trafficserver", str(keys), "--reload", command)
    with running_agent(store.target, keyring_file, *options) as agent:
        agent.wait_for_log("reloaded")
    assert int((tmp_path / "mask").read_text().split()[1], 16) == 0


def test_metrics_show_the_keys_and_the_outputs_and_no_key(store: RunningServer, keyring_file: Path, keys: Path) -> None:
    options = ("--trafficserver", str(keys), "--metrics-listen", "127.0.0.1:0", "--reload", "false")
    with running_agent(store.target, keyring_file, *options) as agent:
        (address,) = agent.wait_for_log("serving metrics")[0]["addresses"]
        agent.wait_for_log("failed, trying again")
        with urllib.request.urlopen(f"http://{address}/metrics") as response:
            text = response.read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    prefix, namespace = "resumed_ticket_keys_", 'session_namespace="shop"}'
    assert float(values[f"{prefix}keys{{{namespace}"]) >= 2
    assert float(values[f"{prefix}held_over{{{namespace}"]) == 0
    assert float(values[f"{prefix}store_available{{{namespace}"]) == 1
    assert float(values[f'{prefix}writes_total{{outcome="succeeded",output="trafficserver",{namespace}']) >= 1
    assert float(values[f'{prefix}reloads_total{{outcome="failed",output="reload",{namespace}']) >= 1
    assert float(values[f'{prefix}last_write_timestamp_seconds{{output="trafficserver",{namespace}']) > 1e9
    assert 1e9 < float(values[f"{prefix}key_created_timestamp_seconds{{{namespace}"]) <= time.time()
    log = "\n".join(map(repr, agent.log_lines()))
    key = keys.read_bytes()[16:48]
    assert key.hex() not in text + log
    assert os.fsdecode(key[:8]) not in log
