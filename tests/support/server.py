"""A real server in a process of its own: `with running_server() as server: ...`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

COMMAND = (sys.executable, "-m", "resumed_server", "serve")
PATIENCE = 30.0
"""Seconds that a server may take for anything; only a broken one takes them."""


class RunningServer:
    """A server in a process of its own; `target` is where it listens, once it is ready."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=cwd,
            env={**os.environ, **(env or {})},
        )
        self.target = ""
        self._log: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def log_lines(self, event: str | None = None) -> list[dict[str, Any]]:
        """Return the log so far, or only its lines about `event`. A line that is no JSON comes as {"text": line}."""
        return [line for line in map(_parse_line, list(self._log)) if event in {None, line.get("event")}]

    def wait_for_log(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait until `event` was logged `count` times and return these lines."""
        deadline = time.monotonic() + PATIENCE
        with self._news:
            while len(lines := self.log_lines(event)) < count:
                assert self._reader.is_alive() and time.monotonic() < deadline, (  # noqa: PT018
                    f"not {count} times {event!r} in the log:\n{''.join(self._log)}"
                )
                self._news.wait(0.1)
        return lines

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to the server's (first) process."""
        self.process.send_signal(number)

    def stop(self) -> int:
        """End the server as an operator would, and return its exit status."""
        if self.process.poll() is None:
            self.signal()
        return self.wait()

    def kill(self) -> None:
        """End the server with no time to tidy up."""
        self.process.kill()
        self.wait()

    def wait(self) -> int:
        """Wait until the server has ended and return its exit status."""
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status

    def _read(self) -> None:
        assert self.process.stderr
        with self.process.stderr as lines:
            for line in lines:
                with self._news:
                    self._log.append(line)
                    self._news.notify_all()


@contextlib.contextmanager
def running_server(
    *options: str, listen: str = "127.0.0.1:0", workers: int = 1, env: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """Run `resumed serve` with `options`, hand it out when every worker is ready, and end it without a drain."""
    server = start_server("--listen", listen, "--workers", str(workers), "--shutdown-delay", "0s", *options, env=env)
    try:
        server.target = server.wait_for_log("listening", workers)[0]["addresses"][0]
        server.wait_for_log("ready", workers)
        yield server
    finally:
        server.stop()


def start_server(*options: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> RunningServer:
    """Run `resumed serve` with `options` and wait for nothing."""
    return RunningServer([*COMMAND, *options], env, cwd)


def _parse_line(line: str) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError:
        return {"text": line.rstrip("\n")}
    return parsed if isinstance(parsed, dict) else {"text": line.rstrip("\n")}
