"""Faults of a Redis or Valkey behind a server, and of the network between them."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import redis

from chaos.experiment import ALL, CLOCK_STEP, ENDED, NOTHING, REFUSED, Fault, Scene
from chaos.network import Network
from chaos.rig import Rig
from support.redis import valkey_cluster, valkey_sentinels, valkey_server
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from chaos.experiment import Scenario
    from chaos.rig import Place
    from support.redis import RedisServer

POLICIES = ("noeviction", *(f"{keys}-{how}" for keys in ("allkeys", "volatile") for how in ("lru", "lfu", "random")))
POLICIES += ("volatile-ttl",)
"""All eviction policies of Redis."""
EVICTED = "sessions; and tombstones, so that a Put which arrives late may bring a removed session back"
UNACKNOWLEDGED = "removals sent during the fault"
"""The possible losses of a fault."""

_ROOM = 256 << 10
"""Bytes that stay free at first in a Redis that is to be filled."""
_FILL_PAUSE = 0.001
_MOVING_PAUSE = 0.002
"""Seconds between two keys that move, so that look-ups find slots that are on both nodes."""


def _store(place: Place, url: str, *options: str) -> str:
    """Return the storage URL, with four fifths of the handshake deadline as the timeout of Redis, as by default."""
    return f"{url}?{'&'.join((f'timeout_ms={place.deadline * 800:.0f}', *options))}"


@contextlib.contextmanager
def redis_killed(place: Place) -> Iterator[Scene]:
    """Redis is killed with SIGKILL and restarted empty."""
    with valkey_server() as server, Rig(place, _store(place, server.url)) as rig:
        yield Scene(rig, server.kill, server.start)


@contextlib.contextmanager
def redis_killed_with_log(place: Place) -> Iterator[Scene]:
    """Redis is killed with SIGKILL and restarted with its append-only file, which is synced for every write."""
    options = ("--appendonly", "yes", "--appendfsync", "always")
    with valkey_server(*options) as server, Rig(place, _store(place, server.url)) as rig:
        yield Scene(rig, server.kill, server.start)


@contextlib.contextmanager
def redis_restarted(place: Place) -> Iterator[Scene]:
    """Redis is restarted empty, without a pause."""
    with valkey_server() as server, Rig(place, _store(place, server.url)) as rig:
        yield Scene(rig, server.restart, None)


@contextlib.contextmanager
def redis_restarted_from_snapshot(place: Place) -> Iterator[Scene]:
    """Redis saves a snapshot, and is later killed with SIGKILL and restarted with the snapshot."""
    with valkey_server() as server, Rig(place, _store(place, server.url)) as rig:
        yield Scene(rig, server.client.save, server.restart)


@contextlib.contextmanager
def redis_frozen(place: Place) -> Iterator[Scene]:
    """Redis is stopped with SIGSTOP, and continued."""
    with valkey_server() as server, Rig(place, _store(place, server.url)) as rig:
        yield Scene(rig, lambda: server.signal(signal.SIGSTOP), lambda: server.signal(signal.SIGCONT))


@contextlib.contextmanager
def redis_without_snapshots(place: Place) -> Iterator[Scene]:
    """Redis fails to save its snapshot, as on a full disk, and refuses writes until it can save again."""
    with valkey_server() as server, Rig(place, _store(place, server.url)) as rig:
        yield Scene(rig, server.break_snapshots, server.mend_snapshots)


def redis_clock(seconds: float) -> Scenario:
    """Return a scenario in which the clock of Redis is wrong for some time."""

    @contextlib.contextmanager
    def scenario(place: Place) -> Iterator[Scene]:
        """The clock of Redis is set by more than the lifetime of a session, and back again."""
        step = place.directory / "step"

        def set_by(seconds: float) -> None:
            step.write_text(f"{seconds:+.0f}\n")

        set_by(0)
        env = {"LD_PRELOAD": str(_libfaketime()), "FAKETIME_TIMESTAMP_FILE": str(step)}
        env |= {"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        with valkey_server(env=env) as server, Rig(place, _store(place, server.url)) as rig:
            yield Scene(rig, lambda: set_by(seconds), lambda: set_by(0))

    return scenario


def _libfaketime() -> Path | None:
    """Return the path of libfaketime, which steps the wall clock of Redis, or None if it is not installed."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


def _no_libfaketime() -> str | None:
    return None if _libfaketime() else "needs libfaketime (apt install libfaketime)"


class _Filling:
    """Another client that fills a Redis from start() to stop(), up to its present size and a little more."""

    def __init__(self, server: RedisServer, policy: str) -> None:
        self._client, self._policy = server.client, policy
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True)

    def start(self) -> None:
        """Limit the memory and begin to fill it."""
        self._client.config_set("maxmemory-policy", self._policy)
        self._client.config_set("maxmemory", self._client.info("memory")["used_memory"] + _ROOM)
        self._thread.start()

    def stop(self) -> None:
        """Stop, and remove the limit."""
        self._enough.set()
        self._thread.join()
        self._client.config_set("maxmemory", 0)

    def _fill(self) -> None:
        for number in itertools.count():
            with contextlib.suppress(redis.OutOfMemoryError):
                # The keys have the lifetime of sessions, so that no policy prefers either.
                self._client.set(f"other-{number}", bytes(512), ex=7_200)
            if self._enough.wait(_FILL_PAUSE):
                return


def redis_full(policy: str) -> Scenario:
    """Return a scenario in which another client fills Redis."""

    @contextlib.contextmanager
    def scenario(place: Place) -> Iterator[Scene]:
        """Another client fills Redis up to `maxmemory`, faster than keys expire."""
        with valkey_server() as server, Rig(place, _store(place, server.url)) as rig:
            filling = _Filling(server, policy)
            yield Scene(rig, filling.start, filling.stop)

    return scenario


