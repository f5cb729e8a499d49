"""ClientHello extensions from an untrusted peer are parsed strictly."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resumed._openssl.client_hello import identities, server_name, supported_versions


def pre_shared_key(*offered: bytes) -> bytes:
    """Return the extension that offers some identities, as a client writes it."""
    each = b"".join(len(identity).to_bytes(2, "big") + identity + bytes(4) for identity in offered)
    return len(each).to_bytes(2, "big") + each + b"binders"


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_identities_come_in_the_client_s_order(offered: list[bytes]) -> None:
    assert identities(pre_shared_key(*offered)) == offered


@given(st.binary(max_size=600))
def test_any_bytes_have_identities_or_none(extension: bytes) -> None:
    for identity in identities(extension):
        assert identity in extension


@given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=4), st.data())
def test_a_cut_extension_offers_nothing(offered: list[bytes], data: st.DataObject) -> None:
    whole = pre_shared_key(*offered)
    cut = data.draw(st.integers(0, len(whole) - len(b"binders") - 1))
    assert identities(whole[:cut]) == []


def test_a_length_that_leads_beyond_the_list_offers_nothing() -> None:
    extension = bytearray(pre_shared_key(bytes(32), bytes(32)) + bytes(100))
    extension[3] += 38 + 1
    assert identities(bytes(extension)) == []


def test_many_identities_take_no_time() -> None:
    assert len(identities(pre_shared_key(*[b""] * 10_922))) == 10_922


def test_versions() -> None:
    """RFC 8446 section 4.2.1."""
    assert supported_versions(b"\x04\x03\x04\x03\x03") == [0x304, 0x303]


@given(st.binary(max_size=300))
def test_any_bytes_have_versions_or_none(extension: bytes) -> None:
    assert len(supported_versions(extension)) <= 127


def test_malformed_versions_are_none() -> None:
    for extension in (b"", b"\x03\x03\x04\x03", b"\x04\x03\x04", b"\x02\x03\x04\x03\x03"):
        assert supported_versions(extension) == []


@given(st.binary(max_size=200))
def test_a_server_name_is_read(name: bytes) -> None:
    """RFC 6066 section 3: a list of one host."""
    entry = b"\0" + len(name).to_bytes(2, "big") + name
    extension = len(entry).to_bytes(2, "big") + entry
    assert server_name(extension) == name
    for cut in range(len(extension)):
        assert server_name(extension[:cut]) == b""
    assert server_name(extension + b"\0") == b""


@given(st.binary(max_size=300))
def test_any_bytes_have_a_server_name_or_none(extension: bytes) -> None:
    assert len(server_name(extension)) <= len(extension)
