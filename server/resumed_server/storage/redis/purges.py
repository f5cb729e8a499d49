"""Purges of namespaces in a Redis, the deletion of purged sessions, and counts of what namespaces contain.

A purge sets marks: a key beside each stream of the log (see change_log.py), so that every primary of a cluster has
copies. The scripts read the mark on their own node, two copies if there are two: the slot of one may be moving to
another node. A purge is in force once all copies are set. Redis expires a mark when no session from before it can be
alive.

A mark is a time (microseconds, of Redis' clock) and an epoch, like the states of admission.py, which apply together
with it. The time rejects Puts that arrive late. A purge without a time begins a new epoch, so that it voids all
sessions that were stored before, regardless of the clocks of Redis and its replicas.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resumed_server.storage.engine import EngineUnavailable, NamespacePurged, NamespaceUsage
from resumed_server.storage.redis.admission import (
    COUNTER,
    EPOCH_DIGITS,
    MARK_DIGITS,
    TIME_DIGITS,
    state_key,
)
from resumed_server.storage.redis.script_loader import load_script
from resumed_server.storage.redis.topology import SlotsMoving

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resumed_server.storage.call_gate import CallGate
    from resumed_server.storage.redis.admission import Admission
    from resumed_server.storage.redis.change_log import ChangeLog
    from resumed_server.storage.redis.topology import RedisTopology
    from resumed_server.storage.redis.url import RedisUrl

UNKNOWN = b"?"
"""The argument for which a script reads the mark itself."""

_COUNT_BATCH = 256
_PAUSE_FACTOR = 2.0
"""Pause after each step of a count, as a multiple of the duration of the step."""
_ATTEMPTS = 5


class Purges:
    """The purges of the sessions whose keys begin with `prefix`, on `nodes`. Thread-safe."""

    def __init__(self, url: RedisUrl, nodes: RedisTopology, log: ChangeLog, admission: Admission) -> None:
        self._url, self._nodes, self._log, self._prefix = url, nodes, log, url.prefix.encode()
        self._admission = admission
        self._lock = threading.Lock()
        self._unfinished: deque[_Deletion] = deque()

    def mark_of(self, namespace: str) -> bytes:
        """Return the mark of a namespace; it sorts before every time if there is no mark."""
        stream = self._log.first_stream
        keys = state_key(stream), stream + namespace.encode()
        state, mark = self._nodes.query(self._nodes.node_for(stream), [("GET", key) for key in keys])
        return _latest(state or b"", mark or b"")

    def set(self, namespace: str, issued_before: float | None) -> tuple[float, bool]:
        """Move all marks of a namespace to a time, at most now; a mark never moves back.

        Returns:
            The time of the marks, and whether watchers may have to be notified. They do not if all marks were beyond
            the time already. A mark at exactly this time may be from a call that failed before it notified watchers.

        Raises:
            EngineUnavailable: Some marks are not set, or (with `wait_replicas`) not replicated yet.
        """
        # The latest clock of all nodes, plus 1 µs: every session that is stored already was issued before.
        now = counter = 0
        for node, streams in self._log.streams().items():
            time_of, *states = self._nodes.query(node, [("TIME",), *(("GET", state_key(stream)) for stream in streams)])
            now = max(now, int(time_of[0]) * 1_000_000 + int(time_of[1]) + 1)
            counter = max(counter, *(int(state[COUNTER]) for state in states if state), 0)
        if issued_before is None:
            mark = _digits(now, TIME_DIGITS) + _digits(max(counter + 1, now // 1_000_000), EPOCH_DIGITS)
        else:
            mark = _digits(min(now, _microseconds(issued_before)), TIME_DIGITS) + _digits(0, EPOCH_DIGITS)
        wanted, changed = mark, False
        for node, streams in self._log.streams().items():
            commands: list[tuple[Any, ...]] = [
                ("EVAL", load_script("set_purge"), 2, stream + namespace.encode(), state_key(stream), mark)
                for stream in streams
            ]
            if self._url.wait_replicas:
                commands.append(("WAIT", self._url.wait_replicas, int(self._url.timeout * 1000)))
            answers = self._nodes.query(node, commands)
            if self._url.wait_replicas and answers.pop() < self._url.wait_replicas:
                raise EngineUnavailable(
                    f"fewer than {self._url.wait_replicas} replicas of Redis have acknowledged the purge"
                )
            for answer in answers:
                changed = changed or answer[:TIME_DIGITS] <= wanted[:TIME_DIGITS]
                mark = _latest(mark, answer)
        if changed:
            with self._lock:
                self._unfinished.append(_Deletion(namespace, list(self._log.streams())))
        return _seconds(mark), changed

    def last(self, namespace: str) -> NamespacePurged | None:
        """See Engine.last_purge. A new epoch of a restarted or promoted Redis counts as a purge up to its beginning."""
        mark = state = b""
        age = math.inf
        for node, streams in self._log.streams().items():
            here, age_here, state_here = self._nodes.evaluate(node, "last_purge", 0, namespace, *streams)
            mark, state, age = _latest(mark, here), _latest(state, state_here), min(age, age_here / 1000)
        cutoff = max(_seconds(mark), _seconds(state))
        if not cutoff:
            return None
        if mark[TIME_DIGITS:] > _digits(0, EPOCH_DIGITS):  # a purge without a time
            return NamespacePurged(namespace, None, cutoff)
        (now,) = self._nodes.query(self._nodes.node_for(self._log.first_stream), [("TIME",)])
        purged_at = int(now[0]) + int(now[1]) / 1e6 - age if _seconds(mark) else cutoff
        return NamespacePurged(namespace, cutoff, purged_at)

    def delete(self, limit: int) -> int:
        """Examine about `limit` entries and delete purged sessions; return 0 when the deletion is complete.

        The process that purged a namespace deletes its sessions. If it ends earlier, Redis expires the remaining ones.
        """
        with self._lock:
            if self._admission.changed:
                self._admission.changed = False
                self._unfinished.append(_Deletion(None, list(self._log.streams())))
            if not self._unfinished:
                return 0
            deletion = self._unfinished[0]
            deletion.cursor, _ = self._scan(deletion.nodes[0], deletion.cursor, deletion.namespace, limit, deletes=True)
            if deletion.cursor == b"0":
                deletion.nodes.pop(0)
            if not deletion.nodes:
                self._unfinished.popleft()
            return limit if self._unfinished else 0

    def usage(self, namespace: str | None, gate: CallGate) -> dict[str, NamespaceUsage]:
        """See Engine. Each step is a call of its own at the gate, so that close() waits for one step only."""
        counted = {} if namespace is None else {namespace: NamespaceUsage()}
        for node in self._log.streams():
            cursor = b"0"
            while True:
                begun = time.monotonic()
                with gate:
                    cursor, found = self._scan(node, cursor, namespace, _COUNT_BATCH, deletes=False)
                for name, *numbers in zip(*[iter(found)] * 5, strict=True):
                    usage = counted.setdefault(name.decode(), NamespaceUsage())
                    usage.sessions += numbers[0]
                    usage.value_bytes += numbers[1]
                    usage.tombstones += numbers[2]
                    usage.pending_deletion += numbers[3]
                if cursor == b"0":
                    break
                time.sleep(_PAUSE_FACTOR * (time.monotonic() - begun))
        for name, usage in counted.items():
            with gate:
                usage.issued_before = _seconds(self.mark_of(name)) or None
        return counted

    def _scan(
        self, node: str, cursor: bytes, namespace: str | None, count: int, *, deletes: bool
    ) -> tuple[bytes, Sequence[Any]]:
        """Look at about `count` keys of a node; return the next cursor and the counts (see scan_namespaces.lua)."""
        pattern = _escape_pattern(self._prefix) + (
            b"[-a-z0-9.]*" if namespace is None else b"%b:*" % namespace.encode()
        )
        for _ in range(_ATTEMPTS):
            streams = self._log.streams().get(node)
            if not streams:  # it is no longer a primary
                return b"0", ()
            arguments = (cursor, pattern, count, self._prefix, int(deletes), *streams[:2])
            try:
                answer = self._nodes.evaluate(node, "scan_namespaces", 1, streams[0], *arguments)
            except SlotsMoving:
                self._log.refresh_placement()
            else:
                return answer[0], answer[1:]
        raise EngineUnavailable(f"the slots of Redis at {node} are moving")


def time_text(seconds: float) -> bytes:
    """Return a time in Unix seconds in the format of the scripts."""
    return _digits(min(_microseconds(seconds), 10**TIME_DIGITS - 1), TIME_DIGITS)


@dataclass
class _Deletion:
    """Progress of the deletion in a namespace, or (None) in all: the remaining nodes, and the cursor of the first."""

    namespace: str | None
    nodes: list[str]
    cursor: bytes = b"0"


def _escape_pattern(text: bytes) -> bytes:
    """Return a pattern that matches only `text`."""
    return b"".join(b"\\" + bytes([each]) if each in rb"*?[]^\\" else bytes([each]) for each in text)


def _latest(one: bytes, other: bytes) -> bytes:
    """Return the combination of two marks or states, like latest() of the scripts."""
    return max(one[:TIME_DIGITS], other[:TIME_DIGITS]) + max(
        one[TIME_DIGITS:MARK_DIGITS], other[TIME_DIGITS:MARK_DIGITS]
    )


def _digits(number: int, digits: int) -> bytes:
    return b"%0*d" % (digits, number)


def _microseconds(seconds: float) -> int:
    return int(seconds * 1e6)


def _seconds(mark: bytes) -> float:
    return int(mark[:TIME_DIGITS] or b"0") / 1e6
