"""Patterns of identities and namespaces, as the grants file has them: exact, or with one * at the end."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# SPIFFE-ID section 2. A prefix ends behind the trust domain: "spiffe://example.org*" would take in example.organised.
_SPIFFE = re.compile(
    r"spiffe://[a-z0-9._-]{1,255}/[a-zA-Z0-9._/-]{0,1790}\*|spiffe://[a-z0-9._-]{1,255}(/[a-zA-Z0-9._-]+)*"
)
_DNS = re.compile(r"dns:[a-z0-9._-]{0,253}\*|dns:[a-z0-9_]([a-z0-9._-]{0,251}[a-z0-9])?")
MAX_NAMESPACE = 63
is_namespace = re.compile(rf"[a-z0-9.-]{{1,{MAX_NAMESPACE}}}").fullmatch
_is_namespace_prefix = re.compile(rf"[a-z0-9.-]{{0,{MAX_NAMESPACE - 1}}}\*").fullmatch


def is_namespace_pattern(text: str) -> bool:
    """Return whether a text is the name of a namespace, or the beginning of one and a final *."""
    return bool(is_namespace(text) or _is_namespace_prefix(text))


def matches(pattern: str, text: str) -> bool:
    """Return whether `text` equals the pattern, or begins with the part before its final *."""
    return text.startswith(pattern[:-1]) if pattern.endswith("*") else text == pattern


def identity_problems(identity: object) -> Iterator[str]:
    """Yield the problems of a pattern of identities."""
    if not isinstance(identity, str) or not (_SPIFFE.fullmatch(identity) or _DNS.fullmatch(identity)):
        yield (
            f"identity {quote(identity)} must be a SPIFFE id (spiffe://example.org/shop) or a DNS name in lower case "
            "(dns:frontend.shop.svc); one * may end it, in a SPIFFE id behind the trust domain's slash"
        )


def namespace_problems(namespaces: object) -> Iterator[str]:
    """Yield the problems of a list of patterns of namespaces."""
    for namespace in as_list(namespaces):
        if namespace is None or not is_namespace_pattern(namespace):
            yield (
                f"namespaces {quote(namespace)} must list names of 1 to 63 characters of [a-z0-9.-]; one * may end each"
            )


def as_list(value: object) -> Sequence[str | None]:
    """Return `value` if it is a list of texts, else only None."""
    return value if value and isinstance(value, list) and all(isinstance(text, str) for text in value) else [None]


def quote(value: object) -> str:
    """Return a value of the file as an error quotes it."""
    return "is missing or of another kind:" if value is None else f"{str(value)[:80]!r}"
