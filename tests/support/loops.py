"""A TLS frontend on an event loop in a thread of its own; connects to Client as any other Frontend does."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ssl
import threading
from typing import TYPE_CHECKING, Any, Literal

from support.tls import PATIENCE, Frontend

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    import resumed

Loop = Literal["asyncio", "uvloop"]
LOOPS: tuple[Loop, ...] = ("asyncio", "uvloop")


class LoopFrontend(Frontend):
    """An echo server on an event loop.

    Attributes:
        complaints: Errors passed to the loop's exception handler.
    """

    def __init__(self, loop: Loop, target: str | None, keyring: resumed.Keyring | None = None, **options: Any) -> None:
        super().__init__("ssl", target, keyring, **options)
        self.complaints: list[Any] = []
        self.loop = _new(loop)
        self.loop.set_exception_handler(lambda _loop, told: self.complaints.append(told))
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def serve(self, connection: socket.socket) -> None:
        """Shake hands and echo until the client goes, as Frontend.serve() does."""
        with contextlib.suppress(OSError, ssl.SSLError, concurrent.futures.CancelledError):
            self.run(self._serve(connection))

    def run(self, coroutine: Any) -> Any:
        """Run `coroutine` on the loop and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE)

    def stop(self) -> None:
        """Close the loop, even with handshakes in progress."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the loop hangs"
        self.loop.close()

    async def _serve(self, connection: socket.socket) -> None:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await self.loop.connect_accepted_socket(lambda: protocol, connection, ssl=self.context)
        writer = asyncio.StreamWriter(transport, protocol, reader, self.loop)
        try:
            while data := await reader.read(16_384):
                writer.write(data)
                await writer.drain()
        finally:
            transport.abort()


@contextlib.contextmanager
def running(frontend: LoopFrontend) -> Iterator[LoopFrontend]:
    """Hand a frontend out and stop it in the end; nothing may have gone wrong on its loop."""
    try:
        yield frontend
    finally:
        frontend.stop()
    assert not frontend.complaints


def _new(loop: Loop) -> asyncio.AbstractEventLoop:
    if loop == "uvloop":
        import uvloop

        made: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        return made
    return asyncio.new_event_loop()
