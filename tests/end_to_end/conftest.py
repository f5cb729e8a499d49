from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

import resumed
from support.server import running_server
from support.tls import STACKS, VERSIONS, Client

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.server import RunningServer
    from support.tls import Stack

# A shell's background jobs ignore it, and so would all that the tests start and then interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def store() -> Iterator[RunningServer]:
    """A real server, shared by all tests that do not harm it."""
    with running_server() as server:
        yield server


@pytest.fixture
def keyring() -> resumed.Keyring:
    """A fleet key for each test, so that sessions of other tests cannot be decrypted."""
    return resumed.Keyring.from_keys([os.urandom(32)])


@pytest.fixture(params=STACKS)
def stack(request: pytest.FixtureRequest) -> Stack:
    stack: Stack = request.param
    return stack


@pytest.fixture(params=VERSIONS, ids=lambda version: version.name)
def client(request: pytest.FixtureRequest) -> Client:
    return Client(request.param)
