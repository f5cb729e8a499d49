"""The faults: each sets up a store and says how it breaks and how it mends."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import signal
import struct
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import redis

from faults.experiment import Fault, Scene
from faults.network import Network
from faults.rig import Rig
from support.redis import valkey_cluster, valkey_sentinels, valkey_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from faults.experiment import Scenario
    from faults.rig import Place
    from support.redis import RedisServer

POLICIES = ("noeviction", *(f"{keys}-{how}" for keys in ("allkeys", "volatile") for how in ("lru", "lfu", "random")))
POLICIES += ("volatile-ttl",)
"""All that Redis has."""
CLOCK_STEP = 10_800
"""Seconds; more than a session lives."""
_ROOM = 256 << 10
"""Bytes that whoever fills a Redis leaves free at first."""
_FILL_PAUSE = 0.001
_MOVING_PAUSE = 0.002
"""Seconds between two keys that move, so that look-ups meet slots that are in both places."""


def _lmdb(place: Place) -> str:
    return f"lmdb://{place.directory}/store"


@contextlib.contextmanager
def server_killed(place: Place) -> Iterator[Scene]:
    """`kill -9` in the middle of Puts; started again on the same port and directory."""
    with Rig(place, _lmdb(place)) as rig:
        yield Scene(rig, rig.kill_server, rig.serve)


@contextlib.contextmanager
def server_frozen(place: Place) -> Iterator[Scene]:
    """SIGSTOP, SIGCONT: connections stay open and nobody answers."""
    with Rig(place, _lmdb(place)) as rig, _thawing(lambda: rig.server.process.pid):
        yield Scene(rig, lambda: rig.server.signal(signal.SIGSTOP), lambda: rig.server.signal(signal.SIGCONT))


@contextlib.contextmanager
def workers_killed(place: Place) -> Iterator[Scene]:
    """One worker of two is killed with -9, and later the other, so that every frontend loses its connection."""
    with Rig(place, _lmdb(place), workers=2) as rig:
        workers = [line["process"] for line in rig.server.log_lines("ready")]
        yield Scene(rig, lambda: os.kill(workers[0], signal.SIGKILL), lambda: os.kill(workers[1], signal.SIGKILL))


@contextlib.contextmanager
def database_damaged(place: Place) -> Iterator[Scene]:
    """The database of two workers loses all but its first two pages."""

    def damage() -> None:
        with (place.directory / "store/data.mdb").open("r+b") as file:
            file.seek(2 * mmap.PAGESIZE)
            file.write(bytes(8 << 20))

    with Rig(place, _lmdb(place), workers=2) as rig:
        yield Scene(rig, damage, None)


@contextlib.contextmanager
def frontend_network_reset(place: Place) -> Iterator[Scene]:
    """Connections between frontends and server are reset, and new ones refused."""
    with Rig(place, _lmdb(place), networked=True) as rig:
        yield Scene(rig, rig.network.drop, rig.network.heal)


@contextlib.contextmanager
def frontend_network_silent(place: Place) -> Iterator[Scene]:
    """Packets between frontends and server vanish."""
    with Rig(place, _lmdb(place), networked=True) as rig:
        yield Scene(rig, rig.network.swallow, rig.network.heal)


@contextlib.contextmanager
def disk_full(place: Place) -> Iterator[Scene]:
    """Something else fills the file system of the store's directory, and goes."""
    store = place.directory / "disk"
    store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "resumed-fault", store], check=True)
    try:
        filler = store / "filler"

        def fill() -> None:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

        with Rig(place, f"lmdb://{store}/store") as rig:
            yield Scene(rig, fill, filler.unlink)
    finally:
        subprocess.run(["umount", "--lazy", store], check=True)


@contextlib.contextmanager
def clock_forth(place: Place) -> Iterator[Scene]:
    """The store's clock is set forth by more than a session lives, and back."""
    with _clock(place, CLOCK_STEP) as scene:
        yield scene


@contextlib.contextmanager
def clock_back(place: Place) -> Iterator[Scene]:
    """The store's clock is set back by more than a session lives, and forth."""
    with _clock(place, -CLOCK_STEP) as scene:
        yield scene


