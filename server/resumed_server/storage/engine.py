"""The interface of a storage engine, its errors, and the operations of a batch.

Threat: with the fleet key, the values of an engine decrypt or hijack TLS connections. So an engine treats values as
opaque bytes, never logs keys or values, and never returns a session that was removed, taken or purged. Relief: a lost
entry is harmless, since the client then makes a full handshake. So an engine may lose a live session (when it is full,
restarted or failed over), but must never restore a removed one, and `take` must return a session to at most one caller.

Engines do not depend on gRPC and check no limits: namespaces, keys, values and times to live arrive valid. Every engine
passes `resumed_server.storage.testing`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from resumed_server.errors import OutsideFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

UNKNOWN_TOMBSTONE_SECONDS = 60.0
"""How long a key refuses a Put after a Remove found no session there."""
LONGEST_TTL_SECONDS = 7 * 24 * 3600.0
"""The maximum lifetime of a session (RFC 8446 section 4.6.1), and so the time that a purge must be remembered for."""


class EngineError(OutsideFailure):
    """The engine failed; the message is for the log and carries no key and no value."""


class EngineUnavailable(EngineError):
    """The storage does not answer now; a later retry may succeed.

    Attributes:
        done: Whether the operation took effect all the same, but is not replicated as required.
    """

    done = False


class EngineBroken(EngineUnavailable):
    """This engine is closed or damaged and will never answer again. A newly opened engine may."""


class EngineFull(EngineError):
    """There is no room for the session, even after eviction of the sessions that expire first."""


class NoTombstone(EngineError):
    """A Remove found no session, and was not allowed to create a tombstone; it changed nothing."""


class AlreadyExists(EngineError):
    """The key holds another value, or its session was removed, taken or purged."""


@dataclass(slots=True)
class StoredSession:
    """A live session: its value, and its remaining lifetime in seconds (above zero)."""

    value: bytes
    ttl: float
    issued_at: float | None = field(default=None, compare=False)
    """The issue time in Unix seconds, which purges compare. None in the outcomes of operations."""

    def __repr__(self) -> str:
        """Show the size, never the value."""
        return f"StoredSession({len(self.value)} bytes, ttl={self.ttl:.3f})"


class Kept(float):
    """The remaining lifetime, in seconds, of a session that a Put found already stored; it stored nothing."""

    __slots__ = ()


@dataclass(slots=True)
class Put:
    """Store `value` for `ttl` seconds. Outcome: the remaining ttl; Kept if the session was stored already."""

    namespace: str
    key: bytes
    value: bytes
    ttl: float
    issued_at: float | None = None
    """The issue time in Unix seconds. None, or a time ahead of the engine's clock, means now."""
    pinned: bool = False
    """Whether a full engine keeps the session until its expiry, and evicts other sessions instead."""


@dataclass(slots=True)
class Get:
    """Look a session up. Outcome: the session, or None."""

    namespace: str
    key: bytes


@dataclass(slots=True)
class Take:
    """Look a session up and remove it. Outcome: the session, or None."""

    namespace: str
    key: bytes


@dataclass(slots=True)
class Remove:
    """Remove a session. Outcome: True, False or None, as `Engine.remove` returns."""

    namespace: str
    key: bytes
    ttl: float | None = None
    """The minimum time, in seconds, for which a lasting removal is in force. None: the removal is not a lasting one."""
    tombstone: bool = True
    """Whether to create a tombstone if there is neither a session nor a tombstone."""


@dataclass(slots=True)
class Change:
    """A stored session, or (if `session` is None) the removal or take of one."""

    namespace: str
    key: bytes
    session: StoredSession | None
    ttl: float | None = None
    """The remaining seconds (above zero) of a lasting removal that is in force; None for any other change.

    For a removal that is over, an engine may return the remaining seconds of a later tombstone of the key.
    """


@dataclass(slots=True)
class StoreTotals:
    """Size of the whole storage.

    Attributes:
        sessions: Live sessions; expired sessions count until they are swept. Redis cannot distinguish them from
            tombstones and other keys of the database, and counts these as well.
        bytes: Bytes that the storage occupies.
        evicted: Live sessions that were dropped to make room since the storage began to count.
        removals: Lasting removals, including those that are over until they are swept. None: the storage does not count
            them.
    """

    sessions: int
    bytes: int
    evicted: int = 0
    removals: int | None = None


@dataclass(slots=True)
class StorageConnections:
    """Connections of this process to the servers of the storage.

    Attributes:
        used: Those that a call uses now.
        idle: Open connections that no call uses.
        maximum: How many there may be, at all servers together.
        opened: Number of connections that were opened since the engine was.
    """

    used: int
    idle: int
    maximum: int
    opened: int


@dataclass(slots=True)
class NamespacePurged:
    """A purge of a namespace, which invalidates sessions of earlier changes.

    Attributes:
        namespace: The purged namespace.
        issued_before: In Unix seconds; sessions issued at or after this time stay. None: no earlier session stays.
        time: The time of the purge in Unix seconds; None if it is unknown.
    """

    namespace: str
    issued_before: float | None = None
    time: float | None = field(default=None, compare=False)


@dataclass(slots=True)
class NamespaceUsage:
    """Contents of a namespace."""

    sessions: int = 0
    """Sessions that a look-up would return."""
    value_bytes: int = 0
    """Bytes of the values of these sessions."""
    tombstones: int = 0
    pending_deletion: int = 0
    """Purged sessions that are not deleted yet."""
    issued_before: float | None = None
    """The time of the last purge in Unix seconds; sessions issued before it are void. None if there was no purge."""


