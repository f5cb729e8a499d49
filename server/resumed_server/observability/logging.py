"""Structured logs: one line per event on standard error. Requests are not logged, and no line has a key or a value."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import structlog
from structlog.processors import CallsiteParameter, CallsiteParameterAdder

from resumed_server.errors import exception_fields, should_log

if TYPE_CHECKING:
    from structlog.typing import Processor

    from resumed_server.errors import UserError


def configure(log_format: str, level: str) -> None:
    """Write the events of this process to standard error, in the format "json" or "console"."""
    structlog.configure(
        processors=_processors(log_format),
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        # Writes each line at once, so that lines of several workers do not mix.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    logging.basicConfig(handlers=[_StdlibBridge()], level=logging.WARNING, force=True)


def log_start_error(error: UserError) -> None:
    """Log the lines of an error that prevents the start of a process."""
    _log_lines(structlog.get_logger(), error)


def print_start_error(error: UserError) -> None:
    """Print the lines of an error as lines of a log in JSON, before configure() is called."""
    _log_lines(structlog.wrap_logger(structlog.WriteLogger(sys.stderr), processors=_processors("json")), error)


def _log_lines(log: Any, error: UserError) -> None:
    for problem in str(error).splitlines():
        log.critical("cannot start", problem=problem)


def _processors(log_format: str) -> list[Processor]:
    return [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        CallsiteParameterAdder([CallsiteParameter.PROCESS]),
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
    ]


class _StdlibBridge(logging.Handler):
    """Forwards records of the standard library's logging, without message and traceback, which may hold secrets."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        details = (
            exception_fields(error) if error else {"where": f"{record.filename}:{record.lineno} {record.funcName}"}
        )
        # A client can cause an error of grpc by an invalid request, as often as it likes.
        if should_log(record.name, *details.values()):
            structlog.get_logger().log(record.levelno, "library", library=record.name, **details)
