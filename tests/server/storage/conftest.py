"""Fixtures of engines, and failed assertions of the shared suites that show the compared values."""

# ruff: noqa: E402 - the registration precedes the first import of the suites
from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

pytest.register_assert_rewrite("resumed_server.storage.testing")  # before the first import of the suites

from resumed_server.storage.lmdb.engine import LmdbEngine
from resumed_server.storage.testing.fixtures import FakeClock
from support.lmdb_engine import ROOMY
from support.redis import valkey_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.redis import RedisServer


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with valkey_server() as server:
        yield server


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def open_lmdb(tmp_path: Path, clock: FakeClock) -> Iterator[Callable[..., LmdbEngine]]:
    """A function that opens a database; the fixture closes its engines."""
    with contextlib.ExitStack() as stack:

        def open_lmdb(path: Path = tmp_path / "db", *, capacity: int = ROOMY) -> LmdbEngine:
            return stack.enter_context(contextlib.closing(LmdbEngine(path, capacity=capacity, clock=clock)))

        yield open_lmdb
