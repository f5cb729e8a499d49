"""Decorators of RPCs: the status and the observer of a call that fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest

from resumed_server.errors import Stopping
from resumed_server.rpc.handlers import stream_handler
from resumed_server.storage.engine import EngineUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator


class Aborting:
    """The part of a context that a failing call uses."""

    def abort_with_status(self, status: grpc.Status) -> None:
        assert status.code is grpc.StatusCode.UNAVAILABLE
        raise InterruptedError


@pytest.mark.parametrize(
    ("error", "code"),
    [(Stopping(), "CANCELLED"), (EngineUnavailable("gone"), "UNAVAILABLE")],
    ids=lambda each: type(each).__name__,
)
def test_a_stream_that_ends_with_its_server_counts_as_cancelled(error: Exception, code: str) -> None:
    """Its client receives UNAVAILABLE."""
    counted: list[int] = []

    class Service:
        observer: Any = SimpleNamespace(on_failure=lambda _method, code, *_: counted.append(code))

        @stream_handler
        def watch(self, _request: object, _context: object) -> Iterator[None]:
            """Raise `error` at once."""
            yield from ()
            raise error

    with pytest.raises(InterruptedError):
        list(Service().watch(None, cast("grpc.ServicerContext", Aborting())))
    assert counted == [getattr(grpc.StatusCode, code).value[0]]
