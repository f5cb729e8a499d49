"""A store that is far away: `with distant(target, 0.02) as target: ...`, through a proxy in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK = 65_536


@contextlib.contextmanager
def distant(target: str, seconds: float) -> Iterator[str]:
    """Yield a "host:port" behind which `target` answers `seconds` later."""
    command = [sys.executable, __file__, target, str(seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


async def _proxy(target: str, seconds: float) -> None:
    host, port = target.rsplit(":", 1)

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
        """Pass bytes on, `delay` seconds late, in their order."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                loop.call_later(delay, writer.write, data)
        loop.call_later(delay, writer.close)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, up = await asyncio.open_connection(host, int(port))
        await asyncio.gather(carry(reader, up, 0), carry(upstream, writer, seconds))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    listening = server.sockets[0].getsockname()
    print(f"{listening[0]}:{listening[1]}", flush=True)  # noqa: T201  # told to distant()
    async with server:
        # The parent process closes our input when it ends, even by SIGKILL.
        await asyncio.to_thread(sys.stdin.read)
    # Open connections end with the process.


if __name__ == "__main__":
    asyncio.run(_proxy(sys.argv[1], float(sys.argv[2])))
