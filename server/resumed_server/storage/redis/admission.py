"""Admits connections to a Redis: one that is not the process which it was before begins a new epoch.

A Redis that was started again has what its last snapshot had, and a replica that was promoted what had been replicated:
what was removed, taken or purged since is back. So beside each stream of the log there is a *state*, with the run id of
the process that it belongs to. The first command on every new connection, in one script, compares it with the run id of
the process behind the connection. If that is another one, nothing that was stored before counts any more: it is a cold
cache, and harmless. No process can take another's place without new connections.

A state has 76 characters: the time before which nothing may have been issued (microseconds), the epoch, a counter that
no epoch has passed yet, and the run id. A mark of a purge begins in the same way (see redis_purges.py). Entries have
the epoch in which they were stored; one earlier than that of their state or mark is over. So what was stored before
goes by order and not by clocks, which are set back, and differ between a primary and its replica.

In a cluster a node has the states beside its own streams; one whose slot moved to it was another's, and joins them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import redis

from resumed_server.storage.redis.script_loader import load_script

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TIME_DIGITS, EPOCH_DIGITS = 16, 10
"""Times sort as numbers do; so do epochs, which count seconds as long as there are fewer than one a second."""
MARK_DIGITS = TIME_DIGITS + EPOCH_DIGITS
COUNTER = slice(MARK_DIGITS, MARK_DIGITS + EPOCH_DIGITS)
"""Where a state has its counter."""


def state_key(stream: bytes) -> bytes:
    """Return the key of the state beside a stream; no namespace is called so."""
    return stream + b"!"


class Admission:
    """What each new connection begins with.

    Args:
        streams: The keys of the log's streams.
        scripts: Those that Redis is to know from the beginning, so that they can be called by their hashes.
        cluster: Whether they are spread over a cluster.

    Attributes:
        changed: Whether a connection found another process since this was last set back.
    """

    def __init__(self, streams: Sequence[bytes], scripts: Iterable[str], *, cluster: bool) -> None:
        self._command = ("EVAL", load_script("admit"), 0, *map(state_key, streams))
        self._loads = [("SCRIPT", "LOAD", script) for script in scripts]
        self._cluster = cluster
        self.changed = False

    def __call__(self, connection: Any) -> None:
        """Greet, and admit the server; raise redis.RedisError if that cannot be.

        A replica is refused, but for those of clusters: they only say who the primaries are.
        """
        if not self._cluster:  # whose client has greeted already
            connection.on_connect()
        for command in (self._command, *self._loads):
            connection.send_command(*command)
        try:
            self.changed = bool(connection.read_response()) or self.changed
        except redis.exceptions.ReadOnlyError:
            if not self._cluster:
                raise
        except redis.ResponseError as error:
            # Too old for any of our scripts, or a Sentinel, which has none: the probe says so.
            if not any(reason in str(error) for reason in ("compiling script", "unknown command")):
                raise
        for _ in self._loads:
            with contextlib.suppress(redis.ResponseError):  # then it goes whole, or the probe says what is wrong
                connection.read_response()
