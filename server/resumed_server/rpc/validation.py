"""The limits of the contract, and what is said of a field beyond them; see protos/vectors/limits.json."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

MAX_KEY = 64
MAX_VALUE = 65_536
MAX_POSITION = 64
MAX_OPERATIONS = 256
MAX_MESSAGE = MAX_OPERATIONS * (MAX_VALUE + 256)
"""Bytes that the largest legal message, a full Batch of full values, may take on the wire."""
MAX_SECONDS, MAX_NANOS = 315_576_000_000, 999_999_999
"""What a google.protobuf.Duration may have."""
LAST_SECOND = 253_402_300_799
"""Of what a google.protobuf.Timestamp may have: the end of the year 9999."""
MAX_NAMESPACE = 63
NAMESPACE_RULE = f"must be 1 to {MAX_NAMESPACE} characters of [a-z0-9.-]"
is_namespace = re.compile(rf"[a-z0-9.-]{{1,{MAX_NAMESPACE}}}").fullmatch


class InvalidField(Exception):
    """A field of a request is outside its limits; `field` is its path in the request."""

    def __init__(self, field: str, limit: str) -> None:
        super().__init__(f"{field} {limit}")
        self.field = field
        self.limit = limit

    def below(self, path: str) -> InvalidField:
        """Return the same error of a request that has this one's request at `path`."""
        return InvalidField(f"{path}.{self.field}", self.limit)


def seconds_of(time: Timestamp, field: str) -> float:
    """Return a time in Unix seconds, 0.0 for one that is unset; raise InvalidField if it is before 1970 or no time."""
    if not (0 <= time.seconds <= LAST_SECOND and 0 <= time.nanos <= MAX_NANOS):
        raise InvalidField(field, "must be a time from 1970 to 9999")
    return time.seconds + time.nanos / 1e9
