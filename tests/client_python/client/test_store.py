"""StoreClient against a real server."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import resumed
from resumed import Get, Put, Remove, StoreClient, StoredSession, Take
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with running_server() as server:
        yield server.target


@pytest.fixture
def store(target: str) -> Iterator[StoreClient]:
    """A client with a deadline that suits a loaded machine."""
    store = StoreClient(target, namespace="shop", deadline=10)
    yield store
    store.close()


@pytest.fixture
def key() -> bytes:
    return os.urandom(32)


def test_a_session_comes_back_with_the_rest_of_its_life(store: StoreClient, key: bytes) -> None:
    assert store.put(key, b"value", 100.5) <= 100.5
    found = store.get(key)
    assert found is not None
    assert found.value == b"value"
    assert 0 < found.ttl <= 100.5


def test_ids_are_write_once(store: StoreClient, key: bytes) -> None:
    store.put(key, b"value", 100)
    store.put(key, b"value", 100)
    with pytest.raises(resumed.AlreadyExists):
        store.put(key, b"another", 100)


def test_a_taken_session_is_gone_for_good(store: StoreClient, key: bytes) -> None:
    store.put(key, b"value", 100)
    assert store.take(key) is not None
    assert store.take(key) is None
    with pytest.raises(resumed.AlreadyExists):
        store.put(key, b"value", 100)


def test_remove_returns_whether_there_was_a_session(store: StoreClient, key: bytes) -> None:
    store.put(key, b"value", 100)
    assert [store.remove(key), store.remove(key)] == [True, False]
    assert store.get(key) is None


@pytest.mark.parametrize(
    ("key", "value", "ttl", "field"),
    [
        (b"", b"v", 1, "key"),
        (bytes(65), b"v", 1, "key"),
        (b"k", b"", 1, "value"),
        (b"k", bytes(65_537), 1, "value"),
        (b"k", b"v", 0, "ttl"),
        (b"k", b"v", -1.5, "ttl"),
    ],
)
def test_limits_are_errors_that_name_the_field(
    store: StoreClient, key: bytes, value: bytes, ttl: float, field: str
) -> None:
    with pytest.raises(resumed.InvalidRequest, match=field):
        store.put(key, value, ttl)


def test_a_batch_longer_than_one_call_answers_everything_in_order(store: StoreClient) -> None:
    keys = [os.urandom(32) for _ in range(300)]
    puts = [Put(key, b"%d" % number, 100) for number, key in enumerate(keys)]
    results = store.batch([*puts, *(Get(key) for key in keys)])
    assert [each.value for each in results[300:] if isinstance(each, StoredSession)] == [put.value for put in puts]


def test_a_batch_of_large_values_is_split_by_size(store: StoreClient) -> None:
    keys = [os.urandom(32) for _ in range(300)]
    results = store.batch([Put(key, bytes(65_536), 100) for key in keys])
    assert all(isinstance(result, float) and result > 99 for result in results)


def test_one_failing_operation_does_not_fail_the_others(store: StoreClient, key: bytes) -> None:
    results = store.batch(
        [Put(key, b"a", 100), Put(key, b"b", 100), Put(key, b"", 100), Take(key), Remove(key), Get(key)]
    )
    assert isinstance(results[1], resumed.AlreadyExists)
    assert isinstance(results[2], resumed.InvalidRequest)
    assert isinstance(results[3], StoredSession)
    assert results[4:] == [False, None]


def test_namespaces_are_apart(target: str, store: StoreClient, key: bytes) -> None:
    store.put(key, b"value", 100)
    assert StoreClient(target, namespace="bank", deadline=10).get(key) is None


def test_no_store_is_an_error_that_says_so() -> None:
    with pytest.raises(resumed.StoreUnavailable):
        StoreClient("127.0.0.1:1", namespace="shop").get(b"k")


def test_a_closed_store_connects_again(store: StoreClient, key: bytes) -> None:
    store.put(key, b"value", 100)
    store.close()
    store.close()
    assert store.get(key) is not None


def test_the_first_answer_of_a_stream_is_a_batch_of_it(store: StoreClient) -> None:
    """A mirror is up to date with that answer, and not one heartbeat later."""
    with store.watch() as watch:
        watch.cancel()  # nothing else is received
        assert next(iter(watch)).live
