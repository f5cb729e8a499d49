"""Which namespaces of an LMDB database were purged, up to what time, and how far what was purged has been deleted.

A purge is a mark: nothing of the namespace that was issued before it counts, whether it is there or still to come. So
it takes effect at once, however much there is. What it makes worthless is deleted later, in small steps, by the
sweepers of all processes. A mark is forgotten when no session from before it can be alive any more.

A mark is a time and the number of a change. The time is for what arrives late. What was stored before a purge of all
that is there has a lower number than that purge, whatever the clock said or says: it may have been set back meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

TIME_BYTES = 8
"""A time is so many bytes, big endian, so that an earlier one sorts first."""
NEVER = b""
"""The mark of a namespace that was not purged: its parts sort before every time and number."""
MARK_BYTES = 2 * TIME_BYTES
_HEAD_BYTES = MARK_BYTES + TIME_BYTES
_NO_NUMBER = bytes(TIME_BYTES)


class PurgeTable:
    """The purges of one database, in `table`: namespace -> mark, its end, where to go on deleting (or nothing).

    The time of a mark is in microseconds, its end in milliseconds since the epoch.
    """

    def __init__(self, table: Any) -> None:
        self._table = table

    def mark(self, txn: Any, namespace: bytes) -> bytes:
        """Return the mark of a namespace, or NEVER."""
        record: bytes = txn.get(namespace, NEVER, db=self._table)
        return record[:MARK_BYTES]

    def set(self, txn: Any, namespace: bytes, time: bytes, number: bytes | None, end: bytes) -> bytes:
        """Set the mark of a namespace to a time, and to a number if there is one, until `end`; return its time.

        What is later already stays.
        """
        before = self.mark(txn, namespace)
        mark = max(before[:TIME_BYTES], time) + max(before[TIME_BYTES:], number or _NO_NUMBER)
        if mark != before:
            txn.put(namespace, mark + end + namespace + b"\0", db=self._table)
        return mark[:TIME_BYTES]

    def has_work(self, txn: Any, now: bytes) -> bool:
        """Return whether there is something to forget or to delete."""
        return any(record[_HEAD_BYTES:] or _end(record) <= now for _, record in self._all(txn))

    def expire(self, txn: Any, now: bytes) -> None:
        """Forget the marks that end no later than `now`."""
        for namespace, record in self._all(txn):
            if _end(record) <= now:
                txn.delete(namespace, db=self._table)

    def next_pending(self, txn: Any) -> tuple[bytes, bytes] | None:
        """Return a namespace of which there may be something to delete, and the address to go on at, or None."""
        return next(((name, at) for name, record in self._all(txn) if (at := record[_HEAD_BYTES:])), None)

    def advance(self, txn: Any, namespace: bytes, address: bytes) -> None:
        """Note that deleting goes on at `address`, or (if it is empty) is finished."""
        record: bytes = txn.get(namespace, db=self._table)
        txn.put(namespace, record[:_HEAD_BYTES] + address, db=self._table)

    def _all(self, txn: Any) -> Iterator[tuple[bytes, bytes]]:
        """Return all records, which are as many as operators have purged namespaces."""
        yield from list(txn.cursor(self._table))


def _end(record: bytes) -> bytes:
    return record[MARK_BYTES:_HEAD_BYTES]
