"""Calls to a store that may be several servers: connections kept for reuse, turns between servers, deadlines, retries.

There are no threads but a short-lived one while a name is looked up. Each call has a connection to itself and runs in
its caller's thread (see http2.py). A server that cannot be reached is left alone for a moment, so that an outage costs
the next calls nothing.
"""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from resumed import errors
from resumed.http2 import CANCELLED, UNAVAILABLE, Broken, Connection, Refused, Status, head
from resumed.process import renew_after_fork
from resumed.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resumed.credentials import Credentials
    from resumed.target import SocketAddress

ATTEMPTS = 3
"""How often a call is tried, where another try is harmless and the deadline allows it."""
IDLE_SECONDS = 60.0
"""How long a connection is kept that nobody used."""
RESOLVE_SECONDS = 1.0
"""How long addresses count as current once a connection was lost: new servers are found when old ones go."""
CONNECT_SECONDS = 5.0
"""How long a stream may take to begin."""

_PASSING = frozenset((CANCELLED, UNAVAILABLE))  # as a server that stops says it
_FIRST_REST, _LONGEST_REST, _LONGEST_REST_ALONE = 0.05, 5.0, 0.4

_log = logging.getLogger("resumed")


class Method(NamedTuple):
    """An RPC.

    Attributes:
        path: As in HTTP/2: `/package.Service/Name`.
        repeatable: Whether a call whose outcome is unknown may be made again.
    """

    path: str
    repeatable: bool


class _Server:
    """One address of the store, and the connections to it that are free."""

    def __init__(self, where: SocketAddress) -> None:
        self.where = where
        self.free: deque[tuple[Connection, float]] = deque()  # since when; the one used last is at the end
        self.gone = False
        self._rest = 0.0
        self._rests_until = 0.0

    @property
    def resting(self) -> bool:
        """Whether it could not be reached a moment ago."""
        return self._rest > 0 and time.monotonic() < self._rests_until

    def take(self) -> Connection | None:
        """Take a connection that can be used."""
        while self.free:
            try:
                connection, _ = self.free.pop()
            except IndexError:  # another thread was faster
                return None
            if connection.reusable():
                return connection
            connection.close()
        return None

    def give_back(self, connection: Connection) -> None:
        """Keep a connection for the next call, and close one that nobody needed for long."""
        now = time.monotonic()
        if self.gone:
            connection.close()
            return
        self.free.append((connection, now))
        try:
            oldest, since = self.free[0]
            if now - since > IDLE_SECONDS:
                self.free.remove((oldest, since))
                oldest.close()
        except (IndexError, ValueError):
            pass  # another thread took it

    def reached(self) -> None:
        """Note that it could be reached."""
        self._rest = 0.0

    def unreachable(self, *, alone: bool) -> None:
        """Leave it alone for a while, longer each time."""
        self._rest = min(max(2 * self._rest, _FIRST_REST), _LONGEST_REST_ALONE if alone else _LONGEST_REST)
        self._rests_until = time.monotonic() + self._rest

    def dismiss(self) -> None:
        """Close what is free, and what will be."""
        self.gone = True
        while self.free:
            try:
                self.free.pop()[0].close()
            except IndexError:
                return


