"""The interface to an event loop: how a suspended handshake is resumed.

A handshake is resumed as if bytes had arrived on its connection, but none. The event loops do not say which protocol
drives a TLS object, so an adapter of each has to find it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import ssl

Resume: TypeAlias = Callable[[], None]
"""Schedules the next step of a handshake, from any thread."""
FindResume: TypeAlias = Callable[[], "Resume | None"]
"""Finds the Resume of a handshake, during one of its steps; returns None if nothing would take the next step."""


class LoopAdapter(Protocol):
    """Suspends handshakes of one event loop."""

    def __call__(self, incoming: ssl.MemoryBIO, /) -> FindResume | None:
        """Return the FindResume of a TLS object that is being made to read from `incoming`; None for another loop's."""


def make_resume(loop: Any, protocol: Any) -> Resume:
    """Return the Resume of a handshake that a protocol of asyncio's kind drives on `loop`."""

    def step() -> None:
        # Both are public parts of asyncio's protocols. Up to Python 3.10 it is not a buffered one.
        if hasattr(protocol, "buffer_updated"):
            protocol.buffer_updated(0)
        else:
            protocol.data_received(b"")

    def resume() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the connection
            loop.call_soon_threadsafe(step)

    return resume
