"""Calls to a store that may be several servers: deadlines, and retries where they are harmless.

Each call has a connection to itself (see pool.py) and runs in its caller's thread (see http2.py).
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, NamedTuple

from resumed._exceptions import StoreError, StoreTimeout, StoreUnavailable, from_status
from resumed._transport.http2 import (
    CANCELLED,
    UNAVAILABLE,
    Connection,
    ConnectionBroken,
    RequestNotProcessed,
    Status,
    request_headers,
)
from resumed._transport.pool import CONNECT_SECONDS, ConnectionPool
from resumed._transport.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resumed._transport.pool import Server
    from resumed._transport.tls import Credentials

ATTEMPTS = 3
"""How often a call is tried, where another try is harmless and the deadline allows it."""

_LONGEST_PAUSE = 0.01
"""Maximum seconds until the only server is called once more after it has answered that it is unavailable."""

_PASSING = frozenset((CANCELLED, UNAVAILABLE))  # as a server that stops says it


class Method(NamedTuple):
    """An RPC.

    Attributes:
        path: As in HTTP/2: `/package.Service/Name`.
        repeatable: Whether a call whose outcome is unknown may be made again.
    """

    path: str
    repeatable: bool


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
        self._secure = credentials is not None
        self._connections = ConnectionPool(self._target, credentials)

    def call(self, method: Method, message: bytes, timeout: float, metadata: bytes = b"") -> bytes:
        """Make a unary call and return the encoded answer; `metadata` are encoded headers of its own.

        Raises:
            StoreError: It failed; StoreUnavailable or StoreTimeout where another time may succeed.
        """
        headers = request_headers(self._target.authority, method.path, self._secure) + metadata
        began = time.monotonic()
        end = began + timeout
        connections = self._connections
        failure: StoreError = StoreTimeout("there was no time for the call")
        for attempt in range(ATTEMPTS):
            server, connection = connections.take(end)
            try:
                connection.request(headers, message, end)
                answer = connection.answer(end)
            except Status as status:
                connections.release(server, connection)
                failure = from_status(status.number, status.message)
                if not (status.number in _PASSING and method.repeatable and self._may_repeat(server, attempt, end)):
                    raise failure from None
            except TimeoutError:
                connection.close()
                connections.on_timeout(server, began)
                raise StoreTimeout(f"no answer within {timeout * 1e3:.0f} ms") from None
            except ConnectionBroken as error:
                connection.close()
                connections.resolve_soon()  # there may be other servers now
                failure = StoreUnavailable(str(error))
                if not (method.repeatable or isinstance(error, RequestNotProcessed)):
                    raise failure from None
            except BaseException:
                connection.close()  # something else is wrong, or Ctrl-C: its next bytes belong to no call
                raise
            else:
                connections.release(server, connection)
                return answer
        raise failure

    def _may_repeat(self, server: Server, attempt: int, end: float) -> bool:
        """Return whether to repeat a call that a server has answered with UNAVAILABLE; wait if it is the only one."""
        if self._connections.on_unavailable(server):
            return True
        # Another one may be behind the same address. But not all callers at once, or one that is overloaded stays so.
        pause = random.uniform(0.5, 1.0) * _LONGEST_PAUSE  # noqa: S311 - no secret
        if attempt or pause >= end - time.monotonic():
            return False
        time.sleep(pause)
        return True

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
        _, connection = self._connections.take(end)
        try:
            connection.request(
                request_headers(self._target.authority, method.path, self._secure), message, end, lasts=True
            )
        except (Status, ConnectionBroken, OSError) as error:
            connection.close()
            raise StoreUnavailable(str(error)) from None
        return Stream(connection, patience)

    def close(self) -> None:
        """Close all connections; those in use when their calls end. The next call opens another one."""
        self._connections.close()


class Stream:
    """The answers of a server-streaming call, each as encoded; ends with a StoreError."""

    def __init__(self, connection: Connection, patience: float) -> None:
        self._connection, self._patience = connection, patience

    def __iter__(self) -> Iterator[bytes]:
        """Yield the answers."""
        try:
            while (message := self._connection.message(time.monotonic() + self._patience)) is not None:
                yield message
                self._connection.ping()
                if self._connection.goaway_received:  # or the server closes it in the end, in the middle of a message
                    raise StoreUnavailable("the store asked for another connection")
        except Status as status:
            raise from_status(status.number, status.message) from None
        except TimeoutError:
            raise StoreTimeout(f"the store was silent for {self._patience:g} s") from None
        except (ConnectionBroken, OSError) as error:
            raise StoreUnavailable(str(error)) from None
        finally:
            self._connection.close()
        raise StoreUnavailable("the store ended the stream")

    @property
    def confirmed(self) -> float:
        """The time that the answers so far are not older than, as time.monotonic(): see Connection."""
        return self._connection.confirmed

    def cancel(self) -> None:
        """End the call, from any thread."""
        self._connection.cancel()
