"""Connections to a store that may be several servers: kept for reuse, made ahead, used in turns; names looked up again.

A call takes a connection that is free, of the next server in turn that has one. New ones are made by
short-lived threads: for the next call if another server had one free, for those who wait if none had. So no call waits
for a server that is slow or away while another one can answer, and a connection that is ready too late for a
call is there for the next. A server that cannot be reached is skipped for a moment, so that an outage costs the next
calls nothing.
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING

from resumed._exceptions import StoreTimeout, StoreUnavailable
from resumed._process.fork import register_after_fork
from resumed._transport.http2 import Connection, ConnectionBroken

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from resumed._transport.target import SocketAddress, Target
    from resumed._transport.tls import Credentials

IDLE_SECONDS = 60.0
"""Seconds that an unused connection is kept."""
RESOLVE_SECONDS = 1.0
"""How long addresses count as current once a connection was lost: new servers are found when old ones go."""
CONNECT_SECONDS = 5.0
"""How long a connection may take to be made."""

_FIRST_BACKOFF, _LONGEST_BACKOFF, _LONGEST_BACKOFF_ALONE = 0.05, 5.0, 0.4


class Server:
    """One address of the store, and the connections to it that are free.

    Attributes:
        address: The address.
        connecting: How many connections are being made.
        failure: Why it could not be reached.
        defect: The exception that no server is to blame for, if the last attempt ended with one.
        gone: Whether it is none of the target's any more.
    """

    def __init__(self, where: SocketAddress) -> None:
        self.address = where
        self.connecting = 0
        self.failure = ""
        self.defect: Exception | None = None
        self.gone = False
        self._free: deque[tuple[Connection, float]] = deque()  # since when; the one used last is at the end
        self._backoff = 0.0
        self._backoff_until = 0.0

    @property
    def backing_off(self) -> bool:
        """Whether it could not be reached a moment ago."""
        return self._backoff > 0 and time.monotonic() < self._backoff_until

    def take(self) -> Connection | None:
        """Take a connection, which may have ended meanwhile; an old one may have ended unnoticed."""
        while True:
            try:
                connection, since = self._free.pop()
            except IndexError:
                return None
            if time.monotonic() - since <= IDLE_SECONDS:
                return connection
            connection.close()

    def close_idle(self, since: float) -> None:
        """Close the connections that are unused since then (time.monotonic()): a middlebox may have dropped them."""
        while True:
            try:
                connection, used = self._free[0]  # the one used last is at the end
                if used >= since:
                    return
                self._free.remove((connection, used))
            except (IndexError, ValueError):
                return  # another thread took it, and those behind it were used later
            connection.close()

    def release(self, connection: Connection) -> None:
        """Keep a connection for the next call, and close one that was unused for long."""
        now = time.monotonic()
        if self.gone:
            connection.close()
            return
        self._free.append((connection, now))
        try:
            oldest, since = self._free[0]
            if now - since > IDLE_SECONDS:
                self._free.remove((oldest, since))
                oldest.close()
        except (IndexError, ValueError):
            pass  # another thread took it

    def mark_reachable(self) -> None:
        """Note that it could be reached."""
        self._backoff, self.defect = 0.0, None

    def mark_unreachable(self, reason: str, *, alone: bool) -> None:
        """Leave it alone for a while, longer each time."""
        self.failure = reason
        if not self.backing_off:  # or many who try at once would count as many times
            self._backoff = min(
                max(2 * self._backoff, _FIRST_BACKOFF), _LONGEST_BACKOFF_ALONE if alone else _LONGEST_BACKOFF
            )
            self._backoff_until = time.monotonic() + self._backoff

    def close(self) -> None:
        """Close the free connections, and those that are released later."""
        self.gone = True
        while connection := self.take():
            connection.close()


class ConnectionPool:
    """The servers behind one target. Thread-safe; connects when first used, and anew in a forked child.

    Args:
        target: Their name.
        credentials: For TLS; None for none.
    """

    def __init__(self, target: Target, credentials: Credentials | None) -> None:
        self._target, self._credentials = target, credentials
        self._servers: tuple[Server, ...] = ()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()  # also those with a call in flight
        self._reset()
        register_after_fork(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()  # of the names
        self._turn = itertools.count()
        self._resolver: threading.Thread | None = None
        self._resolved = float("-inf")
        self._unresolved = "its name does not resolve in time"
        self._changed = threading.Condition()  # a connection is free, or could not be made
        self._waiting = 0

    def take(self, end: float) -> tuple[Server, Connection]:
        """Return a connection, of the server whose turn it is if possible; the caller must release or close it.

        Args:
            end: When the time is up, as time.monotonic().

        Raises:
            StoreError: There is none in time.
            RuntimeError: There is none because of a defect, of this program or of its arguments.
        """
        while True:
            servers = self._servers or self._resolve_first(end)
            if len(servers) > 1:
                turn = next(self._turn) % len(servers)
                servers = servers[turn:] + servers[:turn]
            if found := self._free(servers) or self._wait_for_connection(servers, end):
                return found

    def release(self, server: Server, connection: Connection) -> None:
        """Let others have a connection that is good for another call."""
        server.mark_reachable()
        server.release(connection)
        if self._waiting:
            with self._changed:
                self._changed.notify_all()

    def on_timeout(self, server: Server, since: float) -> None:
        """Note that a call got no answer from a server, which began then, as time.monotonic().

        Its idle connections of before may be dead, too. If there are other servers, this one is skipped for a
        while: a process that hangs still accepts connections.
        """
        server.close_idle(since)
        if len(self._servers) > 1:
            with self._changed:
                self._failed(server, "no answer in time")
        else:
            self.resolve_soon()

    def on_unavailable(self, server: Server) -> bool:
        """Note that a server answers that it is unavailable; return whether another one can be called."""
        with self._changed:
            if len(self._servers) > 1:
                self._failed(server, "it answers that it is unavailable")
            return any(not each.backing_off for each in self._servers if each is not server)

    def close(self) -> None:
        """Close all connections; those in use when their calls end. The next call opens another one."""
        with self._lock:
            servers, self._servers = self._servers, ()
        for server in servers:
            server.close()

    def after_fork_in_child(self) -> None:
        """Leave the parent's connections to the parent."""
        for each in list(self._sockets):
            each.close()  # this process' descriptor, which says nothing to the peer
        for server in self._servers:
            server.close()
        self._servers = ()
        self._reset()

    def _free(self, servers: Sequence[Server]) -> tuple[Server, Connection] | None:
        """Return a connection that is free and good, if any server has one."""
        context = self._credentials.context() if self._credentials else None
        # A server that is unavailable is not asked again while another one may still get a connection.
        servers = [server for server in servers if not server.backing_off] or servers
        for server in servers:
            while connection := server.take():
                if connection.tls_context is not context:
                    connection.close()  # of certificates that have been replaced
                elif connection.reusable():
                    if server is not servers[0]:
                        self._connect_ahead(servers[0])
                    return server, connection
                else:
                    connection.close()
                    self.resolve_soon()
        return None

    def _wait_for_connection(self, servers: Sequence[Server], end: float) -> tuple[Server, Connection] | None:
        """Wait until any server has a connection; return None if these are the target's servers no longer."""
        with self._changed:
            self._waiting += 1
            try:
                found, failure = self._connect_any(servers, end)
            finally:
                self._waiting -= 1
        if found:
            return found
        for server in servers:
            if server.defect:
                raise RuntimeError(f"connecting to {self._target.authority} failed") from server.defect
        if time.monotonic() >= end:
            raise StoreTimeout(f"{self._target.authority}: {failure}")
        if any(server.gone for server in servers):
            return None
        raise StoreUnavailable(f"{self._target.authority}: {failure}")

    def _connect_any(self, servers: Sequence[Server], end: float) -> tuple[tuple[Server, Connection] | None, str]:
        """Have one server after the other make a connection; return the first, or what went wrong last."""
        failure, asked = "it could not be reached a moment ago", []
        for tried, server in enumerate(servers):
            if server.backing_off:
                continue
            asked.append(server)
            now = time.monotonic()
            if found := self._connect_to(server, servers, now + (end - now) / (len(servers) - tried)):
                return found, ""
            failure = server.failure or failure
        while not (found := self._free(servers)):
            left = end - time.monotonic()
            if left <= 0 or not any(server.connecting for server in asked):
                break
            self._changed.wait(left)  # for those that were slow
        return found, failure

    def _connect_to(self, server: Server, servers: Sequence[Server], end: float) -> tuple[Server, Connection] | None:
        """Have a server make a connection, and return that, or one that any server has sooner."""
        while not (server.backing_off or server.gone):
            if found := self._free(servers):
                return found
            left = end - time.monotonic()
            if left <= 0:
                if server.connecting:  # and may still succeed; the next calls ask others first
                    self._failed(server, "no connection in time")
                break
            if server.connecting < self._waiting:
                self._connect_soon(server, end)
            else:
                self._changed.wait(left)
        return None

    def _connect_ahead(self, server: Server) -> None:
        """Have a connection to this server for the next call."""
        with self._changed:
            if not (server.connecting or server.backing_off):
                self._connect_soon(server, time.monotonic() + CONNECT_SECONDS)

    def _connect_soon(self, server: Server, end: float) -> None:
        """Make a connection in the background, or until `end` where that is impossible; called with the lock."""
        server.connecting += 1
        if not _start_thread(self._make, server, CONNECT_SECONDS):
            self._make(server, end - time.monotonic())

    def _make(self, server: Server, seconds: float) -> None:
        """Make a connection, and tell those who wait."""
        connection, failure, defect = None, "", None
        try:
            connection = self._connect(server.address, time.monotonic() + seconds)
        except (OSError, ConnectionBroken) as error:
            failure = _reason(error)
        except Exception as error:  # noqa: BLE001 - those who wait have to hear of it
            failure, defect = _reason(error), error
        with self._changed:
            server.connecting -= 1
            server.defect = defect
            if connection is None:
                self._failed(server, failure)
            else:
                server.mark_reachable()
                server.release(connection)
                self._changed.notify_all()

    def _failed(self, server: Server, reason: str) -> None:
        """Note that a server could not be reached, and tell those who wait; called with the lock."""
        server.mark_unreachable(reason, alone=len(self._servers) == 1)
        self._changed.notify_all()
        self.resolve_soon()

    def _connect(self, where: SocketAddress, end: float) -> Connection:
        family, address = where
        opened = socket.socket(family, socket.SOCK_STREAM)
        self._sockets.add(opened)
        try:
            opened.settimeout(max(end - time.monotonic(), 0.001))
            opened.connect(address)
            if family != socket.AF_UNIX:
                opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._credentials:
                name = self._credentials.server_name or self._target.host
                opened = secured = self._credentials.context().wrap_socket(opened, server_hostname=name)
                self._sockets.add(secured)
                _require_http2(secured)
            return Connection(opened)
        except BaseException:
            opened.close()
            raise

    def _resolve_first(self, end: float) -> tuple[Server, ...]:
        """Look the target's name up; wait for that until `end`."""
        resolver = self.resolve_soon()
        if resolver is not None:
            resolver.join(max(0.0, end - time.monotonic()))
        if not self._servers:
            raise StoreUnavailable(f"{self._target.authority}: {self._unresolved}")
        return self._servers

    def resolve_soon(self) -> threading.Thread | None:
        """Look the target's name up in the background, unless that is under way or was done a moment ago."""
        with self._lock:
            if self._target.literal:
                if not self._servers:
                    self._update_servers(self._target.resolve())
                return None
            if self._resolver is None and time.monotonic() - self._resolved > (
                RESOLVE_SECONDS if self._servers else 0.0
            ):
                self._resolver = _start_thread(self._resolve)
            return self._resolver

    def _resolve(self) -> None:
        addresses: list[SocketAddress] = []
        try:
            addresses = self._target.resolve()
        except OSError as error:
            self._unresolved = f"its name does not resolve ({error.strerror})"
        with self._lock:
            added = self._update_servers(addresses)
            self._resolver = None
        for server in added:
            self._connect_ahead(server)

    def _update_servers(self, addresses: list[SocketAddress]) -> list[Server]:
        """Make `addresses` the target's, unless there are none: those known before are better than nothing.

        Returns the servers that joined others, since calls would find connections to those only.
        """
        self._resolved = time.monotonic()
        if not addresses:
            return []
        before = self._servers
        known = {server.address: server for server in before}
        self._servers = tuple(known.get(where) or Server(where) for where in addresses)
        for server in set(before) - set(self._servers):
            server.close()
        return [server for server in self._servers if server not in before] if before else []


def _require_http2(secured: ssl.SSLSocket) -> None:
    if secured.selected_alpn_protocol() != "h2":
        raise ConnectionError("what listens there speaks TLS, but no gRPC")


def _start_thread(work: Callable[..., None], *arguments: object) -> threading.Thread | None:
    """Start a thread; an interpreter that is about to end starts none."""
    thread = threading.Thread(target=work, args=arguments, name="resumed-connector", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no connection in time"
    return getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error) or type(error).__name__
