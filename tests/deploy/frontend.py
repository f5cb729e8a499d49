"""The demo frontend, keeping a journal: a line of JSON in the file JOURNAL for each miss, and each call that failed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from resumed._policy.stats import Recorder
from resumed._transport.channel import Channel, Method
from resumed._transport.pool import ConnectionPool
from resumed_server.cli.demo import frontend as demo_frontend

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

    from resumed._transport.http2 import Connection
    from resumed._transport.target import SocketAddress

_Answer = TypeVar("_Answer")

JOURNAL = "JOURNAL"
"""The variable that names the file."""


def keep(journal: TextIO) -> None:
    """Write into `journal` from now on. Times are those of time.monotonic(), which all processes share."""

    def write(**entry: Any) -> None:
        journal.write(json.dumps({"at": time.monotonic(), **entry}) + "\n")

    def told(name: str, work: Callable[[], _Answer]) -> _Answer:
        started = time.monotonic()
        try:
            return work()
        except Exception as error:
            write(call=name, error=str(error), seconds=time.monotonic() - started)
            raise

    count, call, connect = Recorder.count, Channel.call, ConnectionPool._connect

    def counted(self: Recorder, kind: str, reason: str) -> None:
        count(self, kind, reason)
        if kind == "misses":
            write(miss=reason)

    def called(self: Channel, method: Method, message: bytes, timeout: float, metadata: bytes = b"") -> bytes:
        return told(method.path.rpartition("/")[2], lambda: call(self, method, message, timeout, metadata))

    def connected(self: ConnectionPool, where: SocketAddress, end: float) -> Connection:
        return told(f"connect {where[1]}", lambda: connect(self, where, end))

    Recorder.count, Channel.call, ConnectionPool._connect = counted, called, connected  # type: ignore[method-assign]


if __name__ == "__main__":
    keep(Path(os.environ[JOURNAL]).open("a", buffering=1))  # noqa: SIM115 - until the process ends
    demo_frontend.main()
