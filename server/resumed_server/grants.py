"""Grants: which identities may do what in which namespaces. Their file, and the decision; nothing of calls.

    [[grant]]
    identity = "spiffe://example.org/shop"     # or "dns:frontend.shop.svc"; exact, or with one * at the end
    namespaces = ["shop", "shop.*"]            # exact, or with one * at the end
    operations = ["put", "get", "take", "remove", "watch"]

What no grant allows is denied.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resumed_server.files import Followed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

OPERATIONS = ("put", "get", "take", "remove", "watch", "purge", "stats")
"""What can be granted: the calls of a frontend, then those of an operator."""

# SPIFFE-ID section 2. A prefix ends behind the trust domain: "spiffe://example.org*" would take in example.organised.
_SPIFFE = re.compile(
    r"spiffe://[a-z0-9._-]{1,255}/[a-zA-Z0-9._/-]{0,1790}\*|spiffe://[a-z0-9._-]{1,255}(/[a-zA-Z0-9._-]+)*"
)
_DNS = re.compile(r"dns:[a-z0-9._-]{0,253}\*|dns:[a-z0-9_]([a-z0-9._-]{0,251}[a-z0-9])?")
_NAMESPACE = re.compile(r"[a-z0-9.-]{1,63}|[a-z0-9.-]{0,62}\*")
_FIELDS = ("identity", "namespaces", "operations")


@dataclass(frozen=True)
class Grant:
    """Allows an identity some operations in some namespaces."""

    identity: str
    namespaces: tuple[str, ...]
    operations: tuple[str, ...]

    def names(self, identity: str) -> bool:
        """Return whether it is about `identity`."""
        return _matches(self.identity, identity)

    def covers(self, namespace: str) -> bool:
        """Return whether it is about `namespace`."""
        return any(_matches(pattern, namespace) for pattern in self.namespaces)


@dataclass(frozen=True)
class Grants:
    """All grants of a file, in its order."""

    all: tuple[Grant, ...]

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
        problems = [f"unknown {name!r}; only [[grant]] is known" for name in document if name != "grant"]
        grants = document.get("grant", [])
        if not isinstance(grants, list) or not all(isinstance(grant, dict) for grant in grants):
            problems.append('"grant" must be written as [[grant]]')
            grants = []
        for number, grant in enumerate(grants, 1):
            problems += (f"grant {number}: {problem}" for problem in _problems(grant))
        if problems:
            raise ValueError("\n".join(problems))
        return cls(
            tuple(Grant(grant["identity"], tuple(grant["namespaces"]), tuple(grant["operations"])) for grant in grants)
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


def _matches(pattern: str, text: str) -> bool:
    return text.startswith(pattern[:-1]) if pattern.endswith("*") else text == pattern


def _problems(grant: dict[str, Any]) -> Iterable[str]:
    """Yield what is wrong with one grant."""
    for name in grant:
        if name not in _FIELDS:
            yield f"unknown {name!r}; a grant has {', '.join(_FIELDS)}"
    identity = grant.get("identity")
    if not isinstance(identity, str) or not (_SPIFFE.fullmatch(identity) or _DNS.fullmatch(identity)):
        yield (
            f"identity {_shown(identity)} must be a SPIFFE id (spiffe://example.org/shop) or a DNS name in lower case "
            "(dns:frontend.shop.svc); one * may end it, in a SPIFFE id behind the trust domain's slash"
        )
    for namespace in _listed(grant.get("namespaces")):
        if namespace is None or not _NAMESPACE.fullmatch(namespace):
            yield (
                f"namespaces {_shown(namespace)} must list names of 1 to 63 characters of [a-z0-9.-]; "
                "one * may end each"
            )
    for operation in _listed(grant.get("operations")):
        if operation not in OPERATIONS:
            yield f"operations {_shown(operation)} must list some of {', '.join(OPERATIONS)}"


def _listed(value: object) -> Sequence[str | None]:
    """Return `value` if it is a list of texts, else only None."""
    return value if value and isinstance(value, list) and all(isinstance(text, str) for text in value) else [None]


def _shown(value: object) -> str:
    return "is missing or of another kind:" if value is None else f"{str(value)[:80]!r}"
