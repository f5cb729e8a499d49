"""Faults of a server with LMDB, of its network and its clock."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import subprocess
from typing import TYPE_CHECKING

from chaos.experiment import ALL, CLOCK_STEP, ENDED, NOTHING, REFUSED, Fault, Scene
from chaos.rig import Rig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chaos.rig import Place


def _lmdb(place: Place) -> str:
    return f"lmdb://{place.directory}/store"


@contextlib.contextmanager
def server_killed(place: Place) -> Iterator[Scene]:
    """`kill -9` amid Puts; the server is started again on the same port and directory."""
    with Rig(place, _lmdb(place)) as rig:
        yield Scene(rig, rig.kill_server, rig.serve)


@contextlib.contextmanager
def capacity_changed(place: Place) -> Iterator[Scene]:
    """The server is killed, and started with a 64th of its capacity."""
    with Rig(place, _lmdb(place)) as rig:
        yield Scene(rig, rig.kill_server, lambda: rig.serve("--capacity", "16MiB"))


@contextlib.contextmanager
def server_frozen(place: Place) -> Iterator[Scene]:
    """SIGSTOP and SIGCONT: connections stay open without answers."""
    with Rig(place, _lmdb(place)) as rig, _thawing(lambda: rig.server.process.pid):
        yield Scene(rig, lambda: rig.server.signal(signal.SIGSTOP), lambda: rig.server.signal(signal.SIGCONT))


@contextlib.contextmanager
def workers_killed(place: Place) -> Iterator[Scene]:
    """One worker of two is killed with SIGKILL, and later the other, so that every frontend loses its connection."""
    with Rig(place, _lmdb(place), workers=2) as rig:
        workers = [line["process"] for line in rig.server.log_lines("ready")]
        yield Scene(rig, lambda: os.kill(workers[0], signal.SIGKILL), lambda: os.kill(workers[1], signal.SIGKILL))


@contextlib.contextmanager
def database_damaged(place: Place) -> Iterator[Scene]:
    """The database of two workers loses all pages except the first two."""

    def damage() -> None:
        with (place.directory / "store/data.mdb").open("r+b") as file:
            file.seek(2 * mmap.PAGESIZE)
            file.write(bytes(8 << 20))

    with Rig(place, _lmdb(place), workers=2) as rig:
        yield Scene(rig, damage, None)


@contextlib.contextmanager
def frontend_network_reset(place: Place) -> Iterator[Scene]:
    """Connections between frontends and server are reset, and new ones as well."""
    with Rig(place, _lmdb(place), networked=True) as rig:
        yield Scene(rig, rig.network.drop, rig.network.heal)


@contextlib.contextmanager
def frontend_network_silent(place: Place) -> Iterator[Scene]:
    """Packets between frontends and server vanish."""
    with Rig(place, _lmdb(place), networked=True) as rig:
        yield Scene(rig, rig.network.swallow, rig.network.heal)


@contextlib.contextmanager
def disk_full(place: Place) -> Iterator[Scene]:
    """Another file fills the file system of the database, and is deleted."""
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
    """The server's clock is set forward by more than the lifetime of a session, and back."""
    with _clock(place, CLOCK_STEP) as scene:
        yield scene


@contextlib.contextmanager
def clock_back(place: Place) -> Iterator[Scene]:
    """The server's clock is set back by more than the lifetime of a session, and forward."""
    with _clock(place, -CLOCK_STEP) as scene:
        yield scene


@contextlib.contextmanager
def frontend_clock_forth(place: Place) -> Iterator[Scene]:
    """The clock of one frontend of each pair is set forward by more than the lifetime of a session, and back."""
    with _clock(place, CLOCK_STEP, of_frontend=True) as scene:
        yield scene


# Python imports this in every process with the directory on its path, before another module can import the clock.
# (With libfaketime, time.sleep() of CPython fails or sleeps for hours.)
_STEPPED_CLOCK = """
import mmap, struct, time
with open({step!r}, "r+b") as file:
    step = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
time.time = lambda now=time.time: now() + struct.unpack("d", step)[0]
"""


@contextlib.contextmanager
def _clock(place: Place, seconds: float, *, of_frontend: bool = False) -> Iterator[Scene]:
    """Step the wall clock of Python in the server, or in the `ssl` frontends. The monotonic clock does not step."""
    step = place.directory / "step"
    step.write_bytes(struct.pack("d", 0))
    (place.directory / "sitecustomize.py").write_text(_STEPPED_CLOCK.format(step=str(step)))
    paths = [str(place.directory), *filter(None, [os.environ.get("PYTHONPATH")])]
    env, none = {"PYTHONPATH": os.pathsep.join(paths)}, dict[str, str]()
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
    """Continue a stopped process at the end of the context, so that it can exit."""
    try:
        yield
    finally:
        os.kill(pid(), signal.SIGCONT)


def _only_root() -> str | None:
    return "only root can mount a small file system" if os.geteuid() else None


LMDB = [
    Fault("server killed", server_killed, NOTHING),
    Fault("server killed, capacity changed", capacity_changed, NOTHING),
    Fault("server frozen", server_frozen, NOTHING),
    Fault("both workers killed in turn", workers_killed, NOTHING),
    Fault("database damaged", database_damaged, ALL),
    Fault("network to the server reset", frontend_network_reset, NOTHING),
    Fault("network to the server silent", frontend_network_silent, NOTHING),
    Fault("disk full", disk_full, f"{REFUSED}, removals sent during the fault", hindrance=_only_root),
    Fault("server's clock 3 h forth", clock_forth, ENDED),
    Fault("server's clock 3 h back", clock_back, NOTHING, forgets_tickets=True),
    Fault("a frontend's clock 3 h forth", frontend_clock_forth, "on that frontend, what seems past its end"),
]
