"""The errors of the client, and the one table from gRPC status codes to them.

None of them ever reaches a handshake: the shim turns each into a miss. They are for code that uses SessionStore or
Keyring directly, and for install(), which fails early and says what to do.
"""

from __future__ import annotations

import grpc


class ResumedError(Exception):
    """The base of all errors of this package."""


class KeyringError(ResumedError):
    """A keyring is missing, malformed, or readable by others."""


class UnsupportedContext(ResumedError):
    """The session callbacks of this TLS context cannot be set; the message says what to do."""


class Unsealable(ResumedError):
    """A value from the store cannot be opened.

    Attributes:
        reason: `malformed`, `unknown-key`, `expired` or `not-authentic`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class StoreError(ResumedError):
    """The store refused a call; the message is the store's own."""


class StoreUnavailable(StoreError):
    """The store did not answer before the deadline, or cannot serve now. Trying again later may succeed."""


class StoreTimeout(StoreUnavailable):
    """The deadline passed first; whether the store carried the call out is unknown."""


class AlreadyExists(StoreError):
    """The key holds another value, or its session was removed or taken."""


class InvalidCall(StoreError):
    """A key, value, ttl or namespace is outside its limits."""


_BY_CODE: dict[grpc.StatusCode, type[StoreError]] = {
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.CANCELLED: StoreUnavailable,  # by a server that stops: nobody here cancels
    grpc.StatusCode.DEADLINE_EXCEEDED: StoreTimeout,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidCall,
    grpc.StatusCode.UNAVAILABLE: StoreUnavailable,
}
_BY_NUMBER = {code.value[0]: error for code, error in _BY_CODE.items()}


def from_rpc(error: grpc.RpcError) -> StoreError:
    """Return the StoreError of a failed call."""
    code, details = error.code(), error.details()
    return _BY_CODE.get(code, StoreError)(f"{code.name}: {details}")


def from_status(number: int, message: str) -> StoreError:
    """Return the StoreError of a google.rpc.Status inside a Batch."""
    return _BY_NUMBER.get(number, StoreError)(message)
