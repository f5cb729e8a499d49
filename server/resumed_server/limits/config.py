"""Limits: how much an identity may do, and how much there may be in namespaces. What the grants file says of them.

    [[limit]]
    identity = "spiffe://example.org/shop"    # each identity that this names, by itself
    operations_per_second = 2000
    watchers = 16

    [[limit]]
    namespaces = ["shop", "shop.*"]           # all of these together
    operations_per_second = 5000
    sessions = 1_000_000
    bytes = "512MiB"
    watchers = 64

Of those for identities, and of those for namespaces, the first that names one is the one that counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resumed_server.config.patterns import identity_problems, matches, namespace_problems, shown
from resumed_server.config.types import Size

if TYPE_CHECKING:
    from collections.abc import Iterator

_OF_IDENTITIES = ("operations_per_second", "watchers")
_OF_NAMESPACES = (*_OF_IDENTITIES, "sessions", "bytes")
_LARGEST = 1 << 44


@dataclass(frozen=True)
class Limit:
    """What an identity, or some namespaces together, may use; what is not given is as much as there is.

    Attributes:
        identity: Whom it is for, each identity by itself: as in a grant. Either this or `namespaces`.
        namespaces: What it is for, all of these together: as in a grant. Either this or `identity`.
        operations_per_second: Those that calls ask for, refused ones included; a Batch counts each of its own.
        watchers: Watch streams, in each process of the server.
        sessions: Sessions that are stored, and tombstones of those that were removed or taken, in `namespaces` only.
        bytes: What their values take, and 256 bytes for each session and tombstone, in `namespaces` only: a number, or
            a size such as "512MiB".
    """

    identity: str = ""
    namespaces: tuple[str, ...] = ()
    operations_per_second: int | None = None
    watchers: int | None = None
    sessions: int | None = None
    bytes: int | None = None

    @classmethod
    def of(cls, table: dict[str, Any]) -> Limit:
        """Return what a table of the file says, in which there are no problems."""
        size = table.get("bytes")
        return cls(
            **table
            | {"namespaces": tuple(table.get("namespaces", ()))}
            | ({"bytes": Size.parse(size)} if isinstance(size, str) else {})
        )

    @classmethod
    def problems(cls, table: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong with a table of the file."""
        if ("identity" in table) == ("namespaces" in table):
            yield "it must have either identity or namespaces"
            return
        known = _OF_IDENTITIES if "identity" in table else _OF_NAMESPACES
        yield from (
            identity_problems(table["identity"]) if "identity" in table else namespace_problems(table["namespaces"])
        )
        whose = "identity" if "identity" in table else "namespaces"
        for name in table:
            if name != whose and name not in known:
                yield f"unknown {name!r}; a limit of {whose} has {', '.join(known)}"
        if not any(name in table for name in known):
            yield f"it limits nothing; give it some of {', '.join(known)}"
        for name in known:
            if name in table and not _is_amount(table[name], size=name == "bytes"):
                what = 'a size such as "256MiB"' if name == "bytes" else "a whole number"
                yield f"{name} {shown(table[name])} must be {what}, above 0"

    @property
    def limits_sizes(self) -> bool:
        """Whether it limits what there may be."""
        return self.sessions is not None or self.bytes is not None

    def names(self, identity: str) -> bool:
        """Return whether it is for `identity`."""
        return bool(self.identity) and matches(self.identity, identity)

    def covers(self, namespace: str) -> bool:
        """Return whether it is for `namespace`."""
        return any(matches(pattern, namespace) for pattern in self.namespaces)


def _is_amount(value: object, *, size: bool) -> bool:
    if size and isinstance(value, str):
        try:
            value = Size.parse(value)
        except ValueError:
            return False
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST
