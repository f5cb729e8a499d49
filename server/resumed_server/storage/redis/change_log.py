"""The log of changes of a Redis: what was stored, removed and purged last, by all servers.

It is a stream, written by the scripts that make the changes, so it can neither miss one nor tell of one that did not
happen. It has keys only; who reads it looks the sessions up. It is there only while somebody reads it: a reader makes
it and prolongs its life, and a script adds to what is there.

In a cluster a script reaches only what its own node has. So there are STREAMS of them, in slots that are spread evenly,
and a script writes to whichever is at hand. Which change of which stream came first does not matter: of a session that
was stored, a reader tells what it finds now, after it has read all streams.

Every second a reader leaves a mark in each stream. So ids (the time in a node's milliseconds, and a number) are no
older than that where nothing happens, and none needs the others' clock. A position is where every stream was read up
to, in 40 bytes: the lineage of all of them, the oldest of their ids, and a digest of all ids. The process that made it
knows them; another one begins at the oldest in all streams, and tells some changes again. The lineage is another one
after a failover or a restart (the replication id) and where a stream was made anew (a random name).
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

from resumed_server.storage.engine import EngineError
from resumed_server.storage.redis.script_loader import load_script
from resumed_server.storage.redis.topology import Displaced

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from resumed_server.storage.redis.topology import Nodes

MOST_CHANGES = 1 << 16
"""Changes that a stream keeps, and some more since it is trimmed by whole nodes: about 4 MiB."""
KEPT_SECONDS = 300
"""How long a stream lives after its last reader, and the age that what is in it may reach."""
STREAMS = 128
"""In a cluster, so that each of its primaries has some."""

STORED, REMOVED, PURGED = b"+", b"-", b"!"
"""What a change did: to the session of its key, or to a namespace. The key of a purge has no key: nothing or a time
stands behind the namespace."""

_MARK = b"."
_WHAT = {STORED, REMOVED, PURGED, _MARK}
_SLOTS = 16_384
_PLACES_SECONDS = 1.0
_STREAMS_EACH = 2  # of a node, for a script to try: one may be on its way to another node
KNOWN_POSITIONS = 1_024
"""How many positions a process knows exactly; those that were not used longest are forgotten first. It is twice what
watchers that catch up need, two each."""


class _Ends(NamedTuple):
    """How far all streams were read: for each its lineage, and the id of the last change, packed."""

    lineage: tuple[bytes, ...]
    ids: tuple[bytes, ...]

    def position(self) -> bytes:
        """Return it in 40 bytes."""
        lineage = hashlib.sha256(b" ".join(self.lineage)).digest()[:16]
        return lineage + min(self.ids) + hashlib.sha256(b"".join(self.ids)).digest()[:8]


class Logged(NamedTuple):
    """A change as the log has it."""

    id: bytes
    stream: int
    what: bytes
    key: bytes


class Reading:
    """Changes behind one position, in the order of their ids."""

    def __init__(self, log: ChangeLog, start: _Ends, end: _Ends, changes: Sequence[Logged]) -> None:
        self.changes = changes
        self._log, self._start, self._end = log, start, end

    def behind(self, count: int) -> bytes:
        """Return the position behind the first `count` changes."""
        if count == len(self.changes):
            return self._log.remembered(self._end)
        ids = list(self._start.ids)
        for change in self.changes[:count]:
            ids[change.stream] = change.id
        return self._log.remembered(_Ends(self._start.lineage, tuple(ids)))


class ChangeLog:
    """The log in `streams` on `nodes`. Thread-safe."""

    def __init__(self, nodes: Nodes, streams: Sequence[bytes]) -> None:
        self._nodes = nodes
        self._streams = streams
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, _Ends] = OrderedDict()
        self._places: tuple[float, Mapping[str, Sequence[int]]] = (float("-inf"), {})

    def arguments(self, node: str) -> list[Any]:
        """Return what a script on `node` needs to log: how much is kept, and streams, the node's own first.

        Some of every node: while slots move, another one may carry it out.
        """
        places = self._by_node()
        others = (indexes for other, indexes in places.items() if other != node)
        chosen = [each for indexes in (places.get(node, ()), *others) for each in indexes[:_STREAMS_EACH]]
        return [MOST_CHANGES, *(self._streams[each] for each in chosen)]

    @property
    def first_stream(self) -> bytes:
        """The key of a stream that is always there to be asked for."""
        return self._streams[0]

    def streams(self) -> dict[str, list[bytes]]:
        """Return the keys of all streams, by node."""
        return {node: [self._streams[each] for each in indexes] for node, indexes in self._by_node().items()}

    def append(self, changes: Iterable[tuple[bytes, bytes]]) -> None:
        """Log keys, and what happened to each, if anybody reads the log."""
        stream = self._streams[0]
        node = self._nodes.of(stream)
        added = ("XADD", stream, "NOMKSTREAM", "MAXLEN", "~", MOST_CHANGES, "*")
        for answer in self._nodes.execute(node, [(*added, what, key) for key, what in changes]):
            if isinstance(answer, EngineError):
                raise answer

    def relocate(self) -> None:
        """Find out anew which node has which stream."""
        self._nodes.refresh()
        self._places = (float("-inf"), {})

    def position(self) -> bytes:
        """Return where the log ends. It is made if nobody has read it of late."""
        size = len(self._streams)
        lineage, ids = [b""] * size, [b""] * size
        name = os.urandom(8).hex()
        for node, indexes in self._by_node().items():
            streams = [self._streams[each] for each in indexes]
            lineages, ends = self._evaluated(node, load_script("log_end"), streams[0], name, *streams)
            for each, mine, end in zip(indexes, lineages.split(), ends.split(), strict=True):
                lineage[each], ids[each] = mine, _packed(end)
        return self.remembered(_Ends(tuple(lineage), tuple(ids)))

    def read(self, after: bytes, until: bytes, limit: int) -> Reading | None:
        """Return up to `limit` changes between two positions, the second one made here a moment ago.

        None if the log does not reach back to `after`, or if that is no position of this log.
        """
        end = self._recalled(until)
        if end is None or len(after) != len(until) or after[:16] != until[:16]:
            return None
        start = self._recalled(after) or _Ends(end.lineage, (after[16:32],) * len(end.ids))
        changes: list[Logged] = []
        ids = list(end.ids)
        for node, indexes in self._by_node().items():
            unread = [each for each in indexes if start.ids[each] < end.ids[each]]
            if not unread:
                continue
            ranges = [(self._streams[each], _text(start.ids[each]), _text(end.ids[each])) for each in unread]
            answers = self._evaluated(
                node, load_script("log_read"), ranges[0][0], limit, *(part for each in ranges for part in each)
            )
            for each, (lineage, first, entries) in zip(unread, answers, strict=True):
                if lineage != end.lineage[each] or _packed(first) > start.ids[each]:
                    return None
                if len(entries) == limit:
                    ids[each] = _packed(entries[-1][0])
                logged = _logged(each, entries)
                if logged is None:
                    return None
                changes += logged
        changes.sort()
        return Reading(self, start, _Ends(end.lineage, tuple(ids)), changes)

    def remembered(self, ends: _Ends) -> bytes:
        """Return the position of `ends`, whose ids are known from now on."""
        position = ends.position()
        with self._lock:
            self._known[position] = ends
            self._known.move_to_end(position)
            if len(self._known) > KNOWN_POSITIONS:
                self._known.popitem(last=False)
        return position

    def _recalled(self, position: bytes) -> _Ends | None:
        """Return what is known of a position, which is in use."""
        with self._lock:
            if position in self._known:
                self._known.move_to_end(position)
            return self._known.get(position)

    def _by_node(self) -> Mapping[str, Sequence[int]]:
        known_since, places = self._places
        if time.monotonic() - known_since > _PLACES_SECONDS:
            by_node = defaultdict(list)
            for each, stream in enumerate(self._streams):
                by_node[self._nodes.of(stream)].append(each)
            places = dict(by_node)
            self._places = (time.monotonic(), places)
        return places

    def _evaluated(self, node: str, script: str, key: bytes, *arguments: Any) -> Any:
        (answer,) = self._nodes.execute(node, [("EVAL", script, 1, key, *arguments)])
        if isinstance(answer, EngineError):
            if isinstance(answer, Displaced):
                self.relocate()
            raise answer
        return answer


def streams_of(prefix: bytes, *, cluster: bool) -> list[bytes]:
    """Return the keys of the streams that log the sessions whose keys begin with `prefix`."""
    slots = range(0, _SLOTS, _SLOTS // STREAMS if cluster else _SLOTS)
    return [b"%b{%b}" % (prefix, tag) for tag in _tags(slots)]


@cache  # it tries hundreds of thousands
def _tags(slots: range) -> tuple[bytes, ...]:
    """Return for each slot a tag that belongs into it."""
    wanted, number = set(slots), 0
    tags: dict[int, bytes] = {}
    while len(tags) < len(wanted):
        tag = b"%x" % number
        slot = key_slot(tag)
        if slot in wanted:
            tags.setdefault(slot, tag)
        number += 1
    return tuple(tags[slot] for slot in slots)


def _logged(stream: int, entries: Iterable[tuple[bytes, Sequence[bytes]]]) -> list[Logged] | None:
    """Return the changes among `entries`, None if one is nothing that this version writes; marks are no changes."""
    logged = []
    for id_, fields in entries:
        if len(fields) != 2 or fields[0] not in _WHAT:  # noqa: PLR2004 - a field and its value
            return None
        if fields[0] != _MARK:
            logged.append(Logged(_packed(id_), stream, *fields))
    return logged


def _packed(id_: bytes) -> bytes:
    milliseconds, _, number = id_.partition(b"-")
    return int(milliseconds).to_bytes(8, "big") + int(number).to_bytes(8, "big")


def _text(packed: bytes) -> str:
    return f"{int.from_bytes(packed[:8], 'big')}-{int.from_bytes(packed[8:], 'big')}"