@contextlib.contextmanager
def frontend_clock_forth(place: Place) -> Iterator[Scene]:
    """The clock of one frontend of each pair is set forth by more than a session lives, and back."""
    with _clock(place, CLOCK_STEP, of_frontend=True) as scene:
        yield scene


# Read by Python in every process with this directory on its path, before anything else can take hold of the clock.
# (libfaketime is no help: with it, time.sleep() of CPython fails or sleeps for hours.)
_STEPPED_CLOCK = """
import mmap, struct, time
with open({step!r}, "r+b") as file:
    step = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
time.time = lambda now=time.time: now() + struct.unpack("d", step)[0]
"""


@contextlib.contextmanager
def _clock(place: Place, seconds: float, *, of_frontend: bool = False) -> Iterator[Scene]:
    """Let Python's wall clock step in the server, or in the `ssl` frontends. The monotonic one never steps."""
    step = place.directory / "step"
    step.write_bytes(struct.pack("d", 0))
    (place.directory / "sitecustomize.py").write_text(_STEPPED_CLOCK.format(step=str(step)))
    env, none = {"PYTHONPATH": str(place.directory)}, dict[str, str]()
    envs = (none, env) if of_frontend else (env, none)
    with (
        step.open("r+b", buffering=0) as clock,
        Rig(place, _lmdb(place), env=envs[0], frontend_env=envs[1]) as rig,
    ):

        def set_forth(by: float) -> None:
            clock.seek(0)
            clock.write(struct.pack("d", by))

        yield Scene(rig, lambda: set_forth(seconds), lambda: set_forth(0))


@contextlib.contextmanager
def _thawing(pid: Callable[[], int]) -> Iterator[None]:
    """See to it that a process that was stopped goes on, or it could not be ended."""
    try:
        yield
    finally:
        os.kill(pid(), signal.SIGCONT)


@contextlib.contextmanager
def redis_killed(place: Place) -> Iterator[Scene]:
    """Redis is killed with -9 and comes back empty."""
    with valkey_server() as server, Rig(place, server.url) as rig:
        yield Scene(rig, server.kill, server.start)


@contextlib.contextmanager
def redis_killed_with_log(place: Place) -> Iterator[Scene]:
    """Redis is killed with -9 and comes back with what its append-only file has, synced for every write."""
    options = ("--appendonly", "yes", "--appendfsync", "always")
    with valkey_server(*options) as server, Rig(place, server.url) as rig:
        yield Scene(rig, server.kill, server.start)


@contextlib.contextmanager
def redis_restarted(place: Place) -> Iterator[Scene]:
    """Redis is restarted empty, with no time in between."""

    def restart() -> None:
        server.kill()
        server.start()

    with valkey_server() as server, Rig(place, server.url) as rig:
        yield Scene(rig, restart, None)


@contextlib.contextmanager
def redis_frozen(place: Place) -> Iterator[Scene]:
    """Redis is stopped with SIGSTOP, and continued."""
    with valkey_server() as server, Rig(place, server.url) as rig:
        yield Scene(rig, lambda: server.signal(signal.SIGSTOP), lambda: server.signal(signal.SIGCONT))


class _Filling:
    """Somebody else who fills a server, from start() to stop(), and leaves it no more room than it uses now."""

    def __init__(self, server: RedisServer, policy: str) -> None:
        self._client, self._policy = server.client, policy
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True)

    def start(self) -> None:
        """Fill it."""
        self._client.config_set("maxmemory-policy", self._policy)
        self._client.config_set("maxmemory", self._client.info("memory")["used_memory"] + _ROOM)
        self._thread.start()

    def stop(self) -> None:
        """Give the room back."""
        self._enough.set()
        self._thread.join()
        self._client.config_set("maxmemory", 0)

    def _fill(self) -> None:
        for number in itertools.count():
            with contextlib.suppress(redis.OutOfMemoryError):
                # They live as long as sessions do, so that no policy has a reason to prefer either.
                self._client.set(f"other-{number}", bytes(512), ex=7_200)
            if self._enough.wait(_FILL_PAUSE):
                return


def redis_full(policy: str) -> Scenario:
    """Return a scenario in which somebody else fills Redis."""

    @contextlib.contextmanager
    def scenario(place: Place) -> Iterator[Scene]:
        """Somebody else fills Redis up to `maxmemory`, faster than anything expires."""
        with valkey_server() as server, Rig(place, server.url) as rig:
            filling = _Filling(server, policy)
            yield Scene(rig, filling.start, filling.stop)

    return scenario


