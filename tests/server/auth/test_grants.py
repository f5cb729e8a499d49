"""Parsing of grants files, and their decisions."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resumed_server.auth.grants import OPERATIONS, Grants
from support.mtls import grant

SHOP = "spiffe://example.org/shop"


def limit(**fields: str) -> str:
    """Return a limit as in the file."""
    return "[[limit]]\n" + "".join(f"{name} = {value}\n" for name, value in fields.items())


def allowed(text: str, identity: str, namespace: str = "shop", operation: str = "get") -> bool:
    """Return whether the grants file `text` allows it."""
    return Grants.parse(text).is_allowed([identity], namespace, operation)


@pytest.mark.parametrize(
    ("pattern", "identity", "matches"),
    [
        (SHOP, SHOP, True),
        (SHOP, SHOP + "/a", False),
        (SHOP, SHOP.upper(), False),
        (SHOP, "dns:" + SHOP, False),
        (SHOP + "/*", SHOP + "/a", True),
        (SHOP + "/*", SHOP + "/a/b", True),
        (SHOP + "/*", SHOP, False),
        (SHOP + "*", SHOP + "2", True),
        ("spiffe://example.org/*", SHOP, True),
        ("spiffe://example.org/*", "spiffe://example.organised/shop", False),
        ("spiffe://example.org", "spiffe://example.org", True),
        ("dns:a.b", "dns:a.b", True),
        ("dns:a.b", "dns:a.b.c", False),
        ("dns:a.b", "dns:*.b", False),
        ("dns:a*", "dns:a.b", True),
        ("dns:*", "dns:*.b", True),
        ("dns:*", SHOP, False),
    ],
)
def test_an_identity_matches_exactly_or_by_prefix(pattern: str, identity: str, matches: bool) -> None:
    """A pattern of one kind never matches an identity of the other."""
    assert allowed(grant(pattern, ["shop"], ["get"]), identity) is matches


@pytest.mark.parametrize(
    ("pattern", "namespace", "matches"),
    [
        ("shop", "shop", True),
        ("shop", "shops", False),
        ("shop.*", "shop.eu", True),
        ("shop.*", "shop", False),
        ("*", "anything", True),
    ],
)
def test_a_namespace_matches_exactly_or_by_prefix(pattern: str, namespace: str, matches: bool) -> None:
    """No other character is special: a dot is a dot."""
    assert allowed(grant(SHOP, [pattern], ["get"]), SHOP, namespace) is matches


def test_every_operation_is_granted_by_its_name() -> None:
    """No other name grants it."""
    for operation in OPERATIONS:
        text = grant(SHOP, ["shop"], [operation])
        assert [other for other in OPERATIONS if allowed(text, SHOP, "shop", other)] == [operation]


def test_identity_namespace_and_operation_must_be_in_one_grant() -> None:
    """Two grants do not combine to a third."""
    text = grant(SHOP, ["shop"], ["put"]) + grant(SHOP, ["pay"], ["get"]) + grant("dns:other", ["shop"], ["get"])
    assert not allowed(text, SHOP, "shop", "get")
    assert Grants.parse(text).is_allowed([SHOP, "dns:other"], "shop", "get"), "any of the caller's names may have it"


def test_an_unknown_key_of_a_limit_is_named() -> None:
    with pytest.raises(ValueError, match="limit 1: unknown 'namespace'; a limit has identity, namespaces, ") as caught:
        Grants.parse('[[limit]]\nnamespace = ["shop"]\nsessions = 1\n')
    assert "limit 1: it must have either identity or namespaces" in str(caught.value)


def test_an_empty_file_allows_nothing() -> None:
    """It is a valid file."""
    assert not allowed("", SHOP)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("grant", "not valid TOML"),
        ("[grant]\n", r'"grant" must be written as \[\[grant\]\]'),
        ("grant = 1\n", r'"grant" must be written as \[\[grant\]\]'),
        ("grant = [1]\n", r'"grant" must be written as \[\[grant\]\]'),
        ("[[grants]]\n", r"unknown 'grants'; only \[\[grant\]\] and \[\[limit\]\] are known"),
        (grant(SHOP, ["shop"], ["get"]) + "role = 1\n", "grant 1: unknown 'role'"),
        (grant("", ["shop"], ["get"]), "identity '' must be a SPIFFE id"),
        (grant("shop", ["shop"], ["get"]), "identity 'shop' must be"),
        (grant("*", ["shop"], ["get"]), r"identity '\*' must be"),
        (grant("spiffe://*", ["shop"], ["get"]), "identity .* behind the trust domain's slash"),
        (grant("spiffe://example.org*", ["shop"], ["get"]), "identity .* behind the trust domain's slash"),
        (grant("spiffe://example.org/*/shop", ["shop"], ["get"]), "identity"),
        (grant("spiffe://example.org/shop/", ["shop"], ["get"]), "identity"),
        (grant("spiffe://Example.org/shop", ["shop"], ["get"]), "identity"),
        (grant("dns:*.svc", ["shop"], ["get"]), "identity"),
        (grant("dns:Shop.svc", ["shop"], ["get"]), "DNS name in lower case"),
        (grant(SHOP, ["Shop"], ["get"]), "namespaces 'Shop' must list names"),
        (grant(SHOP, ["s*p"], ["get"]), "namespaces"),
        (grant(SHOP, [], ["get"]), r"namespaces \[\] must be a list of names"),
        (grant(SHOP, ["s" * 64], ["get"]), "namespaces"),
        (grant(SHOP, ["shop"], []), r"operations \[\] must be a list of some of put, get"),
        (grant(SHOP, ["shop"], ["*"]), r"operations '\*' must list some of put, get"),
        (f'[[grant]]\nidentity = "{SHOP}"\n', "namespaces is missing; it must list names"),
        (f'[[grant]]\nidentity = "{SHOP}"\n', "operations is missing; it must list some of put, get"),
        ('[[grant]]\nnamespaces = ["shop"]\noperations = ["get"]\n', "identity is missing; it must be a SPIFFE id"),
        ("[[grant]]\nidentity = 5\n", "identity 5 must be a SPIFFE id"),
        (
            f'[[grant]]\nidentity = "{SHOP}"\nnamespaces = "shop"\noperations = ["get"]\n',
            "namespaces 'shop' must be a list",
        ),
        (f'[[grant]]\nidentity = "{SHOP}"\nnamespaces = [1]\noperations = ["get"]\n', "namespaces 1 must list names"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("limit = 1\n", r'"limit" must be written as \[\[limit\]\]'),
        (limit(sessions="1"), "limit 1: it must have either identity or namespaces"),
        (limit(identity=f'"{SHOP}"', namespaces='["shop"]', watchers="1"), "either identity or namespaces"),
        (limit(identity=f'"{SHOP}"'), "it limits nothing; give it some of operations_per_second, watchers$"),
        (
            limit(identity=f'"{SHOP}"', sessions="1"),
            "'sessions' is for limits of namespaces; a limit of identity has operations_per",
        ),
        (limit(identity='"*"', watchers="1"), r"limit 1: identity '\*' must be"),
        (limit(namespaces='"shop"', watchers="1"), "namespaces 'shop' must be a list of names"),
        (limit(namespaces='["Shop"]', watchers="1"), "namespaces 'Shop' must list names"),
        (limit(namespaces='["shop"]', sessions="0"), "sessions 0 must be a whole number, above 0"),
        (limit(namespaces='["shop"]', sessions="true"), "sessions True must be a whole number"),
        (limit(namespaces='["shop"]', sessions="1.5"), "sessions 1.5 must be a whole number"),
        (limit(namespaces='["shop"]', bytes='"many"'), "bytes 'many' must be a size such as \"256MiB\""),
        (limit(namespaces='["shop"]', bytes='"0MiB"'), "bytes '0MiB' must be a size"),
    ],
)
def test_an_invalid_file_is_rejected(text: str, problem: str) -> None:
    """The error names the grant, the field and the rule."""
    with pytest.raises(ValueError, match=problem):
        Grants.parse(text)


def test_a_limit_is_for_identities_or_for_namespaces() -> None:
    """Limits have the order of the file."""
    text = limit(identity=f'"{SHOP}/*"', operations_per_second="2_000", watchers="3")
    text += limit(namespaces='["shop", "shop.*"]', sessions="10", bytes='"1.5KiB"')
    text += limit(namespaces='["pay"]', bytes="7")
    first, second, third = Grants.parse(text).limits
    assert (first.operations_per_second, first.watchers, first.sessions, first.bytes) == (2000, 3, None, None)
    assert first.matches_identity(SHOP + "/a")
    assert not first.matches_identity(SHOP)
    assert not first.matches_namespace("shop")
    assert (second.sessions, second.bytes, third.bytes) == (10, 1536, 7)
    assert second.matches_namespace("shop.eu")
    assert not second.matches_namespace("pay")
    assert not second.matches_identity("")
    assert not allowed(text, SHOP), "a limit grants nothing"


def test_all_problems_are_reported_together() -> None:
    """In a line each."""
    with pytest.raises(ValueError, match="grant 1") as caught:
        Grants.parse(grant("a", ["B"], ["c"]) + grant("dns:a", ["b"], ["d", "get", "e"]))
    assert [line[:18] for line in str(caught.value).splitlines()] == [
        "grant 1: identity ",
        "grant 1: namespace",
        "grant 1: operation",
        "grant 2: operation",
        "grant 2: operation",
    ]


@given(st.text() | st.text(alphabet='[]{}"=grantlim.\n#* 1'))
@settings(max_examples=300)
def test_any_text_is_a_grants_file_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        Grants.parse(text)
