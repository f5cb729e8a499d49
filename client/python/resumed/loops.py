"""Keeps an event loop going while a handshake's sessions are looked up.

asyncio and uvloop make their TLS objects with the context's `sslobject_class` and drive the handshakes themselves. The
class set here tells them to wait for more bytes while a handshake rests (prefetch.py), and tells the connection's
protocol when it may go on, as if bytes had come, but none. Neither says which protocol that is: asyncio's is in the
caller's frame; uvloop's is compiled, and is found among the objects made last. Where there is none, a look-up holds the
caller up, as it does without this class.
"""

from __future__ import annotations

import contextlib
import gc
import ssl
import sys
import weakref
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed.openssl import Binding
    from resumed.prefetch import Handshake

    Wake: TypeAlias = Callable[[], None]

_DEPTH = 10
"""How many frames up from a callback asyncio's protocol is looked for; up to Python 3.14 it is 6 or 7."""
_LAST_OBJECTS = 64
"""Among how many objects uvloop's protocol is looked for; it was never more than 16 back."""
_MOST_OBJECTS = 20_000
"""How many young objects there may be to take the last ones from: with garbage collection off there are more."""


class _Resting:
    """Mixed into an ssl.SSLObject."""

    _binding: ClassVar[Binding]
    _base: ClassVar[type[ssl.SSLObject]]
    _waker: Callable[[], Wake | None] | None = None
    _handshake: Handshake | None = None
    _done = False

    @classmethod
    def _create(cls, incoming: ssl.MemoryBIO, *arguments: Any, **named: Any) -> Any:
        waker = _of_uvloop(incoming)
        self = super()._create(incoming, *arguments, **named)  # type: ignore[misc]  # of ssl.SSLObject
        self._waker = waker
        return self

    def do_handshake(self) -> None:
        """Take a step of the handshake; raise SSLWantReadError while it rests."""
        step = super().do_handshake  # type: ignore[misc]  # of ssl.SSLObject
        if self._done:
            step()
            return
        handshake = self._handshake
        if handshake is None:
            handshake = self._handshake = self._binding.begin(self._waker or _of_asyncio)
        try:
            self._binding.drive(handshake, step)
        except ssl.SSLWantReadError:
            raise
        except ssl.SSLError:
            if handshake.rests:
                # OpenSSL's SSL_ERROR_WANT_CLIENT_HELLO_CB, which Python does not know by name.
                raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "a session is being looked up") from None
            self._handshake = None
            raise
        self._done, self._handshake, self._waker = True, None, None


def attach(context: ssl.SSLContext, binding: Binding) -> Callable[[], None]:
    """Let handshakes of `context` rest under asyncio and uvloop; return what undoes that."""
    previous = context.sslobject_class or ssl.SSLObject
    base = previous._base if issubclass(previous, _Resting) else previous  # noqa: SLF001  # of this module
    own = type(base.__name__, (_Resting, base), {"_binding": binding, "_base": base})
    context.sslobject_class = own
    weak = weakref.ref(context)

    def detach() -> None:
        context = weak()
        if context is not None and context.sslobject_class is own:
            context.sslobject_class = previous

    return detach


def _of_asyncio() -> Wake | None:
    """Return what has the asyncio protocol that is calling take its next step, from any thread."""
    asyncio: Any = sys.modules.get("asyncio")
    frame = sys._getframe(1) if asyncio else None  # noqa: SLF001  # there is no other way
    for _ in range(_DEPTH):
        if frame is None:
            break
        protocol = frame.f_locals.get("self")
        if isinstance(protocol, asyncio.sslproto.SSLProtocol):
            return _wake(asyncio.get_running_loop(), protocol)
        frame = frame.f_back
    return None


def _of_uvloop(incoming: ssl.MemoryBIO) -> Callable[[], Wake | None] | None:
    """Return the same for uvloop, which is about to start a handshake over `incoming`; None under another loop."""
    uvloop: Any = sys.modules.get("uvloop.loop")
    loop = uvloop and sys.modules["asyncio"]._get_running_loop()  # noqa: SLF001  # documented
    if not loop or not isinstance(loop, uvloop.Loop):
        return None
    if gc.get_count()[0] >= _MOST_OBJECTS:
        return lambda: None
    # It has just made a timer whose closure holds the protocol, which holds the BIO.
    for generation in 0, 1:
        for thing in islice(reversed(gc.get_objects(generation)), _LAST_OBJECTS):
            for held in gc.get_referents(thing) if type(thing).__module__ == uvloop.__name__ else ():
                if type(held) is uvloop.SSLProtocol and any(each is incoming for each in gc.get_referents(held)):
                    wake = _wake(loop, held)
                    return lambda: wake
    # A collection came in between, to about one connection in a thousand: search everything, if there is a look-up.
    return lambda: next(
        (_wake(loop, held) for held in gc.get_referrers(incoming) if type(held) is uvloop.SSLProtocol), None
    )


def _wake(loop: Any, protocol: Any) -> Wake:
    def step() -> None:
        # Both are public parts of asyncio's protocols. Up to Python 3.10 it is not a buffered one.
        if hasattr(protocol, "buffer_updated"):
            protocol.buffer_updated(0)
        else:
            protocol.data_received(b"")

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the connection
            loop.call_soon_threadsafe(step)

    return wake
