"""Log lines of native libraries: gRPC's core writes text to standard error, a line for each TLS handshake that fails.

Here a thread reads these lines, counts the failed handshakes by reason, and logs each kind of line once in a while.
Python's own output goes to a copy of standard error.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import sys
import threading
from typing import TYPE_CHECKING

import structlog

from resumed_server.errors import exception_fields, should_log

if TYPE_CHECKING:
    from collections.abc import Callable

_STDERR = 2
_OTHER = "other"
_CAUSES = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no-certificate",
    "CERTIFICATE_VERIFY_FAILED": "untrusted-certificate",
    "WRONG_VERSION_NUMBER": "not-tls",
    "HTTP_REQUEST": "not-tls",
    "HTTPS_PROXY_REQUEST": "not-tls",
}
REASONS = (*dict.fromkeys(_CAUSES.values()), _OTHER)
"""Why a TLS handshake fails. "other" includes clients that reject the server's certificate."""
_find_cause = re.compile(r"Handshake failed.*?OPENSSL_internal:(\w+)").search
_find_origin = re.compile(r"([IWEF])\d{4} \S+ +\d+ ([\w.-]+:\d+)\]").match
"""Level, file and line of a message of Abseil's log."""

log = structlog.get_logger()


def detach_stderr() -> None:
    """Move Python's output to a copy of standard error, so that capture() receives that of native libraries only."""
    sys.stderr = open(  # noqa: PTH123, SIM115 - a descriptor, until the process ends
        os.dup(_STDERR), "w", buffering=1, encoding="utf-8", errors="backslashreplace"
    )
    # The last words of a native library are lost when the process crashes; the stacks of Python are not.
    faulthandler.enable(sys.stderr)


def capture(on_refused_handshake: Callable[[str], object]) -> None:
    """Read the output of native libraries from now on, in a thread.

    Args:
        on_refused_handshake: Is called with one of REASONS for each TLS handshake that fails.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # a library must not wait for this thread
    os.dup2(writing, _STDERR)
    os.close(writing)
    threading.Thread(target=_read, args=(reading, on_refused_handshake), name="native-log", daemon=True).start()


def _read(file: int, on_refused_handshake: Callable[[str], object]) -> None:
    with open(file, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                handle(line, on_refused_handshake)
            except Exception as error:  # noqa: BLE001 - without this thread no handshake would be counted
                with contextlib.suppress(Exception):
                    log.critical("native log failed", **exception_fields(error))


def handle(line: str, on_refused_handshake: Callable[[str], object]) -> None:
    """Count and log one line. Its text is not logged, since a client may have chosen a part of it."""
    if cause := _find_cause(line):
        reason = _CAUSES.get(cause[1], _OTHER)
        on_refused_handshake(reason)
        if should_log("handshake", reason):
            log.warning("TLS handshake refused", reason=reason, cause=cause[1])
        return
    origin = _find_origin(line)
    level, where = (origin[1], origin[2]) if origin else ("E", "")
    if level != "I" and should_log("native", where):
        log.warning("library", library="native", where=where)
