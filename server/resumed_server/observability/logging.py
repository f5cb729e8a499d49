"""Structured logs: one line per event, to standard error. Nothing per request, and never a key or a value."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, WrappedLogger

_INTERVAL = 10.0
"""Seconds between two log lines about the same cause."""
_MOST_REMEMBERED = 1_024
_last_logged: dict[tuple[str, ...], float] = {}
_lock = threading.Lock()


def configure(log_format: str, level: str) -> None:
    """Send every event of this process to standard error, as "json" or "console" lines."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_process,
            structlog.processors.JSONRenderer()
            if log_format == "json"
            else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        # Writes each line in one piece, so the lines of several workers do not mix.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    logging.basicConfig(handlers=[_Forwarder()], level=logging.WARNING, force=True)


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


def _add_process(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event["process"] = os.getpid()
    return event


class _Forwarder(logging.Handler):
    """Makes one such line of what libraries log; grpc for one logs whole tracebacks."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        details = described(error) if error else {"where": f"{record.filename}:{record.lineno} {record.funcName}"}
        # Whoever sends grpc nonsense has it log an error, and may send it as often as they like.
        if is_news(record.name, *details.values()):
            structlog.get_logger().log(record.levelno, "library", library=record.name, **details)
