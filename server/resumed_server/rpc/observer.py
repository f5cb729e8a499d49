"""Observers of calls: metrics and tracing implement them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from grpc import ServicerContext


class Observer(Protocol):
    """Is notified of each call, with the request, the response and the context of its method."""

    def on_success(self, method: str, seconds: float, request: Any, response: Any, context: ServicerContext, /) -> None:
        """Record a call of `method` that succeeded after `seconds`."""

    def on_failure(self, method: str, code: int, seconds: float, request: Any, context: ServicerContext, /) -> None:
        """Record a call of `method` that ended with the status `code` after `seconds`."""

    def on_limited(self, operation: str, namespace: str, /) -> None:
        """Record an operation (get, put, take or remove) that a limit of its namespace rejected, in a Batch or not."""


class NullObserver:
    """An observer that records nothing."""

    def on_success(self, *_: object) -> None:
        """See Observer."""

    def on_failure(self, *_: object) -> None:
        """See Observer."""

    def on_limited(self, *_: object) -> None:
        """See Observer."""


class HasObserver(Protocol):
    """A servicer whose calls are observed."""

    observer: Observer
