"""Exceptions of the whole server, and their log lines."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from pathlib import Path

_INTERVAL_SECONDS = 10.0
"""Seconds between two log lines about the same cause."""
_MAX_CAUSES = 1_024
"""Maximum number of causes that are logged within that time."""
_last_logged: dict[tuple[str, ...], float] = {}
_lock = threading.Lock()


class UserError(Exception):
    """An error that the user must correct; each line names a problem and its remedy. The exit status is 2."""


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
