"""Redis engines for tests: how to open one, how to make it fail, and a clock for servers."""

from __future__ import annotations

import contextlib
import time
import uuid
from typing import TYPE_CHECKING, NamedTuple

import pytest

from resumed_server.storage.engine import (
    Engine,
    EngineError,
    EngineUnavailable,
)
from resumed_server.storage.registry import open_engine
from resumed_server.storage.testing.fixtures import FakeClock
from support.redis import redis_server, valkey_cluster, valkey_sentinels, valkey_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from support.redis import RedisServer


PATIENT = "timeout_ms=5000"
"""Generous, because tests run on loaded machines."""
DRIFT = 2.0
"""Seconds that a test may take on the engine's own clock."""


class Store(NamedTuple):
    """Something that a URL names, and the servers that keep its keys."""

    url: str
    servers: Sequence[RedisServer]

    def open(self, options: str = PATIENT) -> Engine:
        """Open an engine with keys of its own."""
        return open_engine(f"{self.url}?prefix={uuid.uuid4()}:&{options}", capacity=0)


@contextlib.contextmanager
def on_redis() -> Iterator[Store]:
    with redis_server() as server:
        yield Store(server.url, [server])


@contextlib.contextmanager
def on_valkey() -> Iterator[Store]:
    with valkey_server() as server:
        yield Store(server.url, [server])


@contextlib.contextmanager
def on_cluster() -> Iterator[Store]:
    with valkey_cluster() as cluster:
        yield Store(cluster.url, cluster.nodes)


@contextlib.contextmanager
def on_sentinels() -> Iterator[Store]:
    """A primary and its replica, found through Sentinels."""
    with valkey_sentinels() as sentinels:
        yield Store(sentinels.url, [sentinels.primary])


_BRING_NEARER = """#!lua flags=allow-cross-slot-keys
local cursor = '0'
repeat
  local found = redis.call('SCAN', cursor, 'COUNT', 1000)
  cursor = found[1]
  for _, key in ipairs(found[2]) do
    redis.call('PEXPIRE', key, redis.call('PTTL', key) - ARGV[1])
    if redis.call('TYPE', key)['ok'] == 'zset' then
      local ends = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
      for at = 1, #ends, 2 do redis.call('ZADD', key, string.format('%.0f', ends[at + 1] - ARGV[1]), ends[at]) end
    end
  end
until cursor == '0'"""


class RedisClock(FakeClock):
    """Lets the time of servers, which begin empty, pass by bringing the ends of keys and removals nearer."""

    def __init__(self, servers: Sequence[RedisServer]) -> None:
        super().__init__()
        self._servers = servers
        for server in servers:
            server.client.flushall()

    def advance(self, seconds: float) -> None:
        super().advance(seconds)
        for server in self._servers:
            server.client.eval(_BRING_NEARER, 0, round(seconds * 1_000))


def engine_at(url: str, options: str = "") -> contextlib.closing[Engine]:
    """Open an engine, to be closed at the end."""
    return contextlib.closing(open_engine(f"{url}?{options}", capacity=0))


def catch_failure(call: Callable[[], object]) -> EngineUnavailable:
    """Return the type of the error of a call."""
    with pytest.raises(EngineUnavailable) as caught:
        call()
    return caught.value


def is_working(engine: Engine, *, wait: bool = True) -> bool:
    time.sleep(0.02 if wait else 0)
    try:
        engine.probe()
        engine.put("shop", uuid.uuid4().bytes, b"value", 60.0)
    except EngineError:
        return False
    return True
