"""The classes of a context's connections: they keep an event loop going while a handshake's sessions are looked up.

asyncio and uvloop make their TLS objects with the context's `sslobject_class` and drive the handshakes themselves. The
class set here tells them to wait for more bytes while a handshake rests (prefetch.py), and tells the connection's
protocol when it may go on, as if bytes had come, but none. Neither says which protocol that is: asyncio's is in the
caller's frame; uvloop's is compiled, and is found among the objects made last. Where there is none, a look-up holds the
caller up, as it does without this class.

Sockets get a class as well: it raises the exceptions that interrupted a callback (interruption.py).
"""

from __future__ import annotations

import contextlib
import gc
import ssl
import sys
import weakref
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from resumed._async.interruption import during

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed._async.suspendable_handshake import SuspendableHandshake
    from resumed._openssl import CallbackBinding

    Resume: TypeAlias = Callable[[], None]

_DEPTH = 14
"""How many frames up from a callback asyncio's protocol is looked for; up to Python 3.14 it is 8 or 9."""
_LAST_OBJECTS = 64
"""Among how many objects uvloop's protocol is looked for; it was never more than 16 back."""
_MOST_OBJECTS = 20_000
"""How many young objects there may be to take the last ones from: with garbage collection off there are more."""


class SuspendingSSLObject:
    """Mixed into an ssl.SSLObject."""

    _binding: ClassVar[CallbackBinding]
    _waker: Callable[[], Resume | None] | None = None
    _handshake: SuspendableHandshake | None = None
    _done = False

    @classmethod
    def _create(cls, incoming: ssl.MemoryBIO, *arguments: Any, **named: Any) -> Any:
        waker = find_uvloop_protocol(incoming)
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
            handshake = self._handshake = self._binding.begin(self._waker or find_asyncio_protocol)
        try:
            self._binding.run_step(handshake, step)
        except ssl.SSLWantReadError:
            raise
        except BaseException as error:
            if handshake.suspended and isinstance(error, ssl.SSLError):
                # OpenSSL's SSL_ERROR_WANT_CLIENT_HELLO_CB, which Python does not know by name.
                raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "a session is being looked up") from None
            self._handshake = self._waker = None  # which lead back here
            raise
        self._done, self._handshake, self._waker = True, None, None


class InterruptibleSSLSocket:
    """Mixed into an ssl.SSLSocket."""

    def do_handshake(self, *arguments: Any, **named: Any) -> None:
        """Shake hands."""
        during(lambda: super(InterruptibleSSLSocket, self).do_handshake(*arguments, **named))  # type: ignore[misc]  # of ssl.SSLSocket


def enable(context: ssl.SSLContext, binding: CallbackBinding) -> Callable[[], None]:
    """Let handshakes of `context` rest under asyncio and uvloop; return what undoes that."""
    objects = _mix_in(SuspendingSSLObject, context, "sslobject_class", ssl.SSLObject, {"_binding": binding})
    sockets = _mix_in(InterruptibleSSLSocket, context, "sslsocket_class", ssl.SSLSocket, {})

    def detach() -> None:
        objects()
        sockets()

    return detach


def _mix_in(mixin: type, context: Any, name: str, default: type, attributes: dict[str, Any]) -> Callable[[], None]:
    """Mix a class into the one that a context makes connections of; return what undoes that, in any order."""
    previous: Any = getattr(context, name) or default
    base = previous._base if issubclass(previous, mixin) else previous  # noqa: SLF001  # of this module
    own: Any = type(base.__name__, (mixin, base), {**attributes, "_base": base, "_previous": previous})
    setattr(context, name, own)
    weak = weakref.ref(context)

    def undo() -> None:
        context = weak()
        each: Any = getattr(context, name, None)
        if each is own:
            setattr(context, name, own._previous)  # noqa: SLF001  # of this module
        while each and issubclass(each, mixin):
            following = each._previous  # noqa: SLF001  # of this module
            if following is own:
                each._previous = own._previous  # noqa: SLF001  # of this module
            each = following

    return undo


def find_asyncio_protocol() -> Resume | None:
    """Return what has the asyncio protocol that is calling take its next step, from any thread."""
    asyncio: Any = sys.modules.get("asyncio")
    frame = sys._getframe(1) if asyncio else None  # noqa: SLF001  # there is no other way
    connection = None
    for _ in range(_DEPTH):
        if frame is None:
            break
        caller = frame.f_locals.get("self")
        if connection is None and isinstance(caller, SuspendingSSLObject):
            connection = caller
        elif isinstance(caller, asyncio.sslproto.SSLProtocol):
            # Up to Python 3.10 the object is in a pipe. The protocol may be that of a connection around this one, which
            # the application drives through memory.
            driven = getattr(caller, "_sslobj", None) or getattr(getattr(caller, "_sslpipe", None), "_sslobj", None)
            return make_resume(asyncio.get_running_loop(), caller) if driven is connection else None
        frame = frame.f_back
    return None


def find_uvloop_protocol(incoming: ssl.MemoryBIO) -> Callable[[], Resume | None] | None:
    """Return the same for uvloop, which is about to start a handshake over `incoming`; None under another loop."""
    uvloop: Any = sys.modules.get("uvloop.loop")
    loop = uvloop and sys.modules["asyncio"]._get_running_loop()  # noqa: SLF001  # documented
    if not loop or not isinstance(loop, uvloop.Loop):
        return None
    if gc.get_count()[0] >= _MOST_OBJECTS:
        return lambda: None
    # It has just made a timer whose function holds the protocol, which holds the BIO. Only the timer is kept: it lets
    # go of the protocol when the handshake ends, in whatever way.
    for generation in 0, 1:
        for thing in islice(reversed(gc.get_objects(generation)), _LAST_OBJECTS):
            protocol = _protocol_of_timer(thing, uvloop.SSLProtocol) if type(thing) is uvloop.TimerHandle else None
            if protocol and any(each is incoming for each in gc.get_referents(protocol)):
                return lambda: (held := _protocol_of_timer(thing, uvloop.SSLProtocol)) and make_resume(loop, held)
    # A collection came in between, to about one connection in a thousand: search everything, if there is a look-up.
    return lambda: next(
        (make_resume(loop, held) for held in gc.get_referrers(incoming) if type(held) is uvloop.SSLProtocol), None
    )


def _protocol_of_timer(timer: Any, kind: type) -> Any:
    """Return the protocol whose function a timer of uvloop will call, if any."""
    functions = (each for each in gc.get_referents(timer) if callable(each))
    scopes = (each for function in functions for each in gc.get_referents(function))
    return next((held for scope in scopes for held in gc.get_referents(scope) if type(held) is kind), None)


def make_resume(loop: Any, protocol: Any) -> Resume:
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
