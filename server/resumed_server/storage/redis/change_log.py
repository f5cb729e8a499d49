"""The change log of a Redis: the latest stored, removed and purged keys, of all servers.

It is a stream that the scripts write which make the changes, so it neither misses a change nor has one that did not
happen. It has keys only; its readers look the sessions up. It exists only while it is read: a reader creates it and
prolongs its life, and scripts append to an existing stream.

In a cluster, a script reaches only the keys of its node. So there are STREAMS streams, in slots that are spread evenly,
and a script writes to any stream of its node. The order of changes in different streams does not matter: for a stored
session, a reader returns its present contents, after it has read all streams.

Every second, a reader adds a heartbeat to each stream. So the last ids (time of the node in milliseconds, and a number)
are at most that old without any change, and no node needs the clock of another. A position is the last id that was read
from every stream, in 40 bytes: the lineage of all streams, the oldest of these ids, and a digest of all ids. The
process that created the position remembers the ids; another process begins at the oldest id in all streams, and repeats
some changes. The lineage changes with a failover or a restart (replication id), and with a new stream (random name).
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import OrderedDict, defaultdict
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from redis.crc import key_slot

from resumed_server.storage.redis.topology import SlotsMoving

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from resumed_server.storage.redis.topology import RedisTopology

MOST_CHANGES = 1 << 16
"""Minimum number of changes that a stream keeps: about 4 MiB. Redis trims it by whole nodes."""
KEPT_SECONDS = 300
"""Lifetime of a stream after its last reader, and maximum age of its changes, in seconds."""
STREAMS = 128
"""Number of streams in a cluster, so that each primary has some."""

STORED, REMOVED, REMOVED_FOR, PURGED = b"+", b"-", b"~", b"!"
"""Kinds of changes; REMOVED_FOR is a lasting removal. The key of a purge has, after the namespace, the time up to which
it purges, or nothing for now."""

_HEARTBEAT = b"."
_WHAT = {STORED, REMOVED, REMOVED_FOR, PURGED, _HEARTBEAT}
_SLOTS = 16_384
_PLACEMENT_SECONDS = 1.0
_STREAMS_EACH = 2  # of a node: the slot of one may be moving to another node
KNOWN_POSITIONS = 1_024
"""Number of positions whose ids a process remembers, the most recently used. Watchers that catch up need two each, half
of this in total."""


class StreamPositions(NamedTuple):
    """The lineage of each stream, and the packed id of the last change that was read from it."""

    lineage: tuple[bytes, ...]
    ids: tuple[bytes, ...]

    def position(self) -> bytes:
        """Return the position in 40 bytes."""
        lineage = hashlib.sha256(b" ".join(self.lineage)).digest()[:16]
        return lineage + min(self.ids) + hashlib.sha256(b"".join(self.ids)).digest()[:8]


class LoggedChange(NamedTuple):
    """A change in the log."""

    id: bytes
    stream: int
    what: bytes
    key: bytes

    @property
    def time(self) -> float:
        """The time at which it was logged, in Unix seconds, by the clock of its node, rounded up."""
        return (int.from_bytes(self.id[:8], "big") + 1) / 1000


class Reading:
    """Changes after one position, in the order of their ids."""

    def __init__(
        self, log: ChangeLog, start: StreamPositions, end: StreamPositions, changes: Sequence[LoggedChange]
    ) -> None:
        self.changes = changes
        self._log, self._start, self._end = log, start, end

    def position_after(self, count: int) -> bytes:
        """Return the position after the first `count` changes."""
        if count == len(self.changes):
            return self._log.remember(self._end)
        ids = list(self._start.ids)
        for change in self.changes[:count]:
            ids[change.stream] = change.id
        return self._log.remember(StreamPositions(self._start.lineage, tuple(ids)))


class ChangeLog:
    """The log in `streams` on `nodes`. Thread-safe."""

    def __init__(self, nodes: RedisTopology, streams: Sequence[bytes]) -> None:
        self._nodes = nodes
        self._streams = streams
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, StreamPositions] = OrderedDict()
        self._placement: tuple[float, Mapping[str, Sequence[int]]] = (float("-inf"), {})

    def log_arguments(self, node: str) -> list[Any]:
        """Return the arguments for log_change() on `node`: length of the log, and streams, the node's own first.

        They include streams of every node: while slots move, another node may execute the script.
        """
        places = self._by_node()
        others = (indexes for other, indexes in places.items() if other != node)
        chosen = [each for indexes in (places.get(node, ()), *others) for each in indexes[:_STREAMS_EACH]]
        return [MOST_CHANGES, *(self._streams[each] for each in chosen)]

    @property
    def first_stream(self) -> bytes:
        """The key of the first stream, of a single server and of a cluster."""
        return self._streams[0]

    def streams(self) -> dict[str, list[bytes]]:
        """Return the keys of all streams, by node."""
        return {node: [self._streams[each] for each in indexes] for node, indexes in self._by_node().items()}

    def append(self, changes: Iterable[tuple[bytes, bytes]]) -> None:
        """Log keys and the kind of each change, if the log has a reader."""
        stream = self._streams[0]
        node = self._nodes.node_for(stream)
        added = ("XADD", stream, "NOMKSTREAM", "MAXLEN", "~", MOST_CHANGES, "*")
        self._nodes.query(node, [(*added, what, key) for key, what in changes])

    def refresh_placement(self) -> None:
        """Query the placement of the streams on the nodes again."""
        self._nodes.refresh()
        self._placement = (float("-inf"), {})

    def position(self) -> bytes:
        """Return the position of the end of the log. Create the log if it has no reader."""
        size = len(self._streams)
        lineage, ids = [b""] * size, [b""] * size
        name = os.urandom(8).hex()
        for node, indexes in self._by_node().items():
            streams = [self._streams[each] for each in indexes]
            lineages, ends = self._evaluate(node, "log_end", streams[0], name, *streams)
            for each, mine, end in zip(indexes, lineages.split(), ends.split(), strict=True):
                lineage[each], ids[each] = mine, _pack(end)
        return self.remember(StreamPositions(tuple(lineage), tuple(ids)))

    def read(self, after: bytes, until: bytes, limit: int) -> Reading | None:
        """Return up to `limit` changes between two positions; `until` is a recent result of position().

        The result is None if the log does not reach back to `after`, or if that is not a position of this log.
        """
        end = self._recall(until)
        if end is None or len(after) != len(until) or after[:16] != until[:16]:
            return None
        start = self._recall(after) or StreamPositions(end.lineage, (after[16:32],) * len(end.ids))
        changes: list[LoggedChange] = []
        ids = list(end.ids)
        for node, indexes in self._by_node().items():
            unread = [each for each in indexes if start.ids[each] < end.ids[each]]
            if not unread:
                continue
            ranges = [(self._streams[each], _text(start.ids[each]), _text(end.ids[each])) for each in unread]
            parts = (part for each in ranges for part in each)
            answers = self._evaluate(node, "log_read", ranges[0][0], limit, *parts)
            for each, (lineage, first, entries) in zip(unread, answers, strict=True):
                if lineage != end.lineage[each] or _pack(first) > start.ids[each]:
                    return None
                if len(entries) == limit:
                    ids[each] = _pack(entries[-1][0])
                logged = _parse_entry(each, entries)
                if logged is None:
                    return None
                changes += logged
        changes.sort()
        return Reading(self, start, StreamPositions(end.lineage, tuple(ids)), changes)

    def remember(self, ends: StreamPositions) -> bytes:
        """Return the position of `ends`, and remember their ids."""
        position = ends.position()
        with self._lock:
            self._known[position] = ends
            self._known.move_to_end(position)
            if len(self._known) > KNOWN_POSITIONS:
                self._known.popitem(last=False)
        return position

    def _recall(self, position: bytes) -> StreamPositions | None:
        """Return the ids of a position, if they are remembered, and mark it as used."""
        with self._lock:
            if position in self._known:
                self._known.move_to_end(position)
            return self._known.get(position)

    def _by_node(self) -> Mapping[str, Sequence[int]]:
        known_since, places = self._placement
        if time.monotonic() - known_since > _PLACEMENT_SECONDS:
            by_node = defaultdict(list)
            for each, stream in enumerate(self._streams):
                by_node[self._nodes.node_for(stream)].append(each)
            places = dict(by_node)
            self._placement = (time.monotonic(), places)
        return places

    def _evaluate(self, node: str, script: str, key: bytes, *arguments: Any) -> Any:
        try:
            return self._nodes.evaluate(node, script, 1, key, *arguments)
        except SlotsMoving:
            self.refresh_placement()
            raise


def streams_of(prefix: bytes, *, cluster: bool) -> list[bytes]:
    """Return the keys of the streams that log the keys which begin with `prefix`."""
    slots = range(0, _SLOTS, _SLOTS // STREAMS if cluster else _SLOTS)
    return [b"%b{%b}" % (prefix, tag) for tag in _tags(slots)]


@cache  # it tries hundreds of thousands of tags
def _tags(slots: range) -> tuple[bytes, ...]:
    """Return a hash tag for each slot."""
    wanted, number = set(slots), 0
    tags: dict[int, bytes] = {}
    while len(tags) < len(wanted):
        tag = b"%x" % number
        slot = key_slot(tag)
        if slot in wanted:
            tags.setdefault(slot, tag)
        number += 1
    return tuple(tags[slot] for slot in slots)


def _parse_entry(stream: int, entries: Iterable[tuple[bytes, Sequence[bytes]]]) -> list[LoggedChange] | None:
    """Return the changes among `entries`, without heartbeats; None if one is of an unknown kind."""
    logged = []
    for id_, fields in entries:
        if len(fields) != 2 or fields[0] not in _WHAT:  # noqa: PLR2004 - a field and its value
            return None
        if fields[0] != _HEARTBEAT:
            logged.append(LoggedChange(_pack(id_), stream, *fields))
    return logged


def _pack(id_: bytes) -> bytes:
    milliseconds, _, number = id_.partition(b"-")
    return int(milliseconds).to_bytes(8, "big") + int(number).to_bytes(8, "big")


def _text(packed: bytes) -> str:
    return f"{int.from_bytes(packed[:8], 'big')}-{int.from_bytes(packed[8:], 'big')}"
