"""Limits of identities and namespaces, as the grants file configures them.

    [[limit]]
    identity = "spiffe://example.org/shop"    # for each matching identity separately
    operations_per_second = 2000
    watchers = 16

    [[limit]]
    namespaces = ["shop", "shop.*"]           # for all of these together
    operations_per_second = 5000
    sessions = 1_000_000
    bytes = "512MiB"
    watchers = 64

An identity has the first limit that matches it, and so has a namespace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resumed_server.config.patterns import identity_problems, matches, namespace_problems, quote
from resumed_server.config.types import Size

if TYPE_CHECKING:
    from collections.abc import Iterator

_OF_IDENTITIES = ("operations_per_second", "watchers")
LIMIT_NAMES = (*_OF_IDENTITIES, "sessions", "bytes")
"""The names of all amounts that a limit of namespaces may have; one of identities has the first two only."""
_MAX_AMOUNT = 1 << 44
_MAX_LABEL = 80


@dataclass(frozen=True)
class Limit:
    """A limit for one identity, or for several namespaces combined. An omitted field means unlimited.

    Attributes:
        identity: A pattern of identities, as in a grant; each of them has the limit for itself. Either this or
            `namespaces`.
        namespaces: Patterns of namespaces, as in a grant; all of them share the limit. Either this or `identity`.
        operations_per_second: Operations of calls, including rejected ones; each operation of a Batch counts.
        watchers: Watch streams per process of the server.
        sessions: Stored sessions, and tombstones of removed and taken ones; with `namespaces` only.
        bytes: Bytes of their values, plus 256 for each session and tombstone; with `namespaces` only. A number, or a
            size such as "512MiB".
    """

    identity: str = ""
    namespaces: tuple[str, ...] = ()
    operations_per_second: int | None = None
    watchers: int | None = None
    sessions: int | None = None
    bytes: int | None = None

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> Limit:
        """Return the limit of a valid table of the file."""
        size = table.get("bytes")
        return cls(
            **table
            | {"namespaces": tuple(table.get("namespaces", ()))}
            | ({"bytes": Size.parse(size)} if isinstance(size, str) else {})
        )

    @classmethod
    def validate(cls, table: dict[str, Any]) -> Iterator[str]:
        """Yield the problems of a table of the file."""
        for name in table:
            if name not in ("identity", "namespaces", *LIMIT_NAMES):
                yield f"unknown {name!r}; a limit has {', '.join(('identity', 'namespaces', *LIMIT_NAMES))}"
        if ("identity" in table) == ("namespaces" in table):
            yield "it must have either identity or namespaces"
            return
        known = _OF_IDENTITIES if "identity" in table else LIMIT_NAMES
        yield from (
            identity_problems(table["identity"]) if "identity" in table else namespace_problems(table["namespaces"])
        )
        whose = "identity" if "identity" in table else "namespaces"
        for name in LIMIT_NAMES:
            if name in table and name not in known:
                yield f"{name!r} is for limits of namespaces; a limit of {whose} has {', '.join(known)}"
        if not any(name in table for name in known):
            yield f"it limits nothing; give it some of {', '.join(known)}"
        for name in known:
            if name in table and not _is_positive(table[name], size=name == "bytes"):
                what = 'a size such as "256MiB"' if name == "bytes" else "a whole number"
                yield f"{name} {quote(table[name])} must be {what}, above 0"

    @property
    def label(self) -> str:
        """The name of the limit in metrics: its patterns, or "" for the default limit of each namespace."""
        return (self.identity or ", ".join(self.namespaces))[:_MAX_LABEL]

    @property
    def limits_sizes(self) -> bool:
        """Whether it limits sessions or bytes."""
        return self.sessions is not None or self.bytes is not None

    def matches_identity(self, identity: str) -> bool:
        """Return whether the limit is for `identity`."""
        return bool(self.identity) and matches(self.identity, identity)

    def matches_namespace(self, namespace: str) -> bool:
        """Return whether the limit is for `namespace`."""
        return any(matches(pattern, namespace) for pattern in self.namespaces)


def _is_positive(value: object, *, size: bool) -> bool:
    if size and isinstance(value, str):
        try:
            value = Size.parse(value)
        except ValueError:
            return False
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_AMOUNT
