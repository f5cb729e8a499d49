"""A malicious server: its engine keeps every Put and may return any of them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from resumed.v1.session_store_pb2_grpc import add_SessionStoreServiceServicer_to_server
from resumed_server.rpc.server import build_grpc_server
from resumed_server.rpc.session_service import SessionStoreService
from resumed_server.storage.engine import Change, Purged, Put, StoredSession
from resumed_server.storage.lmdb.engine import EmbeddedEngine
from resumed_server.watch.hub import WatchHub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from resumed_server.storage.engine import Operation, Outcome

Lie: TypeAlias = "Callable[[LyingEngine, str, bytes, StoredSession | None], StoredSession | None]"
"""Returns a response for a namespace and a key of an earlier Put, and the truth."""


class Given(NamedTuple):
    """The arguments of a Put."""

    namespace: str
    key: bytes
    value: bytes


class LyingEngine(EmbeddedEngine):
    """Returns the result of `lie` to lookups and watchers instead of the truth.

    Attributes:
        lie: None for the truth.
        given: All Puts so far, removed ones included. A test may clear it.
        lies: How many look-ups it lied to.
    """

    def __init__(self) -> None:
        super().__init__(None, capacity=64 << 20)
        self.lie: Lie | None = None
        self.given: list[Given] = []
        self.lies = 0

    def given_for(self, namespace: str, key: bytes) -> Given | None:
        """Return the first value ever stored for a key, or None."""
        return next((each for each in self.given if each[:2] == (namespace, key)), None)

    def put(self, namespace: str, key: bytes, value: bytes, ttl: float, issued: float | None = None) -> float:
        """Store, and keep for later."""
        self.given.append(Given(namespace, key, value))
        return super().put(namespace, key, value, ttl, issued)

    def get(self, namespace: str, key: bytes) -> StoredSession | None:
        """Answer with a lie."""
        return self._told(namespace, key, super().get(namespace, key))

    def take(self, namespace: str, key: bytes) -> StoredSession | None:
        """Answer with a lie."""
        return self._told(namespace, key, super().take(namespace, key))

    def batch(self, operations: Sequence[Operation]) -> list[Outcome]:
        """Store honestly; frontends look up nothing in Batches."""
        self.given += [Given(each.namespace, each.key, each.value) for each in operations if isinstance(each, Put)]
        return super().batch(operations)

    def changes(self, after: bytes, until: bytes, limit: int) -> tuple[list[Change | Purged], bytes] | None:
        """Tell lies of what changed: of a removal too, if the lie makes a session of it."""
        found = super().changes(after, until, limit)
        if found is None:
            return None
        changes, position = found
        return list(map(self._retold, changes)), position

    def _retold(self, change: Change | Purged) -> Change | Purged:
        if isinstance(change, Purged):
            return change
        session = self._told(change.namespace, change.key, change.session)
        return Change(change.namespace, change.key, session)

    def _told(self, namespace: str, key: bytes, truth: StoredSession | None) -> StoredSession | None:
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
    """Run one in this process."""
    with contextlib.closing(LyingEngine()) as engine:
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
