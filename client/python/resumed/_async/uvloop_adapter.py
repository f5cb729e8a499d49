"""Handshakes of uvloop: its protocols are compiled, so the one that drives a handshake is among the newest objects."""

from __future__ import annotations

import gc
import sys
from itertools import islice
from typing import TYPE_CHECKING, Any

from resumed._async.loop_adapter import make_resume

if TYPE_CHECKING:
    import ssl

    from resumed._async.loop_adapter import FindResume

_LAST_OBJECTS = 64
"""How many of the newest objects are searched; the protocol was never more than 16 back."""
_MOST_OBJECTS = 20_000
"""How many young objects there may be to take the newest from: with garbage collection off there are more."""


def find_uvloop_protocol(incoming: ssl.MemoryBIO) -> FindResume | None:
    """Search the objects that uvloop has made for a handshake that is about to start; see LoopAdapter."""
    uvloop: Any = sys.modules.get("uvloop.loop")
    loop = uvloop and sys.modules["asyncio"]._get_running_loop()  # noqa: SLF001  # documented
    if not loop or not isinstance(loop, uvloop.Loop):
        return None
    if gc.get_count()[0] >= _MOST_OBJECTS:
        return lambda: None
    # It has just made a timer whose function holds the protocol, which holds the BIO. Only the timer is kept: it
    # releases the protocol when the handshake ends, in any way.
    for generation in 0, 1:
        for thing in islice(reversed(gc.get_objects(generation)), _LAST_OBJECTS):
            protocol = _protocol_of_timer(thing, uvloop.SSLProtocol) if type(thing) is uvloop.TimerHandle else None
            if protocol and any(each is incoming for each in gc.get_referents(protocol)):
                return lambda: (found := _protocol_of_timer(thing, uvloop.SSLProtocol)) and make_resume(loop, found)
    # A garbage collection ran in between (about 1 in 1,000 connections): search all referrers if there is a look-up.
    return lambda: next(
        (make_resume(loop, each) for each in gc.get_referrers(incoming) if type(each) is uvloop.SSLProtocol), None
    )


def _protocol_of_timer(timer: Any, kind: type) -> Any:
    """Return the protocol whose function a timer of uvloop will call, if any."""
    functions = (each for each in gc.get_referents(timer) if callable(each))
    scopes = (each for function in functions for each in gc.get_referents(function))
    return next((each for scope in scopes for each in gc.get_referents(scope) if type(each) is kind), None)
