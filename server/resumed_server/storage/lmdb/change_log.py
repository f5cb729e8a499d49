"""The change log of an LMDB database: the latest stored, removed and purged addresses, in order, of all processes.

A change is logged in the transaction that makes it, so the log neither misses a change nor has one that did not happen.
It has addresses only; its readers look the sessions up. A position is the name of the database (8 random bytes) and
the number of the last change (8 bytes, big endian).
"""

from __future__ import annotations

import os
from typing import Any

_NUMBER_BYTES = 8
_NAME_KEY = bytes(_NUMBER_BYTES)  # changes are numbered from 1
_TRIM_LIMIT = 8
STORED, REMOVED, PURGED = b"+", b"-", b"!"
"""Kinds of changes. The address of a purge has, instead of a key, the time of the purge, or nothing for now."""


class ChangeLog:
    """The changes of one database.

    Args:
        txn: A write transaction of its environment.
        table: The table of the log.
        kept: The number of changes to keep. A watcher that is disconnected for longer than these take starts anew.
    """

    def __init__(self, txn: Any, table: Any, kept: int) -> None:
        self._table, self._kept = table, kept
        txn.put(_NAME_KEY, os.urandom(_NUMBER_BYTES), db=table, overwrite=False)
        self._name: bytes = txn.get(_NAME_KEY, db=table)

    def append(self, txn: Any, what: bytes, address: bytes) -> bytes:
        """Log a change in the write transaction that makes it, trim the log, and return the number of the change."""
        number = self._last(txn) + 1
        encoded = _bytes(number)
        txn.put(encoded, what + address, db=self._table, append=True)
        self._trim(txn, number - self._kept)
        return encoded

    def position(self, txn: Any) -> bytes:
        """Return the position of the end of the log."""
        return self._name + _bytes(self._last(txn))

    def read(self, txn: Any, after: bytes, until: bytes, limit: int) -> list[tuple[bytes, bytes, bytes]] | None:
        """Return up to `limit` changes between two positions, each as (kind, address, position after it).

        The result is None if the log does not reach back to `after`, or if `after` is not a position of this database.
        """
        if after[:_NUMBER_BYTES] != self._name or len(after) != 2 * _NUMBER_BYTES:
            return None
        number, end = int.from_bytes(after[_NUMBER_BYTES:], "big"), int.from_bytes(until[_NUMBER_BYTES:], "big")
        # Another process, or this one before, may have kept fewer changes: then older ones are missing.
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

    def _trim(self, txn: Any, until: int) -> None:
        """Delete changes up to a number: usually one, and several at a time after the log was longer."""
        with txn.cursor(self._table) as cursor:
            for _ in range(_TRIM_LIMIT):
                if not cursor.set_range(_bytes(1)) or int.from_bytes(cursor.key(), "big") > until:
                    return
                cursor.delete()

    def _last(self, txn: Any) -> int:
        with txn.cursor(self._table) as cursor:
            return int.from_bytes(cursor.key(), "big") if cursor.last() else 0


def _bytes(number: int) -> bytes:
    return number.to_bytes(_NUMBER_BYTES, "big")
