"""Redis and Valkey: sessions in a server that the fleet already runs, shared by any number of stateless replicas.

A session is one key, prefix + namespace + ":" + key; its value is the time of its issue, the epoch in which it was
stored (see redis_admission.py) and the session's own, or nothing at all in a tombstone. What an operation does to it is
one script, and so one atomic step. Redis keeps the time and lets keys expire.

Redis promises less than a database: where it evicts keys, tombstones can go, and a failover can lose the last writes
(see docs/engines.md).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any, cast

import structlog

from resumed_server.storage.call_gate import CLOSED, Gate
from resumed_server.storage.engine import (
    AlreadyExists,
    Change,
    Engine,
    EngineError,
    EngineUnavailable,
    Get,
    Kept,
    NoTombstone,
    Purged,
    Put,
    Remove,
    StoredSession,
    Take,
    Totals,
    Usage,
)
from resumed_server.storage.redis.admission import Admission
from resumed_server.storage.redis.change_log import PURGED, REMOVED, STORED, ChangeLog, streams_of
from resumed_server.storage.redis.purges import UNKNOWN, Purges, time_text
from resumed_server.storage.redis.script_loader import load_script
from resumed_server.storage.redis.topology import READERS, Displaced, Unsuitable, connected

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from resumed_server.storage.engine import Operation, Outcome
    from resumed_server.storage.redis.change_log import Logged
    from resumed_server.storage.redis.url import RedisUrl


class _Look(Get):
    """Look a session up for those who follow the log: its outcome says when it was issued, too."""

    __slots__ = ()


_SCRIPTS: Mapping[type[Operation], str] = {
    Get: "get",
    _Look: "get_issued",
    Put: "put",
    Take: "take",
    Remove: "remove",
}
"""The script of each operation; a script is one atomic step."""
_CHANGES_BYTES = 1 << 20
_READ_AT_ONCE, _LOOKED_UP_AT_ONCE = 256, 32
"""Changes that are read, and sessions that are looked up, in one go: look-ups of handshakes wait behind those."""
_OLDEST = 7
"""The first version of Redis whose scripts have flags. Every Valkey claims to be a Redis 7."""

_log = structlog.get_logger()


class RedisEngine(Engine):
    """Keeps sessions in a Redis or Valkey.

    Args:
        url: Where it is. One that cannot be reached yet is no error: probe() tells when it can.
        threads: How many call the engine at the same time.

    Raises:
        ValueError: A file that the URL names cannot be read.
        EngineUnavailable: It answers, but cannot be used; the message says why and what to do.
    """

    def __init__(self, url: RedisUrl, *, threads: int) -> None:
        self._url, self._prefix = url, url.prefix.encode()
        cluster = url.topology == "cluster"
        streams = streams_of(self._prefix, cluster=cluster)
        self._scripts = {kind: load_script(name, cluster=cluster) for kind, name in _SCRIPTS.items()}
        admission = Admission(streams, self._scripts.values(), cluster=cluster)
        self._nodes = connected(url, threads, admission)
        self._log = ChangeLog(self._nodes, streams)
        self._purges = Purges(url, self._nodes, self._log, admission)
        self._gate = Gate()
        # When a server was started again, all its watchers come back at once, and look-ups need connections as well.
        self._readers = threading.Semaphore(READERS)
        self._warned = False
        try:
            self.probe()
        except Unsuitable:
            self.close()
            raise
        except EngineUnavailable as error:
            _log.warning("storage not reached yet", cause=str(error))

    def put(self, namespace: str, key: bytes, value: bytes, ttl: float, issued: float | None = None) -> float:
        """See Engine."""
        return cast("float", self._carry_out(Put(namespace, key, value, ttl, issued)))

    def get(self, namespace: str, key: bytes) -> StoredSession | None:
        """See Engine."""
        return cast("StoredSession | None", self._carry_out(Get(namespace, key)))

    def take(self, namespace: str, key: bytes) -> StoredSession | None:
        """See Engine."""
        return cast("StoredSession | None", self._carry_out(Take(namespace, key)))

    def remove(self, namespace: str, key: bytes, *, tombstone: bool = True) -> bool | None:
        """See Engine."""
        return cast("bool | None", self._carry_out(Remove(namespace, key, tombstone)))

    def batch(self, operations: Sequence[Operation]) -> list[Outcome]:
        """See Engine. Here it is one pipeline to each node that has any of the keys."""
        with self._gate:
            return self._batch(operations)

    def sweep(self, limit: int) -> int:
        """See Engine. Redis expires keys itself."""
        with self._gate:
            return self._purges.delete(limit)

    def purge(self, namespace: str, issued_before: float | None) -> float:
        """See Engine."""
        with self._gate:
            mark, changed = self._purges.set(namespace, issued_before)
            if changed:  # or mirrors would look through what they have for nothing
                # Now that no look-up finds what was purged, or a mirror would learn of it again.
                told = b"" if issued_before is None else time_text(min(issued_before, mark))
                self._log.append([(self._key(Get(namespace, told)), PURGED)])
            return mark

    def usage(self, namespace: str | None) -> dict[str, Usage]:
        """See Engine."""
        return self._purges.usage(namespace, self._gate)

    def position(self) -> bytes:
        """See Engine."""
        with self._gate:
            return self._log.position()

    def changes(self, after: bytes, until: bytes, limit: int) -> tuple[list[Change | Purged], bytes] | None:
        """See Engine."""
        limit = min(limit, _READ_AT_ONCE)
        with self._readers, self._gate:
            reading = self._log.read(after, until, limit)
            if reading is None:
                return None
            changes: list[Change | Purged] = []
            count = size = 0
            while count < min(limit, len(reading.changes)) and size < _CHANGES_BYTES:
                part = reading.changes[count : min(limit, count + _LOOKED_UP_AT_ONCE)]
                for change in self._changes(part):
                    changes.append(change)
                    size += len(change.session.value) if isinstance(change, Change) and change.session else 0
                count += len(part)
            return changes, reading.behind(count)

    def totals(self) -> Totals:
        """See Engine. Redis counts keys by database, not by what they are."""
        usage = Totals(0, 0)
        with self._gate:
            for _, ask in self._nodes.infos():
                info = ask()
                usage.sessions += info.get(f"db{self._url.database}", {}).get("keys", 0)
                usage.bytes += info.get("used_memory", 0)
                usage.evicted += info.get("evicted_keys", 0)
        return usage

    def probe(self) -> None:
        """See Engine. A cluster can serve as long as one of its primaries can."""
        failure = EngineUnavailable(f"Redis at {self._nodes.name} has no primaries")
        with self._gate:
            for node, ask in self._nodes.infos():
                try:
                    self._verify(ask())
                    return self._verify_writable(node)
                except EngineUnavailable as error:
                    failure = error
        raise failure

    def close(self) -> None:
        """See Engine."""
        if self._gate.shut(CLOSED) != CLOSED:
            self._gate.wait_until_empty()  # a call that goes on fails
            self._nodes.close()

    def _carry_out(self, operation: Operation) -> Outcome:
        with self._gate:
            (outcome,) = self._carry_out_on(self._nodes.of(self._key(operation)), [operation])
        if isinstance(outcome, EngineError):
            raise outcome
        return outcome

    def _batch(self, operations: Sequence[Operation]) -> list[Outcome]:
        outcomes: list[Outcome] = [None] * len(operations)
        by_node: defaultdict[str, list[int]] = defaultdict(list)
        for position, operation in enumerate(operations):
            try:
                by_node[self._nodes.of(self._key(operation))].append(position)
            except EngineError as error:
                outcomes[position] = error
        for node, positions in by_node.items():
            done = self._carry_out_on(node, [operations[position] for position in positions])
            for position, outcome in zip(positions, done, strict=True):
                outcomes[position] = outcome
        if outcomes and all(isinstance(outcome, EngineUnavailable) and not outcome.done for outcome in outcomes):
            raise cast("EngineUnavailable", outcomes[0])
        return outcomes

    def _changes(self, logged: Sequence[Logged]) -> Iterator[Change | Purged]:
        """Yield changes with the sessions that are there by now; what was stored and is gone is none."""
        addresses = [self._address(each.key) for each in logged]
        stored = [address for each, address in zip(logged, addresses, strict=True) if each.what == STORED]
        sessions = iter(self._batch([_Look(*address) for address in stored]))
        for each, address in zip(logged, addresses, strict=True):
            if each.what == PURGED:
                yield Purged(address[0], int(address[1]) / 1e6 if address[1] else None)
                continue
            session = next(sessions) if each.what == STORED else None
            if isinstance(session, EngineError):
                raise session
            if each.what == REMOVED or session:
                yield Change(*address, cast("StoredSession | None", session))

    def _carry_out_on(self, node: str, operations: Sequence[Operation]) -> list[Outcome]:
        """Carry out operations on keys of one node."""
        try:
            outcomes = self._attempt(node, operations, self._log.arguments(node))
        except EngineError as error:
            return [error] * len(operations)
        displaced = [each for each, outcome in enumerate(outcomes) if isinstance(outcome, Displaced)]
        if displaced:
            done = self._carry_out_apart(node, [operations[each] for each in displaced])
            for each, outcome in zip(displaced, done, strict=True):
                outcomes[each] = outcome
        return outcomes

    def _carry_out_apart(self, node: str, operations: Sequence[Operation]) -> list[Outcome]:
        """Carry out operations on a node that has no part of the log just now, as slots are moving.

        They are logged elsewhere: before, or a crash could keep a removal untold; and after, or a reader could look the
        session up in between. Only both together lose one.
        """
        changes = [
            (self._key(each), STORED if isinstance(each, Put) else REMOVED)
            for each in operations
            if not isinstance(each, Get)
        ]
        try:
            self._log.relocate()
            self._log.append(changes)
            marks = {namespace: self._purges.known(namespace) for namespace in {each.namespace for each in operations}}
            outcomes = self._attempt(node, operations, (), marks)
            self._log.append(changes)
        except EngineError as error:
            return [error] * len(operations)
        return outcomes

    def _attempt(
        self, node: str, operations: Sequence[Operation], log: Sequence[Any], marks: Mapping[str, bytes] | None = None
    ) -> list[Outcome]:
        """Carry out operations, logged as the arguments `log` say; raise EngineError if none was carried out.

        `marks` tell of purges that the arguments `log` do not lead to.
        """
        commands = [self._command(each, log, marks[each.namespace] if marks else UNKNOWN) for each in operations]
        waits = self._url.wait_replicas and any(isinstance(each, Take | Remove) for each in operations)
        if waits:
            commands.append(("WAIT", self._url.wait_replicas, int(self._url.timeout * 1000)))
        answers = self._nodes.execute(node, commands)
        replicas = answers.pop() if waits else 0
        outcomes = list(map(_outcome, operations, answers))
        if waits and (isinstance(replicas, EngineError) or replicas < self._url.wait_replicas):
            missing = EngineUnavailable(
                f"not all of {self._url.wait_replicas} replicas of Redis have the tombstone yet"
            )
            missing.done = True
            return [missing if _buried(*done) else done[1] for done in zip(operations, outcomes, strict=True)]
        return outcomes

    def _key(self, operation: Operation) -> bytes:
        return b"%b%b:%b" % (self._prefix, operation.namespace.encode(), operation.key)

    def _address(self, key: bytes) -> tuple[str, bytes]:
        namespace, _, rest = key[len(self._prefix) :].partition(b":")
        return namespace.decode(), rest

    def _command(self, operation: Operation, log: Sequence[Any], mark: bytes) -> tuple[Any, ...]:
        command = ("EVAL", self._scripts[type(operation)], 1, self._key(operation), operation.namespace, mark)
        if isinstance(operation, Put):
            issued = b"" if operation.issued is None else time_text(operation.issued)
            return (*command, operation.value, int(operation.ttl * 1000), issued, *log)
        if isinstance(operation, Remove):
            return (*command, int(operation.tombstone), *log)
        return (*command, *log)

    def _verify_writable(self, node: str) -> None:
        """Raise EngineUnavailable if a node carries no scripts out that write, as those of all operations."""
        (answer,) = self._nodes.execute(node, [("EVAL", load_script("probe"), 0)])
        if isinstance(answer, EngineError):
            raise answer

    def _verify(self, info: Mapping[str, Any]) -> None:
        """Raise EngineUnavailable if a server that says `info` of itself cannot be the store."""
        name, version = self._nodes.name, str(info.get("redis_version", "0"))
        if int(version.partition(".")[0]) < _OLDEST:
            raise Unsuitable(f"Redis at {name} is too old ({version}); use Redis 7, Valkey 8, or newer")
        if "sentinel" in {info.get("redis_mode"), info.get("server_mode")}:
            raise Unsuitable(f"{name} is a Sentinel; use redis+sentinel://")
        if info.get("cluster_enabled") and self._url.topology != "cluster":
            raise Unsuitable(f"Redis at {name} is a node of a cluster; use redis+cluster://")
        if info.get("role") != "master":
            self._nodes.reconnect()
            raise self._nodes.read_only(name)
        policy = info.get("maxmemory_policy")
        if info.get("maxmemory") and policy != "noeviction" and not self._warned:
            self._warned = True
            _log.warning(
                "Redis may evict tombstones, and so forget what was removed or taken; set maxmemory-policy noeviction",
                policy=policy,
            )


def _outcome(operation: Operation, answer: Any) -> Outcome:
    """Return what the answer of its script says of an operation."""
    if isinstance(answer, EngineError):
        return answer
    if isinstance(operation, Put):
        if isinstance(answer, list):
            return Kept(answer[0] / 1000)
        return AlreadyExists() if answer < 0 else answer / 1000
    if isinstance(operation, Remove):
        return NoTombstone() if answer == -1 else None if answer is None else bool(answer)
    if answer is None or answer[1] <= 0:
        return None
    session = StoredSession(answer[0], answer[1] / 1000)
    if isinstance(operation, _Look):
        session.issued = int(answer[2]) / 1e6
    return session


def _buried(operation: Operation, outcome: Outcome) -> bool:
    """Return whether an operation has just left a tombstone, or may have."""
    if isinstance(operation, Remove):
        return not isinstance(outcome, NoTombstone)
    return isinstance(operation, Take) and outcome is not None
