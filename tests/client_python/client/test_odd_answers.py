"""Responses that no honest server sends (docs/fuzzing.md) cause at most an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from resumed._client.store import Get, StoreClient, StoredSession
from resumed._exceptions import StoreError, from_status
from resumed._policy.mirror import SessionCache
from resumed.v1 import session_store_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.message import Message

KEY = bytes(32)


class Channel:
    def __init__(self, answer: Message) -> None:
        self._answer = answer.SerializeToString()

    def call(self, *_: object) -> bytes:
        return self._answer


def store_that_answers(answer: Message) -> StoreClient:
    store = StoreClient("unix:/nowhere", namespace="shop")
    channel: Any = Channel(answer)
    store._channel = channel
    return store


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_batch_with_more_or_fewer_results_than_operations(count: int) -> None:
    store = store_that_answers(pb.BatchResponse(results=[pb.BatchResult(get=pb.GetResponse())] * count))
    with pytest.raises(StoreError, match=f"the answer has {count} results, not 2"):
        store.batch([Get(KEY), Get(KEY)])


@pytest.mark.parametrize("code", [-(2**31), -100, -1, 17, 2**31 - 1])
def test_a_status_that_grpc_does_not_have(code: int) -> None:
    result = pb.BatchResult()
    result.error.code = code
    [refused] = store_that_answers(pb.BatchResponse(results=[result])).batch([Get(KEY)])
    assert str(refused) == f"status {code}: "


def test_words_of_a_store_are_one_line_of_a_log() -> None:
    error = from_status(14, "down\r\nlevel=info all is well \x1b[2J" + "." * 5_000)
    assert str(error).isprintable()
    assert str(error).startswith("UNAVAILABLE: down  level=info all is well  [2J...")
    assert len(str(error)) < 1_100


@pytest.mark.parametrize("seconds", [2.0**62, -(2.0**62)])
def test_a_session_that_lives_for_ages_or_is_over_for_ages(seconds: float) -> None:
    sessions = SessionCache(1_000, lambda: 1_000.0)
    sessions.put(KEY, StoredSession(b"sealed", seconds))
    assert sessions.get(KEY) == (b"sealed" if seconds > 0 else None)
    sessions.put(bytes(16), StoredSession(b"sealed", 60.0))
    assert sessions.get(bytes(16)) == b"sealed"
