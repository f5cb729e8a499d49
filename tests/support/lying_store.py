"""A malicious store: a real server whose engine records all sessions, and returns false ones."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from resumed.v1.session_store_pb2_grpc import add_SessionStoreServiceServicer_to_server
from resumed_server.rpc.server import build_grpc_server
from resumed_server.rpc.session_service import SessionStoreService
from resumed_server.storage.engine import Change, NamespacePurged, Put, StoredSession
from resumed_server.storage.lmdb.engine import LmdbEngine
from resumed_server.storage.wrapper import WrapperEngine
from resumed_server.watch.hub import WatchHub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from resumed_server.storage.engine import Engine, Operation, Outcome

Lie: TypeAlias = "Callable[[LyingEngine, str, bytes, StoredSession | None], StoredSession | None]"
"""Returns a false answer for a namespace and a key that once had a session, and the true answer."""


class Given(NamedTuple):
    """A session of a Put."""

    namespace: str
    key: bytes
    value: bytes


class LyingEngine(WrapperEngine):
    """Replaces sessions in look-ups and changes by the results of `lie`.

    Attributes:
        lie: Makes the false answers; None for true ones.
        given: The sessions of all Puts so far, including removed ones. A test may clear it.
        lies: The number of false answers.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.lie: Lie | None = None
        self.given: list[Given] = []
        self.lies = 0

    def given_for(self, namespace: str, key: bytes) -> Given | None:
        """Return the first session that was stored under a key, if any."""
        return next((each for each in self.given if each[:2] == (namespace, key)), None)

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
        """Store and record a session."""
        self.given.append(Given(namespace, key, value))
        return super().put(namespace, key, value, ttl, issued_at, pinned=pinned)

    def get(self, namespace: str, key: bytes) -> StoredSession | None:
        """Return a false answer."""
        return self._distort(namespace, key, super().get(namespace, key))

    def take(self, namespace: str, key: bytes) -> StoredSession | None:
        """Return a false answer."""
        return self._distort(namespace, key, super().take(namespace, key))

    def batch(self, operations: Sequence[Operation]) -> list[Outcome]:
        """Record the Puts; frontends have no look-ups in Batches."""
        self.given += [Given(each.namespace, each.key, each.value) for each in operations if isinstance(each, Put)]
        return super().batch(operations)

    def changes(
        self, after: bytes, until: bytes, limit: int, *, removals_only: bool = False
    ) -> tuple[list[Change | NamespacePurged], bytes] | None:
        """Return false changes, including sessions in the place of removals."""
        found = super().changes(after, until, limit, removals_only=removals_only)
        if found is None:
            return None
        changes, position = found
        return list(map(self._retold, changes)), position

    def _retold(self, change: Change | NamespacePurged) -> Change | NamespacePurged:
        if isinstance(change, NamespacePurged) or change.ttl is not None:
            return change
        session = self._distort(change.namespace, change.key, change.session)
        return Change(change.namespace, change.key, session)

    def _distort(self, namespace: str, key: bytes, truth: StoredSession | None) -> StoredSession | None:
        if self.lie is None or self.given_for(namespace, key) is None:
            return truth
        self.lies += 1
        return self.lie(self, namespace, key, truth)


class LyingStore(NamedTuple):
    """A server at `target`, and the engine in it."""

    target: str
    engine: LyingEngine


@contextlib.contextmanager
def lying_store() -> Iterator[LyingStore]:
    """Run a malicious store in this process."""
    with contextlib.closing(LyingEngine(LmdbEngine(None, capacity=64 << 20))) as engine:
        watchers = WatchHub(engine)
        server = build_grpc_server(8, shared=False)
        add_SessionStoreServiceServicer_to_server(SessionStoreService(engine, watchers, 86_400.0), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield LyingStore(f"127.0.0.1:{port}", engine)
        finally:
            watchers.close()
            server.stop(None).wait()
