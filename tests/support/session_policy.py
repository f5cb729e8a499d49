"""A session policy on a store in memory, and the steps of a handshake without TLS."""

from __future__ import annotations

import itertools
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import resumed
from resumed._client.store import Operation, Put, Result, StoreClient, StoredSession
from resumed._crypto.envelope import Envelope
from resumed._crypto.keyring import Keyring
from resumed._policy.served_names import Expected
from resumed._policy.session_policy import SessionPolicy
from support.clock import Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from resumed._policy.lookups import LookupResult


PATIENCE = 10.0
NOT_FRESH = 11.0
"""Age in seconds up to which an unknown id is looked up again."""
KEYRING = Keyring.from_keys([os.urandom(32)])
NONCES = itertools.count()


class FakeStore(StoreClient):
    """A store in a dictionary, whose calls wait for `gate` and fail with `failure`."""

    def __init__(self, deadline: float = 5.0) -> None:
        super().__init__("fake:1", namespace="shop", deadline=deadline)
        self.kept: dict[bytes, bytes] = {}
        self.gets: list[bytes] = []
        self.batches: list[list[Operation]] = []
        self.sizes: list[int] = []
        """Operations of each Batch that has begun."""
        self.gate = threading.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.refuses = False
        self.loses_answers = 0

    def _pass(self) -> None:
        assert self.gate.wait(PATIENCE)
        if self.failure:
            raise self.failure

    def get(self, key: bytes, *, deadline: float | None = None) -> StoredSession | None:
        self.gets.append(key)
        self._pass()
        return StoredSession(self.kept[key], 1.0) if key in self.kept else None

    def take(self, key: bytes, *, deadline: float | None = None) -> StoredSession | None:
        self.gets.append(key)
        self._pass()
        value = self.kept.pop(key, None)
        return StoredSession(value, 1.0) if value is not None else None

    def batch(self, operations: Sequence[Operation], *, deadline: float | None = None) -> list[Result]:
        self.sizes.append(len(operations))
        self._pass()
        self.batches.append(list(operations))
        if self.loses_answers:
            self.loses_answers -= 1
            raise resumed.StoreTimeout("no answer")
        results: list[Result] = []
        for operation in operations:
            if self.refuses:
                results.append(resumed.AlreadyExists("no"))
            elif isinstance(operation, Put):
                self.kept[operation.key] = operation.value
                results.append(operation.ttl)
            else:
                results.append(self.kept.pop(operation.key, None) is not None)
        return results


START = 1_800_000_000.0
"""Unix seconds at which the clocks of these tests begin."""


def shim_on(store: FakeStore, **options: Any) -> tuple[SessionPolicy, Clock]:
    clock = Clock(START)
    return SessionPolicy(store, KEYRING, clock=clock, **options), clock


FINGERPRINT = bytes(range(32))
ENVELOPE = Envelope(FINGERPRINT, 1.7e9, b"serialized")


def decode(serialized: bytes, remaining: float) -> int:
    return len(serialized) * 1_000_000 + int(remaining)


@dataclass
class Offer:
    session_id: bytes
    expected: Expected = Expected(FINGERPRINT)  # noqa: RUF009  # it is immutable
    decodes: Callable[[bytes, float], int] = decode

    def check(self, envelope: Envelope) -> None:
        self.decodes(envelope.session, 0.0)

    def decode(self, envelope: Envelope, remaining: float) -> int:
        return self.decodes(envelope.session, remaining)


def look_up(shim: SessionPolicy, offer: Offer, found: Future[LookupResult] | None = None) -> int | None:
    """Look a session up in a handshake of its own, for which that was prefetched."""
    handshake = shim.handshake()
    handshake._results |= {offer.session_id: found} if found else {}
    return shim.on_get_session(offer, handshake)


def prefetch(shim: SessionPolicy, offer: Offer) -> Future[LookupResult]:
    """Start the look-up of a handshake that can be suspended."""
    return shim.find(offer, shim.handshake(lambda: lambda: None), may_suspend=True)


def negotiate(shim: SessionPolicy, remaining: int = 7200) -> bytes:
    """Store a session of ten bytes and return its id."""
    session_id = shim.issue_id()
    shim.on_new_session(session_id, ENVELOPE, remaining, last=True)
    assert shim.flush(PATIENCE)
    return session_id
