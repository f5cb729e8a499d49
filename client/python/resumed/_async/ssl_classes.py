"""The classes of a context's connections, which suspend handshakes under event loops and pass exceptions on.

asyncio and uvloop make their TLS objects with the context's `sslobject_class` and drive the handshakes themselves. The
class set here waits for more bytes while a handshake is suspended, and an adapter (loop_adapter.py) has the protocol of
the connection take the next step. Where no adapter finds the protocol, a look-up blocks the event loop, as it does
without this class.

The class of sockets raises the exceptions that interrupted a callback (interruption.py).
"""

from __future__ import annotations

import ssl
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

from resumed._async.asyncio_adapter import find_asyncio_protocol
from resumed._async.interruption import during
from resumed._async.uvloop_adapter import find_uvloop_protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed._async.loop_adapter import FindResume, LoopAdapter
    from resumed._async.suspendable_handshake import SuspendableHandshake
    from resumed._openssl import CallbackBinding

LOOP_ADAPTERS: tuple[LoopAdapter, ...] = (find_uvloop_protocol, find_asyncio_protocol)
"""Each TLS object belongs to the first adapter that accepts it."""


class SuspendingSSLObject:
    """Mixed into an ssl.SSLObject."""

    _binding: ClassVar[CallbackBinding]
    _find_resume: FindResume
    _handshake: SuspendableHandshake | None = None
    _done = False

    @classmethod
    def _create(cls, incoming: ssl.MemoryBIO, *arguments: Any, **named: Any) -> Any:
        find_resume = next(found for adapter in LOOP_ADAPTERS if (found := adapter(incoming)))
        self = super()._create(incoming, *arguments, **named)  # type: ignore[misc]  # of ssl.SSLObject
        self._find_resume = find_resume
        return self

    def do_handshake(self) -> None:
        """Take a step of the handshake; raise SSLWantReadError while it is suspended."""
        step = super().do_handshake  # type: ignore[misc]  # of ssl.SSLObject
        if self._done:
            step()
            return
        handshake = self._handshake
        if handshake is None:
            handshake = self._handshake = self._binding.begin(self._find_resume)
        try:
            self._binding.run_step(handshake, step)
        except ssl.SSLWantReadError:
            raise
        except BaseException as error:
            if handshake.suspended and isinstance(error, ssl.SSLError):
                # OpenSSL's SSL_ERROR_WANT_CLIENT_HELLO_CB, which Python does not know by name.
                raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "a session is being looked up") from None
            self._end()
            raise
        self._done = True
        self._end()

    def _end(self) -> None:
        self._handshake, self._find_resume = None, lambda: None  # they refer to this object


class InterruptibleSSLSocket:
    """Mixed into an ssl.SSLSocket."""

    def do_handshake(self, *arguments: Any, **named: Any) -> None:
        """Shake hands, and raise the exception that interrupted a callback."""
        during(lambda: super(InterruptibleSSLSocket, self).do_handshake(*arguments, **named))  # type: ignore[misc]  # of ssl.SSLSocket


def enable(context: ssl.SSLContext, binding: CallbackBinding) -> Callable[[], None]:
    """Let handshakes of `context` be suspended under event loops; return a function that undoes that."""
    objects = _mix_in(SuspendingSSLObject, context, "sslobject_class", ssl.SSLObject, {"_binding": binding})
    sockets = _mix_in(InterruptibleSSLSocket, context, "sslsocket_class", ssl.SSLSocket, {})

    def detach() -> None:
        objects()
        sockets()

    return detach


def _mix_in(mixin: type, context: Any, name: str, default: type, attributes: dict[str, Any]) -> Callable[[], None]:
    """Mix a class into the one that a context makes connections of; return a function that undoes it, in any order."""
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
