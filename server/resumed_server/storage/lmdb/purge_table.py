"""The purged namespaces of an LMDB database: the mark of each, and the progress of the deletion.

A purge sets a mark, which voids every session of the namespace that was issued before it, stored already or not. So it
is in force at once, regardless of the number of sessions. The sweepers of all processes delete the void sessions later,
in small steps. A mark expires when no session from before it can be alive.

A mark is a time and the number of a change. The time rejects Puts that arrive late. Sessions that were stored before a
purge without a time have a lower number than the purge, even if the clock was set back in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

TIME_BYTES = 8
"""Times have 8 bytes, big endian, so that they sort in order."""
NEVER = b""
"""The mark of a namespace without a purge: its parts sort before every time and number."""
MARK_BYTES = 2 * TIME_BYTES
_HEAD_BYTES = MARK_BYTES + TIME_BYTES
_NO_NUMBER = bytes(TIME_BYTES)


class PurgeTable:
    """The purges of one database, in `table`: namespace -> mark, expiry, address to continue deletion at (or nothing).

    The time of a mark is in microseconds, its expiry in milliseconds since the epoch.
    """

    def __init__(self, table: Any) -> None:
        self._table = table

    def mark(self, txn: Any, namespace: bytes) -> bytes:
        """Return the mark of a namespace, or NEVER."""
        record: bytes = txn.get(namespace, NEVER, db=self._table)
        return record[:MARK_BYTES]

    def end(self, txn: Any, namespace: bytes) -> bytes:
        """Return the expiry of the mark of a namespace that has one."""
        record: bytes = txn.get(namespace, db=self._table)
        return _end(record)

    def set(self, txn: Any, namespace: bytes, time: bytes, number: bytes | None, end: bytes) -> bytes:
        """Set the mark of a namespace to a time, and to a number if one is given, until `end`; return its time.

        A mark never moves back: of each part, the later value stays.
        """
        before = self.mark(txn, namespace)
        mark = max(before[:TIME_BYTES], time) + max(before[TIME_BYTES:], number or _NO_NUMBER)
        if mark != before:
            txn.put(namespace, mark + end + namespace + b"\0", db=self._table)
        return mark[:TIME_BYTES]

    def has_work(self, txn: Any, now: bytes) -> bool:
        """Return whether a mark has expired, or sessions may be pending deletion."""
        return any(record[_HEAD_BYTES:] or _end(record) <= now for _, record in self._all(txn))

    def expire(self, txn: Any, now: bytes) -> None:
        """Delete the marks that expire at or before `now`."""
        for namespace, record in self._all(txn):
            if _end(record) <= now:
                txn.delete(namespace, db=self._table)

    def next_pending(self, txn: Any) -> tuple[bytes, bytes] | None:
        """Return a namespace whose deletion is not finished, and the address to continue at, or None."""
        return next(((name, at) for name, record in self._all(txn) if (at := record[_HEAD_BYTES:])), None)

    def advance(self, txn: Any, namespace: bytes, address: bytes) -> None:
        """Record that deletion continues at `address`, or (if that is empty) is finished."""
        record: bytes = txn.get(namespace, db=self._table)
        txn.put(namespace, record[:_HEAD_BYTES] + address, db=self._table)

    def _all(self, txn: Any) -> Iterator[tuple[bytes, bytes]]:
        """Yield all records, one for each namespace that an operator has purged."""
        yield from list(txn.cursor(self._table))


def is_timed(mark: bytes) -> bool:
    """Return whether all purges of a mark had a time."""
    return mark[TIME_BYTES:MARK_BYTES] == _NO_NUMBER


def _end(record: bytes) -> bytes:
    return record[MARK_BYTES:_HEAD_BYTES]
