"""What a storage engine promises, the errors it may raise, and the operations of a batch.

The threat: what an engine keeps lets whoever holds the fleet key decrypt or hijack TLS connections, so an engine keeps
values as opaque bytes, never logs keys or values, and never hands out what was removed, taken or purged. The relief:
losing an entry is harmless, since the client then makes a full handshake. So an engine may forget a live session (full,
restarted, failed over), but it must never resurrect one, and `take` must hand a session to one caller at most.

Engines know nothing of gRPC and check no limits: namespaces, keys, values and times to live arrive valid. Every engine
passes `tests/server/storage/engine_suite.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from resumed_server.errors import OutsideFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

UNKNOWN_TOMBSTONE_SECONDS = 60.0
"""How long a key that was removed without ever being stored refuses a Put."""
LONGEST_TTL_SECONDS = 7 * 24 * 3600.0
"""What no session lives longer than (RFC 8446 section 4.6.1): so long the time of a purge has to be remembered."""


class EngineError(OutsideFailure):
    """The engine failed; the message is for the log and carries no key and no value."""


class EngineUnavailable(EngineError):
    """The storage does not answer now; trying again later may succeed.

    Attributes:
        done: Whether it is done all the same, but not where it has to be to last.
    """

    done = False


class EngineBroken(EngineUnavailable):
    """This engine will never answer again; one that is opened anew may."""


class EngineFull(EngineError):
    """There is no room for the session, even after the soonest to expire were dropped."""


class NoTombstone(EngineError):
    """A Remove of a session that is not there was not to leave a tombstone, and so did nothing."""


class AlreadyExists(EngineError):
    """The key holds another value, or its session was removed, taken or purged."""


@dataclass(slots=True)
class StoredSession:
    """A live session: its value, and the seconds it has left (above zero)."""

    value: bytes
    ttl: float
    issued: float | None = field(default=None, compare=False)
    """When it was issued, in Unix seconds, as purges go by it; None in the outcomes of operations, which have no use
    for it."""

    def __repr__(self) -> str:
        """Show the size, never the value."""
        return f"StoredSession({len(self.value)} bytes, ttl={self.ttl:.3f})"


class Kept(float):
    """The seconds left of a session that a Put found there already: it stored nothing."""

    __slots__ = ()


@dataclass(slots=True)
class Put:
    """Store `value` for `ttl` seconds; its outcome is the remaining ttl in seconds, Kept if it was there already."""

    namespace: str
    key: bytes
    value: bytes
    ttl: float
    issued: float | None = None
    """In Unix seconds; None, or a time ahead of the engine's clock, is now."""


@dataclass(slots=True)
class Get:
    """Look a session up; its outcome is the session, or None."""

    namespace: str
    key: bytes


@dataclass(slots=True)
class Take:
    """Look a session up and remove it; its outcome is the session, or None."""

    namespace: str
    key: bytes


@dataclass(slots=True)
class Remove:
    """Remove a session; its outcome is True, False or None as `Engine.remove` returns."""

    namespace: str
    key: bytes
    tombstone: bool = True
    """Whether to leave a tombstone where there is neither a session nor one already."""


@dataclass(slots=True)
class Change:
    """A session that was stored, or, where `session` is None, removed or taken."""

    namespace: str
    key: bytes
    session: StoredSession | None


@dataclass(slots=True)
class Totals:
    """What a store holds and takes.

    Attributes:
        sessions: Live sessions; those that expired count until they are swept. Tombstones count too, and whatever else
            is kept there, where the storage cannot tell them apart (Redis).
        bytes: Bytes that the store takes.
        evicted: Sessions that the storage itself dropped for room since it began.
    """

    sessions: int
    bytes: int
    evicted: int = 0


@dataclass(slots=True)
class Purged:
    """A namespace was purged: what was told of its sessions before need not be true any more.

    Attributes:
        namespace: Which.
        issued_before: In Unix seconds: sessions issued since then are not concerned. None: all that were told before.
    """

    namespace: str
    issued_before: float | None = None


@dataclass(slots=True)
class Usage:
    """What there is of a namespace."""

    sessions: int = 0
    """Those that a look-up would return."""
    value_bytes: int = 0
    """What their values take."""
    tombstones: int = 0
    purged: int = 0
    """Sessions that were purged and are not deleted yet."""
    issued_before: float | None = None
    """The time up to which it was purged, in Unix seconds."""


