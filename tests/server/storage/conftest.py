"""Fixtures of engines, and failed assertions of the shared suites that show the compared values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.redis import valkey_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.redis import RedisServer

pytest.register_assert_rewrite("resumed_server.storage.testing")


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with valkey_server() as server:
        yield server
