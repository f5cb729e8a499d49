"""The log of changes of an LMDB database: what was stored, removed and purged last, in order, by all processes.

It is written in the transactions that make the changes, so it can neither miss one nor tell of one that did not happen.
It has addresses only; who reads it looks the sessions up. A position is the name of the store (8 random bytes) and the
number of the last change (8 bytes, big endian).
"""

from __future__ import annotations

import os
from typing import Any

_NUMBER_BYTES = 8
_NAME_KEY = bytes(_NUMBER_BYTES)  # changes are numbered from 1
_FORGOTTEN_AT_ONCE = 8
STORED, REMOVED, PURGED = b"+", b"-", b"!"
"""What a change did: to the session of its address, or to a namespace. The address of a purge has no key: nothing or
a time stands behind the namespace."""


class ChangeLog:
    """The changes of one database.

    Args:
        txn: A write transaction of its environment.
        table: Where the log is.
        kept: How many changes are kept: a watcher may be away for as long as it takes to make them.
    """

    def __init__(self, txn: Any, table: Any, kept: int) -> None:
        self._table, self._kept = table, kept
        txn.put(_NAME_KEY, os.urandom(_NUMBER_BYTES), db=table, overwrite=False)
        self._name: bytes = txn.get(_NAME_KEY, db=table)

    def append(self, txn: Any, what: bytes, address: bytes) -> bytes:
        """Log a change, in the write transaction that makes it; forget the oldest. Return its number."""
        number = self._last(txn) + 1
        encoded = _bytes(number)
        txn.put(encoded, what + address, db=self._table, append=True)
        self._forget(txn, number - self._kept)
        return encoded

    def position(self, txn: Any) -> bytes:
        """Return where the log ends."""
        return self._name + _bytes(self._last(txn))

    def read(self, txn: Any, after: bytes, until: bytes, limit: int) -> list[tuple[bytes, bytes, bytes]] | None:
        """Return up to `limit` changes between two positions, each as (what, address, position behind it).

        None if the log does not reach back to `after`, or if it is no position of this store.
        """
        if after[:_NUMBER_BYTES] != self._name or len(after) != 2 * _NUMBER_BYTES:
            return None
        number, end = int.from_bytes(after[_NUMBER_BYTES:], "big"), int.from_bytes(until[_NUMBER_BYTES:], "big")
        # A log that was kept shorter before, or is by another process, has a hole where this one would still reach.
        if not number <= end or (number < end and txn.get(_bytes(number + 1), db=self._table) is None):
            return None
        records: list[tuple[bytes, bytes, bytes]] = []
        with txn.cursor(self._table) as cursor:
            if cursor.set_range(_bytes(number + 1)):
                for key, record in cursor:
                    found = int.from_bytes(key, "big")
                    if len(records) == limit or found > end:
                        break
                    records.append((record[:1], record[1:], self._name + _bytes(found)))
        return records

    def _forget(self, txn: Any, until: int) -> None:
        """Forget the changes up to a number: one, but for the first ones after the log was kept longer."""
        with txn.cursor(self._table) as cursor:
            for _ in range(_FORGOTTEN_AT_ONCE):
                if not cursor.set_range(_bytes(1)) or int.from_bytes(cursor.key(), "big") > until:
                    return
                cursor.delete()

    def _last(self, txn: Any) -> int:
        with txn.cursor(self._table) as cursor:
            return int.from_bytes(cursor.key(), "big") if cursor.last() else 0


def _bytes(number: int) -> bytes:
    return number.to_bytes(_NUMBER_BYTES, "big")