Operation: TypeAlias = Put | Get | Take | Remove
Outcome: TypeAlias = float | StoredSession | bool | EngineError | None
Clock: TypeAlias = "Callable[[], float]"
"""Seconds since the Unix epoch, as `time.time`."""


class Engine(ABC):
    """Storage of sessions by namespace and key. Thread-safe. Every method may raise EngineUnavailable."""

    @abstractmethod
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
        """Store `value` for `ttl` seconds and return the remaining seconds; `issued_at` and `pinned` as in Put.

        Keys are write-once. If the key has the same value, the result is Kept and nothing changes, the expiry included.
        A session lives for at most a week from its issue; the result is 0.0, and nothing is stored, if that is over.

        Raises:
            AlreadyExists: The key has another value or a tombstone, or the session was issued before the last purge of
                its namespace. Nothing changes.
            EngineFull: There is no room.
        """

    @abstractmethod
    def get(self, namespace: str, key: bytes) -> StoredSession | None:
        """Return the live session of `key`, or None if it is unknown, expired, removed, taken or purged."""

    @abstractmethod
    def take(self, namespace: str, key: bytes) -> StoredSession | None:
        """Return the live session of `key` and remove it in one atomic step, or return None.

        At most one caller, in all processes, ever receives the session. A tombstone stays until the session's expiry.

        Raises:
            EngineFull: There is no room for a tombstone; the session is still stored.
        """

    @abstractmethod
    def remove(self, namespace: str, key: bytes, *, ttl: float | None = None, tombstone: bool = True) -> bool | None:
        """Remove the session of `key`.

        A tombstone stays until the session's expiry, or for UNKNOWN_TOMBSTONE_SECONDS if there was no session. With a
        `ttl` the removal is a lasting one: the tombstone stays for at least that many seconds. A tombstone that was
        there already then becomes a lasting one, or stays longer, and never shorter, which is a change.

        Returns:
            True if there was a live session. False if there was none, and a tombstone was created. None if there was a
            tombstone already.

        Raises:
            NoTombstone: There was neither a session nor a tombstone, and `tombstone` is False.
            EngineFull: There is no room for a tombstone.
        """

    @abstractmethod
    def batch(self, operations: Sequence[Operation]) -> list[Outcome]:
        """Carry out `operations` in order and return their outcomes in the same order.

        The outcome of an operation that fails is its EngineError; the other operations are carried out.

        Raises:
            EngineUnavailable: No operation is known to have been carried out.
        """

    @abstractmethod
    def sweep(self, limit: int) -> int:
        """Examine up to `limit` entries that may be expired or purged, delete those that are; return how many.

        A result below `limit` means that no such entry is left. Engines whose storage expires entries itself examine
        entries of purged namespaces only.

        Raises:
            EngineFull: There is not even room for the deletion.
        """

    @abstractmethod
    def purge(self, namespace: str, issued_before: float | None) -> float:
        """Void all sessions of a namespace that were issued before a time in Unix seconds (None: now).

        A session stored before this call counts as issued before now, regardless of the issue time of its Put.
        Tombstones stay. The purge is in force in all processes, and logged as a change, when the call returns. After an
        error, it may be in force in part.

        Returns:
            The time of the purge in Unix seconds: `issued_before`, or the time of an earlier purge if that is later.
        """

    @abstractmethod
    def removals(self, namespace: str, limit: int) -> Iterator[list[Change]]:
        """Yield the lasting removals in force in a namespace, in parts of about `limit`.

        The cost depends on their number, and not on that of the sessions. A removal that is in force from the beginning
        to the end of the iteration is in one of the parts. Some may be repeated.
        """

    @abstractmethod
    def last_purge(self, namespace: str) -> NamespacePurged | None:
        """Return a purge that voids as much as all purges in force together, or None if there are none."""

    @abstractmethod
    def usage(self, namespace: str | None) -> dict[str, NamespaceUsage]:
        """Count the unexpired entries of a namespace, or (None) of every namespace that has any.

        The count reads every entry, in steps with pauses that are longer than the steps.
        """

    @abstractmethod
    def position(self) -> bytes:
        """Return the position of the end of the change log: at most 64 bytes."""

    @abstractmethod
    def changes(
        self, after: bytes, until: bytes, limit: int, *, removals_only: bool = False
    ) -> tuple[list[Change | NamespacePurged], bytes] | None:
        """Return up to `limit` changes after the position `after`, and the position after the last of them.

        `until` is a recent result of position(); changes after it are not returned, and the returned position equals it
        when there are no more. Fewer than `limit` changes are returned if their values exceed about a mebibyte.

        Sessions have their issue time. The changes of one key are in order, and no change that a purge voided follows
        the purge. Changes from before `after` may be repeated. A stored session that is gone by now is omitted. The
        changes of all processes are in one log.

        With `removals_only`, stored sessions are omitted, so they cost no look-up.

        Returns:
            None if the log does not reach back to `after`, or if `after` is a position of another storage, or of this
            storage before it was emptied or failed over.
        """

    @abstractmethod
    def totals(self) -> StoreTotals:
        """Return the size of the whole storage. Cheap enough to call every few seconds."""

    def connections(self) -> StorageConnections | None:
        """Return this process's connections to the storage; None if it needs none. Makes no call."""
        return None

    @abstractmethod
    def probe(self) -> None:
        """Raise EngineUnavailable if the engine cannot serve. Cheap enough to call every second."""

    @abstractmethod
    def close(self) -> None:
        """Release all resources. Later calls raise EngineUnavailable. Idempotent."""
