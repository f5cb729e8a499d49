"""Admission of connections to Redis: another Redis process than before begins a new epoch.

A restarted Redis has the contents of its last snapshot, and a promoted replica has the replicated contents. Both may
have sessions that were removed, taken or purged since. So each stream of the log has a *state* beside it, with the run
id of a Redis process. The first command on every new connection, one script, compares it with the run id of the process
that answers. If they differ, all earlier sessions become void: the process is a cold cache, which is harmless. No
process can replace another without new connections.

A state has 76 characters: the time before which no session may have been issued (microseconds), the epoch, a counter
that is at least as high as every epoch, and the run id. The mark of a purge has the same beginning (see purges.py).
Entries have the epoch in which they were stored; an entry whose epoch is below that of its state or mark is void. So
the order of events decides, and not clocks, which are set back, and differ between a primary and its replica.

In a cluster, a node has the states beside its own streams. The state of a stream whose slot moved from another node is
combined with them.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import redis

from resumed_server.storage.redis.script_loader import load_script

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TIME_DIGITS, EPOCH_DIGITS = 16, 10
"""Digits of times and epochs, so that they sort as numbers do. A new epoch is at least the present Unix time."""
MARK_DIGITS = TIME_DIGITS + EPOCH_DIGITS
COUNTER = slice(MARK_DIGITS, MARK_DIGITS + EPOCH_DIGITS)
"""The part of a state that is its counter."""


def state_key(stream: bytes) -> bytes:
    """Return the key of the state beside a stream. No namespace has this name."""
    return stream + b"!"


class Admission:
    """Callback that admits each new connection.

    Args:
        streams: The keys of the streams of the log.
        scripts: The scripts to load, so that they can be called by their hashes.
        cluster: Whether the streams are spread over a cluster.

    Attributes:
        changed: Whether a connection began a new epoch since the caller last reset this.
        count: Number of connections that began.
    """

    def __init__(self, streams: Sequence[bytes], scripts: Iterable[str], *, cluster: bool) -> None:
        self._command = ("EVAL", load_script("admit"), 0, *map(state_key, streams))
        self._loads = [("SCRIPT", "LOAD", script) for script in scripts]
        self._cluster = cluster
        self.changed = False
        self.count = 0
        self._counting = threading.Lock()

    def __call__(self, connection: Any) -> None:
        """Begin the connection and admit the server.

        Raises:
            redis.RedisError: The server cannot be used. So is a replica, except in a cluster, whose replicas only name
                the primaries.
        """
        with self._counting:
            self.count += 1
        if not self._cluster:  # whose client has begun the connection already
            connection.on_connect()
        for command in (self._command, *self._loads):
            connection.send_command(*command)
        try:
            self.changed = bool(connection.read_response()) or self.changed
        except redis.exceptions.ReadOnlyError:
            if not self._cluster:
                raise
        except redis.ResponseError as error:
            # Too old for these scripts, or a Sentinel, which has no scripts: probe() reports it.
            if not any(reason in str(error) for reason in ("compiling script", "unknown command")):
                raise
        for _ in self._loads:
            with contextlib.suppress(
                redis.ResponseError
            ):  # then the script is sent in full, or probe() reports the cause
                connection.read_response()
