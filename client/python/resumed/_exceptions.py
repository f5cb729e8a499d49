"""The errors of the client, and the one table from gRPC status codes to them.

None of them ever reaches a handshake: the session policy turns each into a miss. They are for code that uses
StoreClient or Keyring directly, and for install(), which fails early and says what to do.
"""

from __future__ import annotations


class ResumedError(Exception):
    """The base of all errors of this package."""


class KeyringError(ResumedError):
    """A keyring is missing, malformed, or readable by others."""


class CredentialsError(ResumedError):
    """A certificate or key for the connection to the store is missing or malformed, or they do not fit."""


class UnsupportedContext(ResumedError):
    """The session callbacks of this TLS context cannot be set; the message says what to do."""


class UnsealError(ResumedError):
    """A value from the store cannot be opened, or its session cannot be used.

    Attributes:
        reason: `malformed`, `unknown-key`, `expired`, `not-authentic`, `undecodable`, `context-mismatch` or
            `server-name-mismatch`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class StoreError(ResumedError):
    """The store rejected a call; the message is the store's own.

    Attributes:
        code: The name of its gRPC status code; the closest one if the store sent none.
    """

    code = "UNKNOWN"


class StoreUnavailable(StoreError):
    """The store did not answer before the deadline, or cannot serve now. Trying again later may succeed."""

    code = "UNAVAILABLE"


class StoreTimeout(StoreUnavailable):
    """The deadline passed first; whether the store carried the call out is unknown."""

    code = "DEADLINE_EXCEEDED"


class AlreadyExists(StoreError):
    """The key holds another value, or its session was removed or taken."""


class LimitExceeded(StoreError):
    """The store is well, but a limit of the caller or of the namespace is used up. Call again later, and less often."""


class InvalidRequest(StoreError):
    """A key, value, ttl or namespace is outside its limits."""


_NAMES = (
    *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS"),
    *("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED"),
    *("INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"),
)
"""gRPC's status codes, by their numbers (google.rpc.Code)."""
_LONGEST_MESSAGE = 1_000
_BY_NAME: dict[str, type[StoreError]] = {
    "ALREADY_EXISTS": AlreadyExists,
    "CANCELLED": StoreUnavailable,  # sent by a server that stops: this client never cancels
    "DEADLINE_EXCEEDED": StoreTimeout,
    "INVALID_ARGUMENT": InvalidRequest,
    "RESOURCE_EXHAUSTED": LimitExceeded,
    "UNAVAILABLE": StoreUnavailable,
}


def from_status(number: int, message: str) -> StoreError:
    """Return the StoreError of a gRPC status code and the server's words, of a call or of an operation in a Batch."""
    name = _NAMES[number] if 0 <= number < len(_NAMES) else f"status {number}"
    # They end in logs: one line, not too long, and nothing in it that a terminal would obey.
    words = "".join(character if character.isprintable() else " " for character in message[:_LONGEST_MESSAGE])
    error = _BY_NAME.get(name, StoreError)(f"{name}: {words}")
    error.code = name
    return error
