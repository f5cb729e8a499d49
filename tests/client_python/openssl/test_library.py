from __future__ import annotations

import ssl

import pytest
from OpenSSL import SSL

from resumed._openssl.library import context_of


@pytest.mark.parametrize(
    "setter",
    [
        "set_tlsext_servername_callback",
        "set_alpn_select_callback",
        "set_info_callback",
        "set_keylog_callback",
        "set_ocsp_server_callback",
    ],
)
def test_each_callback_of_pyopenssl_that_receives_the_connection_may_change_its_context(setter: str) -> None:
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    may_change = context_of(context).may_change
    assert not may_change()
    getattr(context, setter)(lambda *_: None)
    assert may_change()


def test_a_servername_callback_of_ssl_may_change_the_context() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    may_change = context_of(context).may_change
    assert not may_change()
    context.sni_callback = lambda *_: None
    assert may_change()


def test_a_context_that_is_gone_may_have_changed() -> None:
    may_change = context_of(SSL.Context(SSL.TLS_SERVER_METHOD)).may_change
    assert may_change()