class Channel:
    """The servers behind one target. Thread-safe; connects when first used, and anew in a forked child.

    Args:
        target: A gRPC name, see Target.parse().
        credentials: For TLS; None for none.

    Raises:
        ValueError: The target is malformed; the message says what to do.
    """

    def __init__(self, target: str, credentials: Credentials | None = None) -> None:
        self._target = Target.parse(target)
        self._credentials = credentials
        self._servers: tuple[_Server, ...] = ()
        self._begin()
        renew_after_fork(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._turn = itertools.count()
        self._resolver: threading.Thread | None = None
        self._resolved = float("-inf")
        self._unresolved = "its name does not resolve in time"

    def call(self, method: Method, message: bytes, timeout: float) -> bytes:
        """Make a unary call and return the encoded answer.

        Raises:
            StoreError: It failed; StoreUnavailable or StoreTimeout where another time may succeed.
        """
        headers, end = head(self._target.authority, method.path, self._secure), time.monotonic() + timeout
        failure: errors.StoreError = errors.StoreTimeout("there was no time for the call")
        for _ in range(ATTEMPTS):
            server, connection = self._connection(end)
            try:
                connection.request(headers, message, end)
                answer = connection.answer(end)
            except Status as status:
                server.give_back(connection)
                failure = errors.from_status(status.number, status.message)
                if status.number not in _PASSING or not method.repeatable:
                    raise failure from None
            except TimeoutError:
                connection.close()
                raise errors.StoreTimeout(f"no answer within {timeout * 1e3:.0f} ms") from None
            except Broken as error:
                connection.close()
                self._resolve_soon()
                failure = errors.StoreUnavailable(str(error))
                if not (method.repeatable or isinstance(error, Refused)):
                    raise failure from None
            except BaseException:
                connection.close()  # something else is wrong, or Ctrl-C: what is on it now belongs to nobody
                raise
            else:
                server.give_back(connection)
                return answer
        raise failure

    def stream(self, method: Method, message: bytes, patience: float) -> Stream:
        """Begin a server-streaming call.

        Args:
            method: Which.
            message: The encoded request.
            patience: Seconds that the server may be silent.

        Raises:
            StoreError: It cannot begin.
        """
        end = time.monotonic() + CONNECT_SECONDS
        _, connection = self._connection(end)
        try:
            connection.request(head(self._target.authority, method.path, self._secure), message, end, lasts=True)
        except (Broken, OSError) as error:
            connection.close()
            raise errors.StoreUnavailable(str(error)) from None
        return Stream(connection, patience)

    def close(self) -> None:
        """Close all connections; those in use when their calls end. The next call opens another one."""
        with self._lock:
            servers, self._servers = self._servers, ()
        for server in servers:
            server.dismiss()

    def after_fork_in_child(self) -> None:
        """Leave the parent's connections to the parent."""
        for server in self._servers:
            server.dismiss()  # closing this process' descriptors says nothing to the peer
        self._servers = ()
        self._begin()

    @property
    def _secure(self) -> bool:
        return self._credentials is not None

    def _connection(self, end: float) -> tuple[_Server, Connection]:
        """Return a server, the next in turn that can be reached, and a connection to it."""
        servers = self._servers or self._resolve_first(end)
        count = len(servers)
        turn = next(self._turn) if count > 1 else 0
        context = self._credentials.context() if self._credentials else None
        failure = "it could not be reached a moment ago"
        for tried in range(count):
            server = servers[(turn + tried) % count]
            while connection := server.take():
                if connection.tls_context is context:
                    return server, connection
                connection.close()  # of certificates that have been replaced
            if server.resting:
                continue
            now = time.monotonic()
            try:
                connected = self._connect(server.where, now + (end - now) / (count - tried))
            except OSError as error:
                server.unreachable(alone=count == 1)
                self._resolve_soon()
                failure = _reason(error)
            else:
                server.reached()
                return server, Connection(connected)
        if time.monotonic() >= end:
            raise errors.StoreTimeout(f"{self._target.authority}: {failure}")
        raise errors.StoreUnavailable(f"{self._target.authority}: {failure}")

    def _connect(self, where: SocketAddress, end: float) -> socket.socket:
        family, address = where
        connecting = socket.socket(family, socket.SOCK_STREAM)
        try:
            connecting.settimeout(max(end - time.monotonic(), 0.001))
            connecting.connect(address)
            if family != socket.AF_UNIX:
                connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._credentials is None:
                return connecting
            name = self._credentials.server_name or self._target.host
            secured = self._credentials.context().wrap_socket(connecting, server_hostname=name)
        except BaseException:
            connecting.close()
            raise
        if secured.selected_alpn_protocol() != "h2":
            secured.close()
            raise ConnectionError("what listens there speaks TLS, but no gRPC")
        return secured

    def _resolve_first(self, end: float) -> tuple[_Server, ...]:
        """Look the target's name up; wait for that until `end`."""
        resolver = self._resolve_soon()
        if resolver is not None:
            resolver.join(max(0.0, end - time.monotonic()))
        if not self._servers:
            raise errors.StoreUnavailable(f"{self._target.authority}: {self._unresolved}")
        return self._servers

    def _resolve_soon(self) -> threading.Thread | None:
        """Look the target's name up in the background, unless that is under way or was done a moment ago."""
        with self._lock:
            if self._target.literal:
                if not self._servers:
                    self._resolve()
                return None
            if self._resolver is None and time.monotonic() - self._resolved > (
                RESOLVE_SECONDS if self._servers else 0.0
            ):
                self._resolver = threading.Thread(target=self._resolve_in_thread, name="resumed-resolver", daemon=True)
                self._resolver.start()
            return self._resolver

    def _resolve_in_thread(self) -> None:
        addresses: list[SocketAddress] = []
        try:
            addresses = self._target.resolve()
        except OSError as error:
            self._unresolved = f"its name does not resolve ({error.strerror})"
        with self._lock:
            self._take_over(addresses)
            self._resolver = None

    def _resolve(self) -> None:
        self._take_over(self._target.resolve())

    def _take_over(self, addresses: list[SocketAddress]) -> None:
        """Make `addresses` the target's, unless there are none: those known before are better than nothing."""
        self._resolved = time.monotonic()
        if not addresses:
            return
        before = self._servers
        known = {server.where: server for server in before}
        self._servers = tuple(known.get(where) or _Server(where) for where in addresses)
        for server in set(before) - set(self._servers):
            server.dismiss()


class Stream:
    """The answers of a server-streaming call, each as encoded; ends with a StoreError."""

    def __init__(self, connection: Connection, patience: float) -> None:
        self._connection, self._patience = connection, patience

    def __iter__(self) -> Iterator[bytes]:
        """Yield the answers."""
        try:
            while (message := self._connection.message(time.monotonic() + self._patience)) is not None:
                yield message
        except Status as status:
            raise errors.from_status(status.number, status.message) from None
        except TimeoutError:
            raise errors.StoreTimeout(f"the store was silent for {self._patience:g} s") from None
        except (Broken, OSError) as error:
            raise errors.StoreUnavailable(str(error)) from None
        finally:
            self._connection.close()
        raise errors.StoreUnavailable("the store ended the stream")

    def cancel(self) -> None:
        """End the call, from any thread."""
        self._connection.cancel()


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no connection in time"
    return getattr(error, "verify_message", "") or error.strerror or str(error) or type(error).__name__
