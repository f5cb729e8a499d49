"""Grants: which identities may do what in which namespaces. Their file, and the decision; nothing of calls.

    [[grant]]
    identity = "spiffe://example.org/shop"     # or "dns:frontend.shop.svc"; exact, or with one * at the end
    namespaces = ["shop", "shop.*"]            # exact, or with one * at the end
    operations = ["put", "get", "take", "remove", "watch"]

What no grant allows is denied. The file also holds limits (see limits.py), which allow nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resumed_server.config.patterns import identity_problems, listed, matches, namespace_problems, shown
from resumed_server.config.reloading_file import Followed
from resumed_server.limits.config import Limit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

OPERATIONS = ("put", "get", "take", "remove", "watch", "purge", "stats")
"""What can be granted: the calls of a frontend, then those of an operator."""

_FIELDS = ("identity", "namespaces", "operations")


@dataclass(frozen=True)
class Grant:
    """Allows an identity some operations in some namespaces.

    Attributes:
        identity: Who: `spiffe://` and an id, or `dns:` and a name; exact, or with one * at the end.
        namespaces: Where: 1 to 63 characters of [a-z0-9.-] each; exact, or with one * at the end.
        operations: What: some of `put`, `get`, `take`, `remove`, `watch`; for operators `purge` and `stats`.
    """

    identity: str
    namespaces: tuple[str, ...]
    operations: tuple[str, ...]

    def names(self, identity: str) -> bool:
        """Return whether it is about `identity`."""
        return matches(self.identity, identity)

    def covers(self, namespace: str) -> bool:
        """Return whether it is about `namespace`."""
        return any(matches(pattern, namespace) for pattern in self.namespaces)


@dataclass(frozen=True)
class Grants:
    """All grants of a file, in its order, and its limits."""

    all: tuple[Grant, ...]
    limits: tuple[Limit, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Grants:
        """Read a file of grants.

        Raises:
            ValueError: All that is wrong with it, a line each.
        """
        try:
            document = tomllib.loads(text)
        except RecursionError:
            raise ValueError("this is no grants file: it is nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"this is no TOML: {error}") from None
        problems = [
            f"unknown {name!r}; only [[grant]] and [[limit]] are known"
            for name in document
            if name not in {"grant", "limit"}
        ]
        grants, limits = (_tables(document, name, problems) for name in ("grant", "limit"))
        for name, tables, check in (("grant", grants, _problems), ("limit", limits, Limit.problems)):
            for number, table in enumerate(tables, 1):
                problems += (f"{name} {number}: {problem}" for problem in check(table))
        if problems:
            raise ValueError("\n".join(problems))
        return cls(
            tuple(Grant(grant["identity"], tuple(grant["namespaces"]), tuple(grant["operations"])) for grant in grants),
            tuple(map(Limit.of, limits)),
        )

    def allow(self, identities: Iterable[str], namespace: str, operation: str) -> bool:
        """Return whether one of the identities may carry out the operation in the namespace."""
        return any(
            operation in grant.operations and grant.covers(namespace) and grant.names(identity)
            for identity in identities
            for grant in self.all
        )


def followed(path: str) -> Followed[Grants]:
    """Follow the file at `path`.

    Raises:
        ValueError: It cannot be used; the message says why.
    """
    return Followed("grants", [path], lambda contents: _read(path, contents[0]))


def _read(path: str, content: bytes) -> Grants:
    try:
        return Grants.parse(content.decode())
    except UnicodeDecodeError:
        raise ValueError(f"{path}: this is no text in UTF-8") from None
    except ValueError as error:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in str(error).splitlines())) from None


def _tables(document: dict[str, Any], name: str, problems: list[str]) -> Sequence[dict[str, Any]]:
    """Return the tables of a name; add to the problems if it is something else."""
    tables = document.get(name, [])
    if isinstance(tables, list) and all(isinstance(table, dict) for table in tables):
        return tables
    problems.append(f'"{name}" must be written as [[{name}]]')
    return []


def _problems(grant: dict[str, Any]) -> Iterable[str]:
    """Yield what is wrong with one grant."""
    for name in grant:
        if name not in _FIELDS:
            yield f"unknown {name!r}; a grant has {', '.join(_FIELDS)}"
    yield from identity_problems(grant.get("identity"))
    yield from namespace_problems(grant.get("namespaces"))
    for operation in listed(grant.get("operations")):
        if operation not in OPERATIONS:
            yield f"operations {shown(operation)} must list some of {', '.join(OPERATIONS)}"
