"""Grants: the operations that identities may execute, by namespace, and the file that lists them.

    [[grant]]
    identity = "spiffe://example.org/shop"     # or "dns:frontend.shop.svc"; exact, or with one * at the end
    namespaces = ["shop", "shop.*"]            # exact, or with one * at the end
    operations = ["put", "get", "take", "remove", "watch"]

An operation without a grant is denied. The file may also have limits (see limits/config.py), which grant nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resumed_server.config.patterns import identity_problems, list_problems, matches, namespace_problems
from resumed_server.config.reloading_file import Followed
from resumed_server.limits.config import Limit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

OPERATIONS = ("put", "get", "take", "remove", "watch", "purge", "stats")
"""The operations that can be granted: those of frontends, then those of operators."""

ALL_NAMESPACES = "*"
"""The namespace of a grant for the Stats of all namespaces. No namespace has this name."""
_FIELDS = ("identity", "namespaces", "operations")


@dataclass(frozen=True)
class Grant:
    """Allows an identity some operations in some namespaces.

    Attributes:
        identity: `spiffe://` and an id, or `dns:` and a name; exact, or with one * at the end.
        namespaces: 1 to 63 characters of [a-z0-9.-] each; exact, or with one * at the end.
        operations: Some of `put`, `get`, `take`, `remove`, `watch`; for operators `purge` and `stats`.
    """

    identity: str
    namespaces: tuple[str, ...]
    operations: tuple[str, ...]

    def matches_identity(self, identity: str) -> bool:
        """Return whether the grant is for `identity`."""
        return matches(self.identity, identity)

    def matches_namespace(self, namespace: str) -> bool:
        """Return whether the grant is for `namespace`."""
        return any(matches(pattern, namespace) for pattern in self.namespaces)


@dataclass(frozen=True)
class Grants:
    """The grants and the limits of a file, in its order."""

    grants: tuple[Grant, ...]
    limits: tuple[Limit, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Grants:
        """Parse a grants file.

        Raises:
            ValueError: The file is invalid; each line of the message describes one problem.
        """
        try:
            document = tomllib.loads(text)
        except RecursionError:
            raise ValueError("not a valid grants file: it is nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"not valid TOML: {error}") from None
        problems = [
            f"unknown {name!r}; only [[grant]] and [[limit]] are known"
            for name in document
            if name not in {"grant", "limit"}
        ]
        grants, limits = (_tables(document, name, problems) for name in ("grant", "limit"))
        for name, tables, check in (("grant", grants, _validate), ("limit", limits, Limit.validate)):
            for number, table in enumerate(tables, 1):
                problems += (f"{name} {number}: {problem}" for problem in check(table))
        if problems:
            raise ValueError("\n".join(problems))
        return cls(
            tuple(Grant(grant["identity"], tuple(grant["namespaces"]), tuple(grant["operations"])) for grant in grants),
            tuple(map(Limit.from_table, limits)),
        )

    def is_allowed(self, identities: Iterable[str], namespace: str, operation: str) -> bool:
        """Return whether a grant allows one of the identities the operation in the namespace."""
        return any(
            operation in grant.operations and grant.matches_namespace(namespace) and grant.matches_identity(identity)
            for identity in identities
            for grant in self.grants
        )


def watch_file(path: str) -> Followed[Grants]:
    """Read the grants file at `path`; return it as a file that can be reloaded.

    Raises:
        ValueError: The file is invalid; the message names the reasons.
    """
    return Followed("grants", [path], lambda contents: _read(path, contents[0]))


def _read(path: str, content: bytes) -> Grants:
    try:
        return Grants.parse(content.decode())
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not valid UTF-8") from None
    except ValueError as error:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in str(error).splitlines())) from None


def _tables(document: dict[str, Any], name: str, problems: list[str]) -> Sequence[dict[str, Any]]:
    """Return the tables called `name`; add a problem if the value is of another type."""
    tables = document.get(name, [])
    if isinstance(tables, list) and all(isinstance(table, dict) for table in tables):
        return tables
    problems.append(f'"{name}" must be written as [[{name}]]')
    return []


def _validate(grant: dict[str, Any]) -> Iterable[str]:
    """Yield the problems of one grant."""
    for name in grant:
        if name not in _FIELDS:
            yield f"unknown {name!r}; a grant has {', '.join(_FIELDS)}"
    yield from identity_problems(grant.get("identity"))
    yield from namespace_problems(grant.get("namespaces"))
    some = f"some of {', '.join(OPERATIONS)}"
    yield from list_problems("operations", grant.get("operations"), OPERATIONS.__contains__, some)
