"""Observers of calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from grpc import ServicerContext


class Observer(Protocol):
    """Is told of every call, by the request, the answer and the context that its method had."""

    def on_success(self, method: str, seconds: float, request: Any, response: Any, context: ServicerContext, /) -> None:
        """Note a call of `method` that was answered after `seconds`."""

    def on_failure(self, method: str, code: int, seconds: float, request: Any, context: ServicerContext, /) -> None:
        """Note a call that ended with the status `code`, by its number."""

    def on_limited(self, operation: str, namespace: str, /) -> None:
        """Note an operation (get, put, take or remove), alone or of a Batch, that a limit of its namespace refused."""


class NullObserver:
    """An observer who notes nothing."""

    def on_success(self, *_: object) -> None:
        """See Observer."""

    def on_failure(self, *_: object) -> None:
        """See Observer."""

    def on_limited(self, *_: object) -> None:
        """See Observer."""


class HasObserver(Protocol):
    """A servicer whose calls are observed."""

    observer: Observer
