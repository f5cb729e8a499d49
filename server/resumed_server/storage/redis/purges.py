"""Which namespaces of a Redis were purged and up to what time; what there is of them; deletes what was purged.

A purge is a mark: a key beside each stream of the log (see redis_log.py), so that every primary of a cluster has some.
The scripts read a mark on their own node, two where there are two: one may be on its way to another node. A purge is in
force once all are set. Redis forgets a mark when no session from before it can be alive any more.

A mark is a time (microseconds, as Redis counts them) and an epoch, as the states of redis_admission.py are, which count
together with it. The time is for what arrives late; a purge of all that is there begins an epoch, so that what was
stored before is gone whatever the clocks of Redis and of its replicas say.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resumed_server.storage.engine import EngineError, EngineUnavailable, Usage
from resumed_server.storage.redis.admission import (
    COUNTER,
    EPOCH_DIGITS,
    MARK_DIGITS,
    TIME_DIGITS,
    state_key,
)
from resumed_server.storage.redis.script_loader import load_script
from resumed_server.storage.redis.topology import Displaced

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resumed_server.storage.call_gate import Gate
    from resumed_server.storage.redis.admission import Admission
    from resumed_server.storage.redis.change_log import ChangeLog
    from resumed_server.storage.redis.topology import Nodes
    from resumed_server.storage.redis.url import RedisUrl

UNKNOWN = b"?"
"""Has a script read the mark itself."""

_COUNTED_AT_ONCE = 256
_REST = 2.0
"""How many times as long as a step of counting takes it rests."""
_ATTEMPTS = 5


class Purges:
    """The purges of the sessions whose keys begin with `prefix`, on `nodes`. Thread-safe."""

    def __init__(self, url: RedisUrl, nodes: Nodes, log: ChangeLog, admission: Admission) -> None:
        self._url, self._nodes, self._log, self._prefix = url, nodes, log, url.prefix.encode()
        self._admission = admission
        self._lock = threading.Lock()
        self._unfinished: deque[_Deletion] = deque()

    def known(self, namespace: str) -> bytes:
        """Return the mark of a namespace, from wherever it is; it sorts before every time if there is none."""
        stream = self._log.first_stream
        keys = state_key(stream), stream + namespace.encode()
        state, mark = self._executed(self._nodes.of(stream), [("GET", key) for key in keys])
        return _latest(state or b"", mark or b"")

    def set(self, namespace: str, issued_before: float | None) -> tuple[float, bool]:
        """Set all marks of a namespace to a time, now at the latest, but never back.

        Returns:
            Where they are, and whether that may be news. It is not if all were beyond the time already; one that was
            at the very time may be left of a call that failed before anybody was told.

        Raises:
            EngineUnavailable: Not all are set, or (with `wait_replicas`) replicas do not have them yet.
        """
        # Of all the nodes' clocks the latest: what any of them has stored was issued before. And what was stored in
        # this very microsecond was stored before.
        now = counter = 0
        for node, streams in self._log.streams().items():
            time_of, *states = self._executed(node, [("TIME",), *(("GET", state_key(stream)) for stream in streams)])
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
            answers = self._executed(node, commands)
            if self._url.wait_replicas and answers.pop() < self._url.wait_replicas:
                raise EngineUnavailable(f"not all of {self._url.wait_replicas} replicas of Redis know of the purge yet")
            for answer in answers:
                changed = changed or answer[:TIME_DIGITS] <= wanted[:TIME_DIGITS]
                mark = _latest(mark, answer)
        if changed:
            with self._lock:
                self._unfinished.append(_Deletion(namespace, list(self._log.streams())))
        return _seconds(mark), changed

    def delete(self, limit: int) -> int:
        """Look for about `limit` sessions that were purged, and delete those; return 0 if there is nothing left to do.

        The process that purged a namespace does it; if that ends before, what is left goes when it expires.
        """
        with self._lock:
            if self._admission.changed:
                self._admission.changed = False
                self._unfinished.append(_Deletion(None, list(self._log.streams())))
            if not self._unfinished:
                return 0
            deletion = self._unfinished[0]
            deletion.cursor, _ = self._look(deletion.nodes[0], deletion.cursor, deletion.namespace, limit, deletes=True)
            if deletion.cursor == b"0":
                deletion.nodes.pop(0)
            if not deletion.nodes:
                self._unfinished.popleft()
            return limit if self._unfinished else 0

    def usage(self, namespace: str | None, gate: Gate) -> dict[str, Usage]:
        """Count what there is; see Engine. Passes the gate for each step: whoever closes the engine need not wait."""
        counted = {} if namespace is None else {namespace: Usage()}
        for node in self._log.streams():
            cursor = b"0"
            while True:
                begun = time.monotonic()
                with gate:
                    cursor, found = self._look(node, cursor, namespace, _COUNTED_AT_ONCE, deletes=False)
                for name, *numbers in zip(*[iter(found)] * 5, strict=True):
                    usage = counted.setdefault(name.decode(), Usage())
                    usage.sessions += numbers[0]
                    usage.value_bytes += numbers[1]
                    usage.tombstones += numbers[2]
                    usage.purged += numbers[3]
                if cursor == b"0":
                    break
                time.sleep(_REST * (time.monotonic() - begun))
        for name, usage in counted.items():
            with gate:
                usage.issued_before = _seconds(self.known(name)) or None
        return counted

    def _look(
        self, node: str, cursor: bytes, namespace: str | None, count: int, *, deletes: bool
    ) -> tuple[bytes, Sequence[Any]]:
        """Look at about `count` keys of a node; return the next cursor and the counts (see scan_namespaces.lua)."""
        pattern = _escaped(self._prefix) + (b"[-a-z0-9.]*" if namespace is None else b"%b:*" % namespace.encode())
        for _ in range(_ATTEMPTS):
            streams = self._log.streams().get(node)
            if not streams:  # a primary no more
                return b"0", ()
            arguments = (cursor, pattern, count, self._prefix, int(deletes), *streams[:2])
            try:
                (answer,) = self._executed(node, [("EVAL", load_script("scan_namespaces"), 1, streams[0], *arguments)])
            except Displaced:
                self._log.relocate()
            else:
                return answer[0], answer[1:]
        raise EngineUnavailable(f"the slots of Redis at {node} are moving")

    def _executed(self, node: str, commands: Sequence[Sequence[Any]]) -> list[Any]:
        answers = self._nodes.execute(node, commands)
        for answer in answers:
            if isinstance(answer, EngineError):
                raise answer
        return answers


def time_text(seconds: float) -> bytes:
    """Return a time in Unix seconds as the scripts have it."""
    return _digits(min(_microseconds(seconds), 10**TIME_DIGITS - 1), TIME_DIGITS)


@dataclass
class _Deletion:
    """How far what was purged of a namespace, or (None) of all, has been deleted: the nodes to look at, and where."""

    namespace: str | None
    nodes: list[str]
    cursor: bytes = b"0"


def _escaped(text: bytes) -> bytes:
    """Return `text` as a pattern that matches it alone."""
    return b"".join(b"\\" + bytes([each]) if each in rb"*?[]^\\" else bytes([each]) for each in text)


def _latest(one: bytes, other: bytes) -> bytes:
    """Return the mark that two of them, or of states, make together; as latest() of the scripts does."""
    return max(one[:TIME_DIGITS], other[:TIME_DIGITS]) + max(
        one[TIME_DIGITS:MARK_DIGITS], other[TIME_DIGITS:MARK_DIGITS]
    )


def _digits(number: int, digits: int) -> bytes:
    return b"%0*d" % (digits, number)


def _microseconds(seconds: float) -> int:
    return int(seconds * 1e6)


def _seconds(mark: bytes) -> float:
    return int(mark[:TIME_DIGITS] or b"0") / 1e6
