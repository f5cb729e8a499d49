"""Engine wrapper that counts operations by namespace and outcome, and records their durations."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from resumed_server.observability.metrics.recorder import COLUMN
from resumed_server.storage.engine import AlreadyExists, EngineError, EngineFull, Get, NoTombstone, Put, Take
from resumed_server.storage.wrapper import WrapperEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from resumed_server.observability.metrics.recorder import Recorder
    from resumed_server.storage.engine import Engine, Operation, Outcome, StoredSession

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_GET_HIT, _GET_MISS, _GET_FAILED = (COLUMN["get", outcome] for outcome in ("hit", "miss", "failed"))
_TAKE_HIT, _TAKE_MISS, _TAKE_FAILED = (COLUMN["take", outcome] for outcome in ("hit", "miss", "failed"))
_STORED, _REFUSED, _FULL, _PUT_FAILED = (COLUMN["put", outcome] for outcome in ("stored", "refused", "full", "failed"))
_REMOVED, _UNKNOWN = COLUMN["remove", "removed"], COLUMN["remove", "unknown"]
_REMOVE_LIMITED, _REMOVE_FAILED = COLUMN["remove", "limited"], COLUMN["remove", "failed"]


class InstrumentedEngine(WrapperEngine):
    """Counts the operations of `engine` with `recorder`, and records the durations of its calls."""

    def __init__(self, engine: Engine, recorder: Recorder) -> None:
        super().__init__(engine)
        self._count = recorder.operation
        self._put = _timed(super().put, recorder.on_storage_call)
        self._get = _timed(super().get, recorder.on_storage_call)
        self._take = _timed(super().take, recorder.on_storage_call)
        self._remove = _timed(super().remove, recorder.on_storage_call)
        self._batch = _timed(super().batch, recorder.on_storage_call)

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
        try:
            left = self._put(namespace, key, value, ttl, issued_at, pinned=pinned)
        except EngineError as error:
            self._count(namespace, _put_column(error))
            raise
        self._count(namespace, _STORED)
        return left

    def get(self, namespace: str, key: bytes) -> StoredSession | None:
        """See Engine."""
        try:
            session = self._get(namespace, key)
        except EngineError:
            self._count(namespace, _GET_FAILED)
            raise
        self._count(namespace, _GET_MISS if session is None else _GET_HIT)
        return session

    def take(self, namespace: str, key: bytes) -> StoredSession | None:
        """See Engine."""
        try:
            session = self._take(namespace, key)
        except EngineError:
            self._count(namespace, _TAKE_FAILED)
            raise
        self._count(namespace, _TAKE_MISS if session is None else _TAKE_HIT)
        return session

    def remove(self, namespace: str, key: bytes, *, ttl: float | None = None, tombstone: bool = True) -> bool | None:
        """See Engine."""
        try:
            removed = self._remove(namespace, key, ttl=ttl, tombstone=tombstone)
        except EngineError as error:
            self._count(namespace, _remove_column(error))
            raise
        self._count(namespace, _REMOVED if removed else _UNKNOWN)
        return removed

    def batch(self, operations: Sequence[Operation]) -> list[Outcome]:
        """See Engine."""
        try:
            outcomes = self._batch(operations)
        except EngineError as error:
            self._count_all(operations, [error] * len(operations))
            raise
        self._count_all(operations, outcomes)
        return outcomes

    def _count_all(self, operations: Sequence[Operation], outcomes: Sequence[Outcome]) -> None:
        for operation, outcome in zip(operations, outcomes, strict=True):
            self._count(operation.namespace, _column(operation, outcome))


def _timed(method: Callable[_Arguments, _Result], record: Callable[[float], object]) -> Callable[_Arguments, _Result]:
    """Return a method that also records its duration in seconds."""

    def timed(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        started = time.perf_counter()
        try:
            return method(*arguments, **options)
        finally:
            record(time.perf_counter() - started)

    return timed


def _column(operation: Operation, outcome: Outcome) -> int:
    """Return the column of COLUMN for an operation of a Batch."""
    failed = isinstance(outcome, EngineError)
    if isinstance(operation, Get):
        return _GET_FAILED if failed else _GET_MISS if outcome is None else _GET_HIT
    if isinstance(operation, Put):
        return _put_column(outcome) if isinstance(outcome, EngineError) else _STORED
    if isinstance(operation, Take):
        return _TAKE_FAILED if failed else _TAKE_MISS if outcome is None else _TAKE_HIT
    return _remove_column(outcome) if isinstance(outcome, EngineError) else _REMOVED if outcome else _UNKNOWN


def _remove_column(error: EngineError) -> int:
    return _REMOVE_LIMITED if isinstance(error, NoTombstone) else _REMOVE_FAILED


def _put_column(error: EngineError) -> int:
    if isinstance(error, AlreadyExists):
        return _REFUSED
    return _FULL if isinstance(error, EngineFull) else _PUT_FAILED
