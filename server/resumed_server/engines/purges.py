"""Which namespaces of an LMDB database were purged, up to what time, and how far what was purged has been deleted.

A purge is a mark: nothing of the namespace that was issued before it counts, whether it is there or still to come. So
it takes effect at once, however much there is. What it makes worthless is deleted later, in small steps, by the
sweepers of all processes. A mark is forgotten when no session from before it can be alive any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

TIME_BYTES = 8
"""A time is so many bytes, big endian, so that an earlier one sorts first."""
NEVER = b""
"""The mark of a namespace that was not purged: it sorts before every time."""


class Purges:
    """The purges of one database, in `table`: namespace -> mark, its end, where to go on deleting (or nothing).

    The mark is in microseconds, the end in milliseconds since the epoch.
    """

    def __init__(self, table: Any) -> None:
        self._table = table

    def mark(self, txn: Any, namespace: bytes) -> bytes:
        """Return the mark of a namespace, or NEVER."""
        record: bytes = txn.get(namespace, NEVER, db=self._table)
        return record[:TIME_BYTES]

    def set(self, txn: Any, namespace: bytes, mark: bytes, end: bytes) -> bytes:
        """Set the mark of a namespace until `end`, unless it has a later one; return which it has."""
        before = self.mark(txn, namespace)
        if before >= mark:
            return before
        txn.put(namespace, mark + end + namespace + b"\0", db=self._table)
        return mark

    def due(self, txn: Any, now: bytes) -> bool:
        """Return whether there is something to forget or to delete."""
        return any(record[2 * TIME_BYTES :] or _end(record) <= now for _, record in self._all(txn))

    def forget(self, txn: Any, now: bytes) -> None:
        """Forget the marks that end no later than `now`."""
        for namespace, record in self._all(txn):
            if _end(record) <= now:
                txn.delete(namespace, db=self._table)

    def unfinished(self, txn: Any) -> tuple[bytes, bytes] | None:
        """Return a namespace of which there may be something to delete, and the address to go on at, or None."""
        return next(((name, at) for name, record in self._all(txn) if (at := record[2 * TIME_BYTES :])), None)

    def proceed(self, txn: Any, namespace: bytes, address: bytes) -> None:
        """Note that deleting goes on at `address`, or (if it is empty) is finished."""
        record: bytes = txn.get(namespace, db=self._table)
        txn.put(namespace, record[: 2 * TIME_BYTES] + address, db=self._table)

    def _all(self, txn: Any) -> Iterator[tuple[bytes, bytes]]:
        """Return all records, which are as many as operators have purged namespaces."""
        yield from list(txn.cursor(self._table))


def _end(record: bytes) -> bytes:
    return record[TIME_BYTES : 2 * TIME_BYTES]