@contextlib.contextmanager
def redis_network_reset(place: Place) -> Iterator[Scene]:
    """Connections between server and Redis are reset, and new ones refused."""
    with (
        valkey_server() as server,
        Network(f"127.0.0.1:{server.port}") as network,
        Rig(place, f"redis://{network.target}") as rig,
    ):
        yield Scene(rig, network.drop, network.heal)


@contextlib.contextmanager
def redis_network_silent(place: Place) -> Iterator[Scene]:
    """Packets between server and Redis vanish."""
    with (
        valkey_server() as server,
        Network(f"127.0.0.1:{server.port}") as network,
        Rig(place, f"redis://{network.target}") as rig,
    ):
        yield Scene(rig, network.swallow, network.heal)


@contextlib.contextmanager
def failover(place: Place) -> Iterator[Scene]:
    """The primary is killed with -9; the Sentinels make its replica the primary."""
    with valkey_sentinels() as sentinels, Rig(place, sentinels.url) as rig:
        yield Scene(rig, sentinels.primary.kill, None)


def failover_behind(query: str = "") -> Scenario:
    """Return a scenario in which the replica that takes over had not heard of the last writes."""

    @contextlib.contextmanager
    def scenario(place: Place) -> Iterator[Scene]:
        """The replica hears nothing for a while; then the primary is killed, and the replica becomes the primary."""
        with valkey_sentinels() as sentinels, Rig(place, sentinels.url + query) as rig:
            yield Scene(rig, sentinels.fall_behind, sentinels.primary.kill)

    return scenario


@contextlib.contextmanager
def slots_moving(place: Place) -> Iterator[Scene]:
    """A third of a cluster's slots move from one node to another, key by key."""
    with valkey_cluster() as cluster, Rig(place, cluster.url) as rig, ThreadPoolExecutor(1) as pool:
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


_NOTHING = "nothing"
_ALL = "all sessions"
_REFUSED = "sessions negotiated meanwhile"
_EVICTED = "sessions; and tombstones, so that a Put which arrives late may bring a removed session back"
_UNREPLICATED = "the last answers of the old primary"

LMDB = [
    Fault("server killed", server_killed, _NOTHING),
    Fault("server frozen", server_frozen, _NOTHING),
    Fault("both workers killed in turn", workers_killed, _NOTHING),
    Fault("database damaged", database_damaged, _ALL),
    Fault("network to the server reset", frontend_network_reset, _NOTHING),
    Fault("network to the server silent", frontend_network_silent, _NOTHING),
    Fault("disk full", disk_full, f"{_REFUSED}, removals sent meanwhile", privileged=True),
    Fault("server's clock 3 h forth", clock_forth, "all sessions that the step carries past their end"),
    Fault("server's clock 3 h back", clock_back, _NOTHING),
    Fault("a frontend's clock 3 h forth", frontend_clock_forth, "on that frontend, what seems past its end"),
]
REDIS = [
    Fault("Redis killed, back empty", redis_killed, _ALL),
    Fault("Redis killed, back with its log", redis_killed_with_log, _NOTHING),
    Fault("Redis restarted empty", redis_restarted, _ALL),
    Fault("Redis frozen", redis_frozen, _NOTHING),
    *(
        Fault(f"Redis full, {policy}", redis_full(policy), _REFUSED if policy == "noeviction" else _EVICTED)
        for policy in POLICIES
    ),
    Fault("network to Redis reset", redis_network_reset, _NOTHING),
    Fault("network to Redis silent", redis_network_silent, _NOTHING),
    Fault("failover by Sentinel", failover, _UNREPLICATED),
    Fault(
        "failover, replica behind",
        failover_behind(),
        f"{_UNREPLICATED}: removed and taken sessions resume",
        forgives=True,
    ),
    Fault("failover, replica behind, WAIT", failover_behind("?wait_replicas=1"), f"{_UNREPLICATED} to Puts"),
    Fault("cluster slots moving", slots_moving, _NOTHING),
]
FAULTS = [*LMDB, *REDIS]
