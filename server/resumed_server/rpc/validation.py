"""The limits of the contract, and the validation of fields that several RPCs have.

protos/vectors/limits.json publishes these limits to the clients in other languages; a test compares it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from resumed_server.config.patterns import MAX_NAMESPACE, is_namespace

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.timestamp_pb2 import Timestamp

MAX_KEY = 64
MAX_VALUE = 65_536
MAX_PINNED_VALUE = 1_024
MAX_POSITION = 64
MAX_OPERATIONS = 256
MAX_PAGE_SIZE = 10_000
MAX_PAGE_TOKEN = MAX_NAMESPACE
MAX_MESSAGE = MAX_OPERATIONS * (MAX_VALUE + 256)
"""Encoded bytes of the largest valid message, a Batch with the maximum number of Puts of the largest values."""
MAX_SECONDS, _MAX_NANOS = 315_576_000_000, 999_999_999
"""Maximum of a google.protobuf.Duration."""
LAST_SECOND = 253_402_300_799
"""Maximum of a google.protobuf.Timestamp, in Unix seconds: the end of the year 9999."""


class InvalidField(Exception):
    """A field of a request is outside its limits.

    Attributes:
        field: The path of the field in the request.
        limit: The limit, as the end of a sentence that begins with the field.
    """

    def __init__(self, field: str, limit: str) -> None:
        super().__init__(f"{field} {limit}")
        self.field = field
        self.limit = limit

    def below(self, path: str) -> InvalidField:
        """Return the same error for a request that contains this one at `path`."""
        return InvalidField(f"{path}.{self.field}", self.limit)


def validate_namespace(namespace: str) -> None:
    """Return if `namespace` is a valid name, or raise InvalidField."""
    if not is_namespace(namespace):
        raise InvalidField("namespace", f"must be 1 to {MAX_NAMESPACE} characters of [a-z0-9.-]")


def ttl_seconds(ttl: Duration) -> float:
    """Return a lifetime in seconds; raise InvalidField if it is not positive or not a valid Duration."""
    # The sign of a Duration is in both parts, so this rejects negative ones; a missing one reads as zero.
    if not (0 <= ttl.seconds <= MAX_SECONDS and 0 <= ttl.nanos <= _MAX_NANOS and (ttl.seconds or ttl.nanos)):
        raise InvalidField("ttl", "must be a duration above zero")
    return ttl.seconds + ttl.nanos / 1e9


def seconds_of(time: Timestamp, field: str) -> float:
    """Return a time in Unix seconds, 0.0 if it is unset; raise InvalidField if it is before 1970 or invalid."""
    if not (0 <= time.seconds <= LAST_SECOND and 0 <= time.nanos <= _MAX_NANOS):
        raise InvalidField(field, "must be a time from 1970 to 9999")
    return time.seconds + time.nanos / 1e9
