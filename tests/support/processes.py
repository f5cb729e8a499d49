"""Servers of other programs, in processes of their own on ports of 127.0.0.1."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.waiting import PATIENCE, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def listening_process(process: subprocess.Popen[Any], port: int, log: Callable[[], str] = str) -> Iterator[None]:
    """Wait until a process listens at a port, and end it with the context; `log` returns its output."""
    end = time.monotonic() + PATIENCE
    try:
        while not is_listening(port):
            assert process.poll() is None, f"{process.args!r} did not start:\n{log()}"
            assert time.monotonic() < end, f"{process.args!r} does not listen:\n{log()}"
            time.sleep(0.02)
        yield
    finally:
        stop(process)


@contextlib.contextmanager
def paused(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Stop a process, wait until none of its threads runs any more, and let it go on with the end of the context."""
    threads = Path(f"/proc/{process.pid}/task")
    process.send_signal(signal.SIGSTOP)
    try:
        until(lambda: all("\nState:\tT" in status.read_text() for status in threads.glob("*/status")))
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def is_listening(port: int) -> bool:
    """Return whether a process listens at a port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process with SIGTERM, or with SIGKILL if it takes longer than PATIENCE."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
