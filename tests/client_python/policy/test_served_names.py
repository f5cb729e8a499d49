"""A process learns from full handshakes which context serves a server name, and distrusts a name that changes."""

from __future__ import annotations

from resumed._policy.served_names import Expected, ServedNames

ONE, OTHER = bytes([1]) * 32, bytes([2]) * 32


def test_a_name_is_unknown_until_a_full_handshake_ended() -> None:
    names = ServedNames()
    assert names.expected(b"shop.example") == Expected(None, "context-unknown")
    names.learn(b"shop.example", ONE)
    assert names.expected(b"shop.example") == Expected(ONE)
    names.learn(b"shop.example", OTHER)
    assert names.expected(b"shop.example") == Expected(OTHER)
    assert names.expected(b"") == Expected(None, "context-unknown")


def test_a_name_that_is_distrusted_stays_so() -> None:
    names = ServedNames()
    assert names.distrust(b"shop.example")
    assert not names.distrust(b"shop.example")
    names.learn(b"shop.example", ONE)
    assert names.expected(b"shop.example") == Expected(None, "context-unstable")


def test_peers_cannot_make_the_table_grow() -> None:
    names = ServedNames(most=3)
    for name in (b"a", b"b", b"c", b"a", b"d"):
        names.learn(name, ONE)
    assert [names.expected(name).fingerprint for name in (b"a", b"b", b"c", b"d")] == [ONE, None, ONE, ONE]
