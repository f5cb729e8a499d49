"""Base class of engines that observe or change the calls of another engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resumed_server.storage.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from resumed_server.storage.engine import (
        Change,
        NamespacePurged,
        NamespaceUsage,
        Operation,
        Outcome,
        StorageConnections,
        StoredSession,
        StoreTotals,
    )


class WrapperEngine(Engine):
    """Passes every call to `engine`, and closes it. A subclass overrides the methods that concern it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

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
        """See Engine."""
        return self._engine.put(namespace, key, value, ttl, issued_at, pinned=pinned)

    def get(self, namespace: str, key: bytes) -> StoredSession | None:
        """See Engine."""
        return self._engine.get(namespace, key)

    def take(self, namespace: str, key: bytes) -> StoredSession | None:
        """See Engine."""
        return self._engine.take(namespace, key)

    def remove(self, namespace: str, key: bytes, *, ttl: float | None = None, tombstone: bool = True) -> bool | None:
        """See Engine."""
        return self._engine.remove(namespace, key, ttl=ttl, tombstone=tombstone)

    def batch(self, operations: Sequence[Operation]) -> list[Outcome]:
        """See Engine."""
        return self._engine.batch(operations)

    def sweep(self, limit: int) -> int:
        """See Engine."""
        return self._engine.sweep(limit)

    def purge(self, namespace: str, issued_before: float | None) -> float:
        """See Engine."""
        return self._engine.purge(namespace, issued_before)

    def removals(self, namespace: str, limit: int) -> Iterator[list[Change]]:
        """See Engine."""
        return self._engine.removals(namespace, limit)

    def last_purge(self, namespace: str) -> NamespacePurged | None:
        """See Engine."""
        return self._engine.last_purge(namespace)

    def usage(self, namespace: str | None) -> dict[str, NamespaceUsage]:
        """See Engine."""
        return self._engine.usage(namespace)

    def position(self) -> bytes:
        """See Engine."""
        return self._engine.position()

    def changes(
        self, after: bytes, until: bytes, limit: int, *, removals_only: bool = False
    ) -> tuple[list[Change | NamespacePurged], bytes] | None:
        """See Engine."""
        return self._engine.changes(after, until, limit, removals_only=removals_only)

    def totals(self) -> StoreTotals:
        """See Engine."""
        return self._engine.totals()

    def connections(self) -> StorageConnections | None:
        """See Engine."""
        return self._engine.connections()

    def probe(self) -> None:
        """See Engine."""
        self._engine.probe()

    def close(self) -> None:
        """See Engine."""
        self._engine.close()
