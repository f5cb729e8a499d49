"""Engines that wrap another engine keep its promises."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from resumed_server.observability.metrics.instrumented_engine import InstrumentedEngine
from resumed_server.observability.metrics.recorder import Recorder
from resumed_server.storage.engine import Change, Engine
from resumed_server.storage.lmdb.engine import LmdbEngine
from resumed_server.storage.testing.contract import EngineContract
from resumed_server.storage.wrapper import WrapperEngine
from support.lmdb import raw_values
from support.lying_store import LyingEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from resumed_server.storage.engine import NamespacePurged, Operation, Outcome, StoredSession
    from resumed_server.storage.testing.fixtures import FakeClock

CAPACITY = 64 << 20


class WrapperContract(EngineContract):
    """The promises of a wrapper around an LMDB database; a subclass overrides `wrap`."""

    @staticmethod
    def wrap(engine: Engine) -> Engine:
        raise NotImplementedError

    @pytest.fixture
    def wrapped(self, clock: FakeClock) -> LmdbEngine:
        return LmdbEngine(None, capacity=CAPACITY, clock=clock)

    @pytest.fixture
    def engine(self, wrapped: LmdbEngine) -> Iterator[Engine]:
        with contextlib.closing(self.wrap(wrapped)) as engine:
            yield engine

    @pytest.fixture
    def kept(self) -> tuple[int, int]:
        return CAPACITY // 2_048, CAPACITY // 2_048

    @pytest.fixture
    def raw_values(self, wrapped: LmdbEngine) -> Callable[[], dict[tuple[str, bytes], bytes]]:
        return lambda: raw_values(wrapped)


class TestWrapper(WrapperContract):
    wrap = staticmethod(WrapperEngine)


class TestInstrumented(WrapperContract):
    @staticmethod
    def wrap(engine: Engine) -> Engine:
        return InstrumentedEngine(engine, Recorder(lambda _namespace: True))


class TestLying(WrapperContract):
    """Without a lie it is an honest engine."""

    wrap = staticmethod(LyingEngine)


class WrongAddressEngine(WrapperEngine):
    """Stores every session under the reverse of its key, and finds it there."""

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
        return super().put(namespace, key[::-1], value, ttl, issued_at, pinned=pinned)

    def get(self, namespace: str, key: bytes) -> StoredSession | None:
        return super().get(namespace, key[::-1])

    def take(self, namespace: str, key: bytes) -> StoredSession | None:
        return super().take(namespace, key[::-1])

    def remove(self, namespace: str, key: bytes, *, ttl: float | None = None, tombstone: bool = True) -> bool | None:
        return super().remove(namespace, key[::-1], ttl=ttl, tombstone=tombstone)

    def batch(self, operations: Sequence[Operation]) -> list[Outcome]:
        return super().batch([replace(operation, key=operation.key[::-1]) for operation in operations])

    def changes(
        self, after: bytes, until: bytes, limit: int, *, removals_only: bool = False
    ) -> tuple[list[Change | NamespacePurged], bytes] | None:
        read = super().changes(after, until, limit, removals_only=removals_only)
        if read is None:
            return None
        return [replace(each, key=each.key[::-1]) if isinstance(each, Change) else each for each in read[0]], read[1]

    def removals(self, namespace: str, limit: int) -> Iterator[list[Change]]:
        for part in super().removals(namespace, limit):
            yield [replace(each, key=each.key[::-1]) for each in part]


class TestWrongAddress(WrapperContract):
    """Only the raw access of the contract notices."""

    wrap = staticmethod(WrongAddressEngine)

    @pytest.mark.xfail(strict=True, raises=AssertionError, reason="the contract finds it")
    def test_a_session_is_stored_under_its_own_address(
        self, engine: Engine, raw_values: Callable[[], dict[tuple[str, bytes], bytes]]
    ) -> None:
        super().test_a_session_is_stored_under_its_own_address(engine, raw_values)
