"""The index of lasting removals in a Redis: those in force in a namespace can be read without a scan of all sessions.

It is a sorted set for each namespace beside each stream of the log (see change_log.py), and the script that removes a
session adds it to a set on its own node. So a node of a cluster has the removals that it carried out, and those of
slots that have moved away since; all sets together have all removals.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from resumed_server.storage.redis.topology import SlotsMoving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resumed_server.storage.call_gate import CallGate
    from resumed_server.storage.redis.change_log import ChangeLog
    from resumed_server.storage.redis.topology import RedisTopology

_TRIM_BATCH = 1_000
"""Removals that one step deletes of each set at most: about a millisecond of Redis' time."""
_ATTEMPTS = 5


class Removals:
    """The lasting removals on `nodes`. Thread-safe."""

    def __init__(self, nodes: RedisTopology, log: ChangeLog) -> None:
        self._nodes, self._log = nodes, log
        self._namespaces: dict[str, None] = {}

    def add(self, namespace: str, key: bytes, ttl: float) -> None:
        """Add the removal of the session under a key of Redis, on a node that may not be that of the session."""
        stream = self._log.first_stream
        arguments = (b"%b~%b" % (stream, namespace.encode()), key, milliseconds(ttl))
        self._nodes.evaluate(self._nodes.node_for(stream), "add_removal", 1, *arguments)

    def will_change(self, namespace: str) -> None:
        """Remember that a namespace has removals, so that trim() deletes those that are over."""
        self._namespaces[namespace] = None

    def read(self, namespace: str, limit: int, gate: CallGate) -> Iterator[list[tuple[bytes, float]]]:
        """Yield keys of Redis, and for how many seconds they are removed, in parts of about `limit`.

        Each part is a call of its own at the gate, so that close() waits for one part only.
        """
        self.will_change(namespace)
        with gate:
            unread = [stream for streams in self._log.streams().values() for stream in streams]
        cursor, attempts = b"0", 0
        while unread:
            with gate:
                node = self._nodes.node_for(unread[0])
                there = set(self._log.streams().get(node, ()))
                here = [unread[0], *(each for each in unread[1:] if each in there)]
                try:
                    done, cursor, *found = self._nodes.evaluate(
                        node, "read_removals", 0, namespace, limit, cursor, *here
                    )
                except SlotsMoving:
                    if (attempts := attempts + 1) == _ATTEMPTS:
                        raise
                    self._log.refresh_placement()
                    cursor = b"0"  # on another node, a cursor means nothing
                    continue
            others = set(here)
            unread = here[done:] + [each for each in unread if each not in others]
            yield [(key, left / 1000) for key, left in zip(found[::2], found[1::2], strict=True)]

    def trim(self) -> None:
        """Delete removals that are over, some of one namespace: removals that are added delete only a few each."""
        namespace = next(iter(self._namespaces), None)
        if namespace is None:
            return
        del self._namespaces[namespace]
        left = 1
        try:
            streams = self._log.streams().items()
            left = sum(
                self._nodes.evaluate(node, "trim_removals", 0, namespace, _TRIM_BATCH, *each) for node, each in streams
            )
        except SlotsMoving:
            self._log.refresh_placement()
        finally:
            if left:
                self.will_change(namespace)


def milliseconds(seconds: float) -> int:
    """Return a time in milliseconds, rounded up: a removal is in force for at least its time."""
    return math.ceil(seconds * 1000)