Operation: TypeAlias = Put | Get | Take | Remove
Outcome: TypeAlias = float | StoredSession | bool | EngineError | None
Clock: TypeAlias = "Callable[[], float]"
"""Seconds since the Unix epoch, as `time.time`."""


class Engine(ABC):
    """Keeps sessions by namespace and key. Thread-safe. Every method may raise EngineUnavailable."""

    @property
    def evicted(self) -> int:
        """Live sessions that this engine, in this process, dropped for room."""
        return 0

    @abstractmethod
    def put(self, namespace: str, key: bytes, value: bytes, ttl: float, issued: float | None = None) -> float:
        """Store `value` for `ttl` seconds and return the seconds it has left; `issued` as in Put.

        Ids are write-once. The same value again: Kept, and nothing changes, least of all the expiry. Another value, or
        a session that was removed or taken, or issued before the namespace's last purge says: AlreadyExists, and
        nothing changes. No room: EngineFull. A session lives a week from its issue at most: 0.0, if that is over.
        """

    @abstractmethod
    def get(self, namespace: str, key: bytes) -> StoredSession | None:
        """Return the live session of `key`, or None. Never one that expired, was removed, taken or purged."""

    @abstractmethod
    def take(self, namespace: str, key: bytes) -> StoredSession | None:
        """Return the live session of `key` and remove it in one atomic step, or None.

        Of all callers, in all processes, at most one gets it, ever. A tombstone stays until the session's own expiry.
        May raise EngineFull, where even a tombstone finds no room; then the session is still there.
        """

    @abstractmethod
    def remove(self, namespace: str, key: bytes, *, tombstone: bool = True) -> bool | None:
        """Remove the session of `key`.

        A tombstone stays until the session's own expiry, or for UNKNOWN_TOMBSTONE_SECONDS where there was none.

        Returns:
            True: a live session was there. False: none was, and there is a new tombstone. None: there was a tombstone
            already, and nothing changed.

        Raises:
            NoTombstone: There was neither, and `tombstone` is False.
            EngineFull: There is no room for a tombstone.
        """

    @abstractmethod
    def batch(self, operations: Sequence[Operation]) -> list[Outcome]:
        """Carry out `operations` in order and return their outcomes in the same order.

        An operation that fails has its EngineError as its outcome and does not disturb the others. Raises
        EngineUnavailable only if none is known to have been carried out.
        """

    @abstractmethod
    def sweep(self, limit: int) -> int:
        """Look at up to `limit` entries that expired or may be purged, reclaim those, and return how many there were.

        Fewer than `limit` means that there was nothing else to look at. Engines that expire natively look at what may
        be purged only. May raise EngineFull, where not even a deletion finds room.
        """

    @abstractmethod
    def purge(self, namespace: str, issued_before: float | None) -> float:
        """See to it that no session of a namespace issued before a time (None: now) is returned again, ever.

        Return the time up to which the namespace is purged, in Unix seconds: that, or what an earlier call said if it
        is later. Takes effect for all processes before it returns, and is told as a change. What was stored before the
        call was issued before now, whatever was said of it. Tombstones stay. After an error it may have taken effect
        in part.
        """

    @abstractmethod
    def usage(self, namespace: str | None) -> dict[str, Usage]:
        """Count what there is of a namespace, or (None) of each in which there is anything; what expired is nothing.

        Takes its time, in steps that leave more to others than they take.
        """

    @abstractmethod
    def position(self) -> bytes:
        """Return where the log of changes ends now: at most 64 bytes."""

    @abstractmethod
    def changes(self, after: bytes, until: bytes, limit: int) -> tuple[list[Change | Purged], bytes] | None:
        """Return up to `limit` changes behind the position `after`, none of them behind `until`, and where they end.

        `until` is what position() returned a moment ago; they end there when there are no more. Fewer than `limit`
        where their values are large: about a mebibyte at once.

        Sessions come with the time of their issue. The changes of one key come in their order, and behind the purge of
        a namespace none that it undid. Some from before `after` may come again. A session that was stored, but is gone
        by now, is left out. None if the log does not reach back to `after`, or if it is a position of another store, or
        of this one before it was emptied, or before a failover. The changes of all processes are in one log.
        """

    @abstractmethod
    def totals(self) -> Totals:
        """Return what the whole store holds, all namespaces together. Cheap enough to call every few seconds."""

    @abstractmethod
    def probe(self) -> None:
        """Return if the engine can serve; raise EngineUnavailable if not. Cheap enough to call every second."""

    @abstractmethod
    def close(self) -> None:
        """Release what the engine holds. Calls after this raise EngineUnavailable. Idempotent."""
