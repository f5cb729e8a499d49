"""Patterns of identities and namespaces, as the grants file has them: exact, or with one * at the end."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
            f"identity {'is missing; it' if identity is None else quote(identity)} must be a SPIFFE id "
            "(spiffe://example.org/shop) or a DNS name in lower case (dns:frontend.shop.svc); one * may end it, in a "
            "SPIFFE id behind the trust domain's slash"
        )


def namespace_problems(namespaces: object) -> Iterator[str]:
    """Yield the problems of a list of patterns of namespaces."""
    content = "names of 1 to 63 characters of [a-z0-9.-]; one * may end each"
    yield from list_problems("namespaces", namespaces, is_namespace_pattern, content)


def list_problems(name: str, value: object, is_valid: Callable[[str], bool], content: str) -> Iterator[str]:
    """Yield the problems of a value that must be a list of valid texts; `content` describes them."""
    if value is None:
        yield f"{name} is missing; it must list {content}"
    elif not value or not isinstance(value, list):
        yield f"{name} {quote(value)} must be a list of {content}"
    else:
        invalid = (text for text in value if not isinstance(text, str) or not is_valid(text))
        yield from (f"{name} {quote(text)} must list {content}" for text in invalid)


def quote(value: object) -> str:
    """Return a value of the file as an error quotes it."""
    return repr(value[:80]) if isinstance(value, str) else repr(value)[:80]
