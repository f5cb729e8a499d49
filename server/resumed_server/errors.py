"""Exceptions of the whole server, and their log lines."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from enum import IntEnum
from pathlib import Path

_INTERVAL_SECONDS = 10.0
"""Seconds between two log lines about the same cause."""
_MAX_CAUSES = 1_024
"""Maximum number of causes that are logged within that time."""
_last_logged: dict[tuple[str, ...], float] = {}
_lock = threading.Lock()


class ExitStatus(IntEnum):
    """The exit statuses of all commands; see EXIT_STATUSES for their meaning."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    RETRY = 3


EXIT_STATUSES = {
    ExitStatus.DONE: "done, and all is as it should be",
    ExitStatus.FAILED: "not as it should be: a check failed, a session did not resume, the store rejected a call",
    ExitStatus.USAGE: "wrong use: an argument, an option or a file is invalid, and nothing was done",
    ExitStatus.RETRY: "try later: the store cannot be reached or cannot serve now, or a key rotation must wait",
}
"""The meaning of each exit status. Besides these, 130 is an interruption by the user."""


class UserError(Exception):
    """An error that ends a command; each line of the message names a problem and its remedy.

    Attributes:
        status: The exit status of the command.
    """

    def __init__(self, message: str, status: ExitStatus = ExitStatus.USAGE) -> None:
        super().__init__(message)
        self.status = status


def print_error(error: UserError) -> None:
    """Print the lines of an error to standard error."""
    sys.stderr.write("".join(f"resumed: {problem}\n" for problem in str(error).splitlines()))
    sys.stderr.flush()


class OutsideFailure(Exception):
    """A failure outside of the process, such as in the storage. The text contains no secret and may be logged."""


class Stopping(Exception):
    """The server is shutting down and accepts no more calls; the storage and other servers are available."""


def should_log(*cause: str) -> bool:
    """Return whether to log a cause, identified by the words of `cause`: once in _INTERVAL_SECONDS.

    Beyond _MAX_CAUSES, no further cause is logged within that time, so callers that invent words cannot fill the disk.
    """
    now = time.monotonic()
    with _lock:
        while _last_logged and now - next(iter(_last_logged.values())) >= _INTERVAL_SECONDS:
            del _last_logged[next(iter(_last_logged))]  # the oldest is the first
        if cause in _last_logged or len(_last_logged) >= _MAX_CAUSES:
            return False
        _last_logged[cause] = now
        return True


def exception_fields(error: BaseException) -> dict[str, str]:
    """Return the type of `error` and its stack frames. Its text and its variables may contain secrets."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    return {"error": type(error).__qualname__, "where": where}
