"""Errors that the whole server shares, and how they are reported."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from pathlib import Path

_INTERVAL = 10.0
"""Seconds between two log lines about the same cause."""
_MOST_REMEMBERED = 1_024
_last_logged: dict[tuple[str, ...], float] = {}
_lock = threading.Lock()


class UserError(Exception):
    """Something that the user has to put right; each line says what is wrong and what to do. Exit status 2."""


def tell(error: UserError) -> None:
    """Write what is wrong to standard error, a line for each problem."""
    sys.stderr.write("".join(f"resumed: {problem}\n" for problem in str(error).splitlines()))
    sys.stderr.flush()


class OutsideFailure(Exception):
    """Something outside of the process failed, such as the storage; the text holds no secret and may be logged."""


class Stopping(Exception):
    """The server is shutting down and accepts no more calls; the storage and other servers are available."""


def is_news(*same: str) -> bool:
    """Return whether what the words of `same` tell was not logged in the last seconds: nobody is to fill the disk.

    Of more causes than _MOST_REMEMBERED within that time none is, whatever a caller may have chosen their words from.
    """
    now = time.monotonic()
    with _lock:
        while _last_logged and now - next(iter(_last_logged.values())) >= _INTERVAL:
            del _last_logged[next(iter(_last_logged))]  # the oldest is the first
        if same in _last_logged or len(_last_logged) >= _MOST_REMEMBERED:
            return False
        _last_logged[same] = now
        return True


def described(error: BaseException) -> dict[str, str]:
    """Return the type of `error` and the way it came; its text and the variables on the way may hold a secret."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    way = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    return {"error": type(error).__qualname__, "where": way}
