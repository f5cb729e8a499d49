"""LMDB tables for sessions, the expiry indexes, tombstones and lasting removals, which every method updates together.

Their keys sort in the order that the engine needs:

    sessions    namespace 00 key         -> expiry, issue time, number, value     (a tombstone is an expiry alone)
    expiries    expiry, namespace 00 key -> (nothing)         live sessions, by expiry
    pinned      expiry, namespace 00 key -> (nothing)         pinned sessions, by expiry; they are not in `expiries`
    tombstones  expiry, namespace 00 key -> (nothing)         removed and taken sessions, by expiry
    removals    namespace 00 key         -> expiry            those tombstones that are lasting removals

Times have 8 bytes, big endian, since the epoch: an expiry in milliseconds, an issue time in microseconds. The number is
that of the change that stored the session, in the change log. A key of `sessions` is an *address*, a value of it an
*entry*.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from resumed_server.storage.engine import EngineFull, StoredSession
from resumed_server.storage.lmdb.purge_table import TIME_BYTES

if TYPE_CHECKING:
    from resumed_server.storage.engine import Clock

_ISSUED, _NUMBER = slice(TIME_BYTES, 2 * TIME_BYTES), slice(2 * TIME_BYTES, 3 * TIME_BYTES)
_HEAD_BYTES = 3 * TIME_BYTES
_EVICTED = b"evicted"
_END_OF_TIME = b"\xff" * TIME_BYTES
_milliseconds = struct.Struct(">Q").unpack_from
_Scan: TypeAlias = "tuple[list[tuple[bytes, bytes]], bytes | None]"


class SessionTable:
    """The tables of one database. The caller begins the transaction `txn` of each call.

    `counters` is the table that has the number of evicted sessions.
    """

    def __init__(
        self, sessions: Any, expiries: Any, pinned: Any, tombstones: Any, removals: Any, *, counters: Any, clock: Clock
    ) -> None:
        self._sessions, self._expiries, self._pinned, self._tombstones = sessions, expiries, pinned, tombstones
        self._removals, self._counters, self._clock = removals, counters, clock

    def expiry(self, ttl: float) -> bytes:
        """Return the encoded expiry of an entry that lives for `ttl` seconds from now."""
        return int((self._clock() + ttl) * 1000).to_bytes(TIME_BYTES, "big")

    def remaining(self, entry: bytes) -> float:
        """Return the remaining lifetime of an entry in seconds."""
        return cast("float", _milliseconds(entry)[0] / 1000 - self._clock())

    def get_unexpired(self, txn: Any, address: bytes, mark: bytes) -> bytes | None:
        """Return the session or tombstone at `address`, or None. Delete an expired entry or a purged session."""
        entry: bytes | None = txn.get(address, db=self._sessions)
        if entry is None or (self.remaining(entry) > 0 and not is_purged(entry, mark)):
            return entry
        self.delete(txn, address, entry)
        return None

    def add(self, txn: Any, address: bytes, expiry: bytes, rest: bytes, *, pinned: bool) -> None:
        """Store a session at an address without an entry; `rest` is its issue time, number and value."""
        txn.put(address, expiry + rest, db=self._sessions)
        txn.put(expiry + address, b"", db=self._pinned if pinned else self._expiries)

    def put_tombstone(self, txn: Any, address: bytes, old: bytes | None, expiry: bytes, *, lasting: bool) -> None:
        """Store a tombstone in the place of the entry `old`, if any, so that no Put succeeds there until `expiry`."""
        if old is not None:
            txn.delete(old[:TIME_BYTES] + address, db=self._index_of(txn, address, old))
        txn.put(address, expiry, db=self._sessions)
        txn.put(expiry + address, b"", db=self._tombstones)
        if lasting:
            txn.put(address, expiry, db=self._removals)

    def removal(self, txn: Any, address: bytes) -> bytes | None:
        """Return the encoded expiry of the lasting removal at `address`, or None if there is none."""
        return cast("bytes | None", txn.get(address, db=self._removals))

    def delete(self, txn: Any, address: bytes, entry: bytes) -> None:
        """Delete the entry at `address`."""
        self._delete(txn, self._index_of(txn, address, entry), entry[:TIME_BYTES] + address)

    def scan(self, txn: Any, start: bytes, prefix: bytes, limit: int) -> _Scan:
        """Return up to `limit` addresses and entries with a prefix, from `start` on, and the next address, if any."""
        return _scan(txn, self._sessions, start, prefix, limit)

    def scan_removals(self, txn: Any, start: bytes, prefix: bytes, limit: int) -> _Scan:
        """Return up to `limit` addresses and expiries of lasting removals, like scan()."""
        return _scan(txn, self._removals, start, prefix, limit)

    def count(self, txn: Any) -> int:
        """Return the number of sessions, including expired sessions that are not swept yet."""
        return sum(txn.stat(index)["entries"] for index in (self._expiries, self._pinned))

    def count_removals(self, txn: Any) -> int:
        """Return the number of lasting removals, including those that are over and not swept yet."""
        return cast("int", txn.stat(self._removals)["entries"])

    def evicted(self, txn: Any) -> int:
        """Return the number of live sessions that were evicted since the database was created."""
        return int.from_bytes(txn.get(_EVICTED, b"", db=self._counters), "big")

    def has_expired(self, txn: Any, now: bytes) -> bool:
        """Return whether an entry has expired at or before `now`."""
        return any(self._first(txn, index, now, 1) for index in (self._expiries, self._pinned, self._tombstones))

    def delete_expired(self, txn: Any, now: bytes, limit: int) -> int:
        """Delete up to `limit` sessions and tombstones that expire at or before `now`; return their number."""
        dropped = 0
        for index in (self._expiries, self._pinned, self._tombstones):
            for key in self._first(txn, index, now, limit - dropped):
                self._delete(txn, index, key)
                dropped += 1
        return dropped

    def evict(self, txn: Any, size: int) -> None:
        """Delete expired entries, then sessions in the order of their expiry, until `size` bytes are free.

        Unexpired pinned sessions stay, and so do unexpired tombstones: without one, a late Put would restore a removed
        session.

        Raises:
            EngineFull: There is no entry to delete.
        """
        freed = evicted = 0
        now = self.expiry(0)
        for index, until in ((self._tombstones, now), (self._pinned, now), (self._expiries, _END_OF_TIME)):
            while freed < size and (first := self._first(txn, index, until, 1)):
                freed += len(first[0]) + len(txn.get(first[0][TIME_BYTES:], b"", db=self._sessions))
                self._delete(txn, index, first[0])
                evicted += index is self._expiries
        if not freed:
            raise EngineFull("no room left, and no live session to evict")
        if evicted:
            txn.put(_EVICTED, (self.evicted(txn) + evicted).to_bytes(8, "big"), db=self._counters)

    def _index_of(self, txn: Any, address: bytes, entry: bytes) -> Any:
        if is_tombstone(entry):
            return self._tombstones
        pinned = txn.get(entry[:TIME_BYTES] + address, db=self._pinned) is not None
        return self._pinned if pinned else self._expiries

    def _delete(self, txn: Any, index: Any, key: bytes) -> None:
        address = key[TIME_BYTES:]
        txn.delete(key, db=index)
        txn.delete(address, db=self._sessions)
        if index is self._tombstones:
            txn.delete(address, db=self._removals)

    def _first(self, txn: Any, index: Any, until: bytes, limit: int) -> list[bytes]:
        """Return up to `limit` keys of `index` that expire at or before `until`."""
        keys: list[bytes] = []
        for key in txn.cursor(index).iternext(values=False):
            if len(keys) == limit or key[:TIME_BYTES] > until:
                break
            keys.append(key)
        return keys


def _scan(txn: Any, table: Any, start: bytes, prefix: bytes, limit: int) -> _Scan:
    found: list[tuple[bytes, bytes]] = []
    with txn.cursor(table) as cursor:
        if cursor.set_range(start):
            for address, entry in cursor:
                if not address.startswith(prefix):
                    break
                if len(found) == limit:
                    return found, address
                found.append((address, entry))
    return found, None


def session_in(entry: bytes | None, now: float, mark: bytes) -> StoredSession | None:
    """Return the session in `entry`; None without an entry, and for a tombstone or an expired or purged session."""
    if entry is None or len(entry) == TIME_BYTES or (mark and is_purged(entry, mark)):
        return None
    ttl = _milliseconds(entry)[0] / 1000 - now
    return StoredSession(entry[_HEAD_BYTES:], ttl) if ttl > 0 else None


def value_of(entry: bytes) -> bytes:
    """Return the value of a session; empty for a tombstone."""
    return entry[_HEAD_BYTES:]


def issue_time(entry: bytes) -> float:
    """Return the issue time of a session in Unix seconds."""
    return int.from_bytes(entry[_ISSUED], "big") / 1e6


def is_tombstone(entry: bytes) -> bool:
    """Return whether an entry is a tombstone."""
    return len(entry) == TIME_BYTES


def is_purged(entry: bytes, mark: bytes) -> bool:
    """Return whether an entry is a session that was issued, or stored, before the mark of its namespace."""
    return len(entry) > TIME_BYTES and (entry[_ISSUED] < mark[:TIME_BYTES] or entry[_NUMBER] < mark[TIME_BYTES:])


def time_bytes(number: int) -> bytes:
    """Return the encoding of a time."""
    return number.to_bytes(TIME_BYTES, "big")
