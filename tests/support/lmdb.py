"""Reads the sessions of an LMDB database without the methods of its engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resumed_server.storage.lmdb.engine import LmdbEngine

_HEAD_BYTES = 24
"""Expiry, issue time and number; docs/engines.md. A tombstone is shorter."""


def raw_values(engine: LmdbEngine) -> dict[tuple[str, bytes], bytes]:
    """Return the value of each session by namespace and key."""
    values = {}
    with engine._env.begin(engine._sessions) as txn:  # LMDB opens a file only once in a process
        for address, entry in txn.cursor():
            if len(entry) > _HEAD_BYTES:
                namespace, _, key = address.partition(b"\0")
                values[namespace.decode(), key] = entry[_HEAD_BYTES:]
    return values