@contextlib.contextmanager
def redis_network_reset(place: Place) -> Iterator[Scene]:
    """Connections between server and Redis are reset, and new ones refused."""
    with _network_to_redis(place) as (rig, network):
        yield Scene(rig, network.drop, network.heal)


@contextlib.contextmanager
def redis_network_silent(place: Place) -> Iterator[Scene]:
    """Packets between server and Redis vanish."""
    with _network_to_redis(place) as (rig, network):
        yield Scene(rig, network.swallow, network.heal)


@contextlib.contextmanager
def _network_to_redis(place: Place) -> Iterator[tuple[Rig, Network]]:
    with (
        valkey_server() as server,
        Network(f"127.0.0.1:{server.port}") as network,
        Rig(place, _store(place, f"redis://{network.target}")) as rig,
    ):
        yield rig, network


@contextlib.contextmanager
def failover(place: Place) -> Iterator[Scene]:
    """The primary is killed with SIGKILL; the Sentinels promote its replica."""
    with valkey_sentinels() as sentinels, Rig(place, _store(place, sentinels.url)) as rig:
        yield Scene(rig, sentinels.primary.kill, None)


def failover_behind(*options: str) -> Scenario:
    """Return a scenario in which the promoted replica lacks the last writes."""

    @contextlib.contextmanager
    def scenario(place: Place) -> Iterator[Scene]:
        """Replication stops for some time; then the primary is killed, and the replica is promoted."""
        with valkey_sentinels() as sentinels, Rig(place, _store(place, sentinels.url, *options)) as rig:
            yield Scene(rig, sentinels.fall_behind, sentinels.primary.kill)

    return scenario


@contextlib.contextmanager
def demoted_behind_a_name(place: Place) -> Iterator[Scene]:
    """Primary and replica swap roles, and the name follows; existing connections stay with the old primary."""
    with _pair() as (primary, replica), Network(f"127.0.0.1:{primary.port}") as name:

        def swap() -> None:
            replica.client.replicaof("no", "one")
            primary.client.replicaof("127.0.0.1", 1)  # without a link to the new primary, so that it keeps its data
            name.redirect(f"127.0.0.1:{replica.port}")

        with Rig(place, _store(place, f"redis://{name.target}")) as rig:
            yield Scene(rig, swap, None)


@contextlib.contextmanager
def replica_away(place: Place) -> Iterator[Scene]:
    """The replica that Takes and Removes wait for is disconnected for some time; frontends repeat them."""
    with _pair() as (primary, replica), Rig(place, _store(place, primary.url, "wait_replicas=1")) as rig:

        def part() -> None:
            replica.client.config_set("masterauth", "of another primary")
            primary.client.execute_command("CLIENT KILL TYPE replica")

        yield Scene(rig, part, lambda: replica.client.config_set("masterauth", ""))


@contextlib.contextmanager
def _pair() -> Iterator[tuple[RedisServer, RedisServer]]:
    """A primary and its replica, in sync."""
    with valkey_server() as primary, valkey_server("--replicaof", f"127.0.0.1 {primary.port}") as replica:
        until(lambda: replica.client.info("replication")["master_link_status"] == "up")
        yield primary, replica


@contextlib.contextmanager
def slots_moving(place: Place) -> Iterator[Scene]:
    """A third of a cluster's slots move from one node to another, key by key."""
    with valkey_cluster() as cluster, Rig(place, _store(place, cluster.url)) as rig, ThreadPoolExecutor(1) as pool:
        enough = threading.Event()
        moving: list[Future[None]] = []

        def begin() -> None:
            moving.append(pool.submit(cluster.move_slots, enough, _MOVING_PAUSE))

        def end() -> None:
            enough.set()
            moving[0].result()

        try:
            yield Scene(rig, begin, end)
        finally:
            enough.set()


REDIS = [
    Fault("Redis killed, back empty", redis_killed, ALL),
    Fault("Redis killed, back with its log", redis_killed_with_log, NOTHING),
    Fault("Redis restarted empty", redis_restarted, ALL),
    Fault("Redis restarted from a snapshot", redis_restarted_from_snapshot, ALL),
    Fault("Redis frozen", redis_frozen, NOTHING),
    Fault("Redis cannot save its snapshot", redis_without_snapshots, NOTHING),
    Fault("Redis' clock 3 h forth", redis_clock(CLOCK_STEP), ENDED, hindrance=_no_libfaketime),
    Fault("Redis' clock 3 h back", redis_clock(-CLOCK_STEP), NOTHING, _no_libfaketime, forgets_tickets=True),
    *(
        Fault(
            f"Redis full, {policy}",
            redis_full(policy),
            REFUSED if policy == "noeviction" else EVICTED,
            forgets_tickets=policy != "noeviction",
        )
        for policy in POLICIES
    ),
    Fault("network to Redis reset", redis_network_reset, NOTHING),
    Fault("network to Redis silent", redis_network_silent, NOTHING),
    Fault("failover by Sentinel", failover, ALL),
    Fault("failover, replica behind", failover_behind(), ALL),
    Fault("failover, replica behind, WAIT", failover_behind("wait_replicas=1"), f"{ALL}, {UNACKNOWLEDGED}"),
    Fault("replica away, WAIT", replica_away, UNACKNOWLEDGED),
    Fault("primary demoted behind a name", demoted_behind_a_name, ALL),
    Fault("cluster slots moving", slots_moving, NOTHING),
]
