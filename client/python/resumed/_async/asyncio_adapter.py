"""Handshakes of asyncio: the protocol that drives one is in the frames of its callers."""

from __future__ import annotations

import ssl
import sys
from typing import TYPE_CHECKING, Any

from resumed._async.loop_adapter import make_resume

if TYPE_CHECKING:
    from resumed._async.loop_adapter import FindResume, Resume

_DEPTH = 16
"""How many frames up from a callback the protocol is searched; up to Python 3.14 it is at most 12 frames up."""


def find_asyncio_protocol(_incoming: ssl.MemoryBIO) -> FindResume:
    """Return a function that searches the frames of a step; see LoopAdapter."""
    return _find_in_frames


def _find_in_frames() -> Resume | None:
    asyncio: Any = sys.modules.get("asyncio")
    frame = sys._getframe(1) if asyncio else None  # noqa: SLF001  # there is no other way
    connection = None
    for _ in range(_DEPTH):
        if frame is None:
            break
        caller = frame.f_locals.get("self")
        if connection is None and isinstance(caller, ssl.SSLObject):
            connection = caller
        elif isinstance(caller, asyncio.sslproto.SSLProtocol):
            # Up to Python 3.10 the object is in a pipe. The protocol may be that of a connection around this one, which
            # the application drives through memory.
            driven = getattr(caller, "_sslobj", None) or getattr(getattr(caller, "_sslpipe", None), "_sslobj", None)
            return make_resume(asyncio.get_running_loop(), caller) if driven is connection else None
        frame = frame.f_back
    return None
