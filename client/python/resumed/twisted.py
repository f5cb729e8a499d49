"""Keeps Twisted's reactor going while a handshake's sessions are looked up.

Twisted drives pyOpenSSL's connections over memory BIOs. The connections made here wait for more bytes while a
handshake is suspended (_async/), and are resumed through their protocol as if bytes had arrived, but none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from OpenSSL import SSL
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from zope.interface import implementer

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed._async.suspendable_handshake import SuspendableHandshake
    from resumed._install import Installation

_Result = TypeVar("_Result")


@implementer(IOpenSSLServerConnectionCreator)
class ConnectionCreator:
    """What listenSSL(), SSL4ServerEndpoint() and startTLS() take, so that no look-up blocks the reactor.

    Args:
        context: An `OpenSSL.SSL.Context`, such as `twisted.internet.ssl.CertificateOptions(...).getContext()`.
        installation: What resumed.install() returned for it.
        reactor: Which to go on in; None for the global one.
    """

    def __init__(self, context: SSL.Context, installation: Installation, reactor: Any = None) -> None:
        if reactor is None:
            from twisted.internet import reactor  # noqa: PLC0415  # importing it installs it
        self._context, self._installation, self._reactor = context, installation, reactor

    def serverConnectionForTLS(self, tlsProtocol: Any) -> SSL.Connection:  # noqa: N802, N803
        """Return the connection of a TLSMemoryBIOProtocol."""

        def step() -> None:
            if tlsProtocol.connected:
                tlsProtocol.dataReceived(b"")

        return _Connection(self._context, self._installation, lambda: lambda: self._reactor.callFromThread(step))


class _Connection(SSL.Connection):
    """Raises WantReadError while its handshake is suspended."""

    _handshake: SuspendableHandshake | None

    def __init__(
        self, context: SSL.Context, installation: Installation, waker: Callable[[], Callable[[], None]]
    ) -> None:
        super().__init__(context, None)
        self._handshake = installation._binding.begin(waker)  # noqa: SLF001  # of this package
        self._run_step = installation._binding.run_step  # noqa: SLF001  # of this package

    def do_handshake(self) -> None:
        """Take a step of the handshake."""
        self._step(super().do_handshake)
        self._handshake = None

    def recv(self, *arguments: Any) -> bytes:
        """Read, which is a step of the handshake when the client went in the midst of it."""
        return self._step(lambda: super(_Connection, self).recv(*arguments))

    def bio_write(self, buf: bytes | bytearray | memoryview) -> int:
        """Write received bytes, unless there are none: OpenSSL reports an error for that."""
        return super().bio_write(buf) if buf else 0

    def _step(self, step: Callable[[], _Result]) -> _Result:
        handshake = self._handshake
        if handshake is None:
            return step()
        try:
            return self._run_step(handshake, step)
        except SSL.WantReadError:
            raise
        except SSL.Error:
            if handshake.suspended:
                # OpenSSL's SSL_ERROR_WANT_CLIENT_HELLO_CB, which pyOpenSSL does not know by name.
                raise SSL.WantReadError from None
            raise
