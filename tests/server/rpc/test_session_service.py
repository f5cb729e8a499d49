"""SessionStoreService without a network: the service, its limits, a real engine and its metrics in one process."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import pytest
from google.protobuf.duration_pb2 import Duration

from resumed.v1 import session_store_pb2 as pb
from resumed_server.limits.config import Limit
from resumed_server.limits.enforcer import LimitEnforcer, SharedCounters
from resumed_server.observability.metrics.instrumented_engine import InstrumentedEngine
from resumed_server.observability.metrics.recorder import OUTCOMES, Recorder
from resumed_server.rpc.session_service import SessionStoreService
from resumed_server.storage.lmdb.engine import LmdbEngine
from resumed_server.watch.hub import WatchHub

if TYPE_CHECKING:
    from collections.abc import Iterator

    import grpc


class Aborted(Exception):
    """The service ended the call with an error."""


class Context:
    """The part of grpc.ServicerContext that a rejected call uses."""

    def abort_with_status(self, _status: object) -> None:
        raise Aborted


CONTEXT = cast("grpc.ServicerContext", Context())


@contextlib.contextmanager
def metered(limit: Limit) -> Iterator[tuple[SessionStoreService, Recorder]]:
    """Return a service whose namespaces have `limit`, and the recorder of its metrics."""
    enforcer = LimitEnforcer(limit, shared=SharedCounters.create(lambda: 0.0))
    recorder = Recorder(lambda _: True)
    with contextlib.closing(LmdbEngine(None, capacity=1 << 20)) as engine:
        counted = InstrumentedEngine(engine, recorder)
        yield SessionStoreService(counted, WatchHub(engine), 600.0, enforcer=enforcer, observer=recorder), recorder


def put(key: bytes, namespace: str = "shop") -> pb.PutRequest:
    return pb.PutRequest(namespace=namespace, key=key, value=b"value", ttl=Duration(seconds=60))


def batch(*operations: Any) -> pb.BatchRequest:
    names = {pb.PutRequest: "put", pb.GetRequest: "get", pb.TakeRequest: "take", pb.RemoveRequest: "remove"}
    return pb.BatchRequest(operations=[pb.BatchOperation(**{names[type(each)]: each}) for each in operations])


def counts(recorder: Recorder, namespace: str = "shop") -> dict[tuple[str, str], int]:
    row = recorder.snapshot()["operations"][namespace]
    return {outcome: count for outcome, count in zip(OUTCOMES, row, strict=True) if count}


def test_puts_beyond_the_session_limit_count_as_limited_alone_and_in_a_batch() -> None:
    with metered(Limit(sessions=1)) as (service, recorder):
        service.Put(put(b"1"), CONTEXT)
        with pytest.raises(Aborted):
            service.Put(put(b"2"), CONTEXT)
        service.Batch(batch(put(b"3"), put(b"4"), pb.GetRequest(namespace="shop", key=b"1")), CONTEXT)
        assert counts(recorder) == {("put", "stored"): 1, ("put", "limited"): 3, ("get", "hit"): 1}


def test_removes_without_room_for_a_tombstone_count_as_limited() -> None:
    with metered(Limit(sessions=1)) as (service, recorder):
        service.Put(put(b"1"), CONTEXT)
        unknown = pb.RemoveRequest(namespace="shop", key=b"2")
        with pytest.raises(Aborted):
            service.Remove(unknown, CONTEXT)
        service.Batch(batch(unknown, pb.RemoveRequest(namespace="shop", key=b"1")), CONTEXT)
        assert counts(recorder) == {("put", "stored"): 1, ("remove", "limited"): 2, ("remove", "removed"): 1}


def test_a_flood_of_lasting_removals_is_bounded_by_the_session_limit() -> None:
    """A removal of a session, or one that prolongs another, needs no further entry."""

    def remove(key: bytes, seconds: int) -> pb.RemoveRequest:
        return pb.RemoveRequest(namespace="shop", key=key, ttl=Duration(seconds=seconds))

    with metered(Limit(sessions=3)) as (service, recorder):
        service.Put(put(b"session"), CONTEXT)
        service.Batch(batch(*(remove(b"%d" % number, 600) for number in range(100))), CONTEXT)
        for number in range(10):
            with pytest.raises(Aborted):
                service.Remove(remove(b"another %d" % number, 600), CONTEXT)
        service.Remove(remove(b"0", 900), CONTEXT)
        assert service.Remove(remove(b"session", 600), CONTEXT).removed
        assert counts(recorder) == {
            ("put", "stored"): 1, ("remove", "limited"): 108, ("remove", "removed"): 1, ("remove", "unknown"): 3
        }  # fmt: skip


def test_operations_beyond_the_rate_count_as_limited() -> None:
    key: Any = {"namespace": "shop", "key": b"1"}
    calls = [put(b"1"), pb.GetRequest(**key), pb.TakeRequest(**key), pb.RemoveRequest(**key)]
    with metered(Limit(operations_per_second=1)) as (service, recorder):
        service.Batch(batch(put(b"1"), put(b"1")), CONTEXT)
        for name, request in zip(("Put", "Get", "Take", "Remove", "Batch"), [*calls, batch(*calls)], strict=True):
            with pytest.raises(Aborted):
                getattr(service, name)(request, CONTEXT)
        limited = {(operation, "limited"): 2 for operation in ("put", "get", "take", "remove")}
        assert counts(recorder) == {("put", "stored"): 2, **limited}
