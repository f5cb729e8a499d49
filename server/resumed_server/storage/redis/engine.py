"""The engine for Redis and Valkey: sessions in a server that any number of stateless servers share.

A session is one key, prefix + namespace + ":" + key. Its value is its issue time, the epoch in which it was stored (see
admission.py) and the value of the session; the value of a tombstone is empty. Each operation is one script, and so one
atomic step. Redis has the clock, and expires keys. Lasting removals are tombstones with an index (see removals.py).

Redis promises less than a database: it can evict tombstones, and a failover can lose the last writes (see
docs/engines.md).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any, cast

import structlog

from resumed_server.storage.call_gate import CLOSED, CallGate
from resumed_server.storage.engine import (
    AlreadyExists,
    Change,
    Engine,
    EngineError,
    EngineUnavailable,
    Get,
    Kept,
    NamespacePurged,
    NamespaceUsage,
    NoTombstone,
    Put,
    Remove,
    StorageConnections,
    StoredSession,
    StoreTotals,
    Take,
)
from resumed_server.storage.redis.admission import Admission
from resumed_server.storage.redis.change_log import PURGED, REMOVED, REMOVED_FOR, STORED, ChangeLog, streams_of
from resumed_server.storage.redis.purges import UNKNOWN, Purges, time_text
from resumed_server.storage.redis.removals import Removals, milliseconds
from resumed_server.storage.redis.script_loader import load_script
from resumed_server.storage.redis.topology import READERS, SlotsMoving, UnusableServer, connect

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from resumed_server.storage.engine import Operation, Outcome
    from resumed_server.storage.redis.change_log import LoggedChange
    from resumed_server.storage.redis.url import RedisUrl


class _GetIssued(Get):
    """Look a session up for a reader of the log. Outcome: the session with its issue time, or None."""

    __slots__ = ()


class _GetRemoval(Get):
    """Look a tombstone up for a reader of the log. Outcome: the seconds for which it stays, or None."""

    __slots__ = ()


_SCRIPTS: Mapping[type[Operation], str] = {
    Get: "get",
    _GetIssued: "get_issued",
    _GetRemoval: "get_removal",
    Put: "put",
    Take: "take",
    Remove: "remove",
}
"""The script of each operation; a script is one atomic step."""
_CHANGES_BYTES = 1 << 20
_READ_BATCH, _LOOK_UP_BATCH = 256, 32
"""Limits of changes and of look-ups in one command or pipeline, since look-ups of handshakes wait for it."""
_OLDEST = 7
"""The first version of Redis whose scripts have flags. Every Valkey reports a redis_version of 7."""

_log = structlog.get_logger()


class RedisEngine(Engine):
    """Storage in a Redis or Valkey.

    Args:
        url: The address of Redis. A Redis that is unreachable now is no error; probe() reports when it answers.
        threads: The number of threads that call the engine at the same time.

    Raises:
        ValueError: A file that the URL names cannot be read.
        EngineUnavailable: Redis answers, but cannot be used; the message gives the cause and the remedy.
    """

    def __init__(self, url: RedisUrl, *, threads: int) -> None:
        self._url, self._prefix = url, url.prefix.encode()
        cluster = url.topology == "cluster"
        streams = streams_of(self._prefix, cluster=cluster)
        self._scripts = {kind: load_script(name, cluster=cluster) for kind, name in _SCRIPTS.items()}
        self._admission = Admission(streams, self._scripts.values(), cluster=cluster)
        self._nodes = connect(url, threads, self._admission)
        self._log = ChangeLog(self._nodes, streams)
        self._purges = Purges(url, self._nodes, self._log, self._admission)
        self._removals = Removals(self._nodes, self._log)
        self._gate = CallGate()
        # After a restart of this server, all its watchers catch up at once, and look-ups need connections as well.
        self._readers = threading.Semaphore(READERS)
        self._warned = False
        try:
            self.probe()
        except UnusableServer:
            self.close()
            raise
        except EngineUnavailable as error:
            _log.warning("storage not reached yet", cause=str(error))

    def put(
        self,
        namespace: str,
        key: bytes,
        value: bytes,
        ttl: float,
        issued_at: float | None = None,
        *,
        pinned: bool = False,
    ) -> float:
        """See Engine. Redis has one policy of eviction for all keys, so a pinned session is stored as any other."""
        return cast("float", self._carry_out(Put(namespace, key, value, ttl, issued_at, pinned)))

    def get(self, namespace: str, key: bytes) -> StoredSession | None:
        """See Engine."""
        return cast("StoredSession | None", self._carry_out(Get(namespace, key)))

    def take(self, namespace: str, key: bytes) -> StoredSession | None:
        """See Engine."""
        return cast("StoredSession | None", self._carry_out(Take(namespace, key)))

    def remove(self, namespace: str, key: bytes, *, ttl: float | None = None, tombstone: bool = True) -> bool | None:
        """See Engine."""
        return cast("bool | None", self._carry_out(Remove(namespace, key, ttl, tombstone)))

    def batch(self, operations: Sequence[Operation]) -> list[Outcome]:
        """See Engine. The operations are one pipeline to each node that has any of the keys."""
        with self._gate:
            return self._batch(operations)

    def sweep(self, limit: int) -> int:
        """See Engine. Redis expires keys itself."""
        with self._gate:
            swept = self._purges.delete(limit)
            self._removals.trim()
            return swept

    def purge(self, namespace: str, issued_before: float | None) -> float:
        """See Engine."""
        with self._gate:
            mark, changed = self._purges.set(namespace, issued_before)
            if changed:  # without a change, or mirrors would search their sessions in vain
                # Only after the marks are set, or a mirror could look the purged sessions up again.
                told = b"" if issued_before is None else time_text(min(issued_before, mark))
                self._log.append([(self._key(Get(namespace, told)), PURGED)])
            return mark

    def removals(self, namespace: str, limit: int) -> Iterator[list[Change]]:
        """See Engine."""
        for part in self._removals.read(namespace, limit, self._gate):
            yield [Change(*self._address(key), None, ttl) for key, ttl in part]

    def last_purge(self, namespace: str) -> NamespacePurged | None:
        """See Engine."""
        with self._gate:
            return self._purges.last(namespace)

    def usage(self, namespace: str | None) -> dict[str, NamespaceUsage]:
        """See Engine."""
        return self._purges.usage(namespace, self._gate)

    def position(self) -> bytes:
        """See Engine."""
        with self._gate:
            return self._log.position()

    def changes(
        self, after: bytes, until: bytes, limit: int, *, removals_only: bool = False
    ) -> tuple[list[Change | NamespacePurged], bytes] | None:
        """See Engine."""
        limit = min(limit, _READ_BATCH)
        with self._readers, self._gate:
            reading = self._log.read(after, until, limit)
            if reading is None:
                return None
            changes: list[Change | NamespacePurged] = []
            count = size = 0
            while count < min(limit, len(reading.changes)) and size < _CHANGES_BYTES:
                part = reading.changes[count : min(limit, count + _LOOK_UP_BATCH)]
                for change in self._changes([each for each in part if not (removals_only and each.what == STORED)]):
                    changes.append(change)
                    size += len(change.session.value) if isinstance(change, Change) and change.session else 0
                count += len(part)
            return changes, reading.position_after(count)

    def totals(self) -> StoreTotals:
        """See Engine. Redis counts all keys of the database."""
        usage = StoreTotals(0, 0)
        with self._gate:
            for node in self._nodes.primaries():
                info = self._nodes.info(node)
                usage.sessions += info.get(f"db{self._url.database}", {}).get("keys", 0)
                usage.bytes += info.get("used_memory", 0)
                usage.evicted += info.get("evicted_keys", 0)
        return usage

    def connections(self) -> StorageConnections:
        """See Engine."""
        return StorageConnections(*self._nodes.connections(), opened=self._admission.count)

    def probe(self) -> None:
        """See Engine. A cluster can serve as long as one of its primaries can."""
        failure = EngineUnavailable(f"Redis at {self._nodes.name} has no primaries")
        with self._gate:
            for node in self._nodes.primaries():
                try:
                    self._verify(self._nodes.info(node))
                    # Fails if the node refuses scripts that may write, as those of all operations.
                    self._nodes.evaluate(node, "probe", 0)
                except EngineUnavailable as error:
                    failure = error
                else:
                    return
        raise failure

    def close(self) -> None:
        """See Engine."""
        if self._gate.close(CLOSED) != CLOSED:
            self._gate.wait_until_empty()  # a call that still runs fails
            self._nodes.close()

    def _carry_out(self, operation: Operation) -> Outcome:
        with self._gate:
            (outcome,) = self._carry_out_on(self._nodes.node_for(self._key(operation)), [operation])
        if isinstance(outcome, EngineError):
            raise outcome
        return outcome

    def _batch(self, operations: Sequence[Operation]) -> list[Outcome]:
        outcomes: list[Outcome] = [None] * len(operations)
        by_node: defaultdict[str, list[int]] = defaultdict(list)
        for position, operation in enumerate(operations):
            try:
                by_node[self._nodes.node_for(self._key(operation))].append(position)
            except EngineError as error:
                outcomes[position] = error
        for node, positions in by_node.items():
            done = self._carry_out_on(node, [operations[position] for position in positions])
            for position, outcome in zip(positions, done, strict=True):
                outcomes[position] = outcome
        if outcomes and all(isinstance(outcome, EngineUnavailable) and not outcome.done for outcome in outcomes):
            raise cast("EngineUnavailable", outcomes[0])
        return outcomes

    def _changes(self, logged: Sequence[LoggedChange]) -> Iterator[Change | NamespacePurged]:
        """Yield changes with what is there now: sessions, and the time left of lasting removals.

        Stored sessions that are gone by now are omitted.
        """
        look_ups = {STORED: _GetIssued, REMOVED_FOR: _GetRemoval}
        addresses = [self._address(each.key) for each in logged]
        found = iter(
            self._batch(
                [
                    look_ups[each.what](*address)
                    for each, address in zip(logged, addresses, strict=True)
                    if each.what in look_ups
                ]
            )
        )
        for each, address in zip(logged, addresses, strict=True):
            there = next(found) if each.what in look_ups else None
            if isinstance(there, EngineError):
                raise there
            if each.what == PURGED:
                yield NamespacePurged(address[0], int(address[1]) / 1e6 if address[1] else None, each.time)
            elif isinstance(there, StoredSession):
                yield Change(*address, there)
            elif each.what != STORED:
                yield Change(*address, None, cast("float | None", there))

    def _carry_out_on(self, node: str, operations: Sequence[Operation]) -> list[Outcome]:
        """Carry out operations on keys of one node."""
        try:
            outcomes = self._attempt(node, operations, self._log.log_arguments(node))
        except EngineError as error:
            return [error] * len(operations)
        displaced = [each for each, outcome in enumerate(outcomes) if isinstance(outcome, SlotsMoving)]
        if displaced:
            done = self._carry_out_logged_elsewhere(node, [operations[each] for each in displaced])
            for each, outcome in zip(displaced, done, strict=True):
                outcomes[each] = outcome
        return outcomes

    def _carry_out_logged_elsewhere(self, node: str, operations: Sequence[Operation]) -> list[Outcome]:
        """Carry out operations on a node that has no stream of the log now, since slots are moving.

        The changes are logged on another node twice: before, so that a crash loses no removal; and after, since a
        reader could look the session up in between. Lasting removals are added to the index on another node.
        """
        changes = [(self._key(each), _kind(each)) for each in operations if not isinstance(each, Get)]
        try:
            self._log.refresh_placement()
            for each in operations:
                if isinstance(each, Remove) and each.ttl is not None:
                    self._removals.add(each.namespace, self._key(each), each.ttl)
            self._log.append(changes)
            marks = {
                namespace: self._purges.mark_of(namespace) for namespace in {each.namespace for each in operations}
            }
            outcomes = self._attempt(node, operations, (), marks)
            self._log.append(changes)
        except EngineError as error:
            return [error] * len(operations)
        return outcomes

    def _attempt(
        self, node: str, operations: Sequence[Operation], log: Sequence[Any], marks: Mapping[str, bytes] | None = None
    ) -> list[Outcome]:
        """Carry out operations and log them with the arguments `log`; raise EngineError if none was carried out.

        `marks` has the marks of the namespaces if `log` has no streams from which the scripts could read them.
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
                f"fewer than {self._url.wait_replicas} replicas of Redis have acknowledged the tombstone"
            )
            missing.done = True
            return [missing if _left_tombstone(*done) else done[1] for done in zip(operations, outcomes, strict=True)]
        return outcomes

    def _key(self, operation: Operation) -> bytes:
        return b"%b%b:%b" % (self._prefix, operation.namespace.encode(), operation.key)

    def _address(self, key: bytes) -> tuple[str, bytes]:
        namespace, _, rest = key[len(self._prefix) :].partition(b":")
        return namespace.decode(), rest

    def _command(self, operation: Operation, log: Sequence[Any], mark: bytes) -> tuple[Any, ...]:
        command = ("EVAL", self._scripts[type(operation)], 1, self._key(operation), operation.namespace, mark)
        if isinstance(operation, Put):
            issued = b"" if operation.issued_at is None else time_text(operation.issued_at)
            return (*command, operation.value, int(operation.ttl * 1000), issued, *log)
        if isinstance(operation, Remove):
            if operation.ttl is not None:
                self._removals.will_change(operation.namespace)
            return (*command, int(operation.tombstone), milliseconds(operation.ttl or 0.0), *log)
        return (*command, *log)

    def _verify(self, info: Mapping[str, Any]) -> None:
        """Raise EngineUnavailable if a server with this INFO cannot be used."""
        name, version = self._nodes.name, str(info.get("redis_version", "0"))
        if int(version.partition(".")[0]) < _OLDEST:
            raise UnusableServer(f"Redis at {name} is too old ({version}); use Redis 7, Valkey 8, or newer")
        if "sentinel" in {info.get("redis_mode"), info.get("server_mode")}:
            raise UnusableServer(f"{name} is a Sentinel; use redis+sentinel://")
        if info.get("cluster_enabled") and self._url.topology != "cluster":
            raise UnusableServer(f"Redis at {name} is a node of a cluster; use redis+cluster://")
        if info.get("role") != "master":
            self._nodes.reconnect()
            raise self._nodes.replica_error(name)
        policy = info.get("maxmemory_policy")
        if info.get("maxmemory") and policy != "noeviction" and not self._warned:
            self._warned = True
            _log.warning(
                "Redis may evict tombstones, and late Puts restore removed sessions; set maxmemory-policy noeviction",
                policy=policy,
            )


