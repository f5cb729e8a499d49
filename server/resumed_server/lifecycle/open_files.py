"""The limit of open files of a process, which bounds its connections."""

from __future__ import annotations

import resource

import structlog

_OTHER_FILES = 256
"""Maximum number of open files that a process needs besides its connections."""

_log = structlog.get_logger()


def raise_file_limit(wanted: int) -> int:
    """Raise the limit of open files for `wanted` connections, and return the number of connections that it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_FILES
    if soft < needed:
        soft = min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < needed:
        _log.warning("fewer connections than --max-connections: raise the limit of open files", files=soft)
    return max(1, min(wanted, soft - _OTHER_FILES))