def _kind(operation: Operation) -> bytes:
    """Return the kind of change that an operation makes."""
    if isinstance(operation, Put):
        return STORED
    return REMOVED_FOR if isinstance(operation, Remove) and operation.ttl is not None else REMOVED


def _outcome(operation: Operation, answer: Any) -> Outcome:  # noqa: PLR0911 - a table
    """Return the outcome of an operation from the answer of its script."""
    if isinstance(answer, EngineError):
        return answer
    if isinstance(operation, _GetRemoval):
        return answer / 1000 if answer else None
    if isinstance(operation, Put):
        if isinstance(answer, list):
            return Kept(answer[0] / 1000)
        return AlreadyExists() if answer < 0 else answer / 1000
    if isinstance(operation, Remove):
        return NoTombstone() if answer == -1 else None if answer is None else bool(answer)
    if answer is None or answer[1] <= 0:
        return None
    session = StoredSession(answer[0], answer[1] / 1000)
    if isinstance(operation, _GetIssued):
        session.issued_at = int(answer[2]) / 1e6
    return session


def _left_tombstone(operation: Operation, outcome: Outcome) -> bool:
    """Return whether an operation left a tombstone, or may have."""
    if isinstance(operation, Remove):
        return not isinstance(outcome, NoTombstone)
    return isinstance(operation, Take) and outcome is not None
