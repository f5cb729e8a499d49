"""Lines of native libraries become counts and log lines."""

from __future__ import annotations

from collections import Counter

import pytest
from structlog.testing import capture_logs

from resumed_server import errors
from resumed_server.observability.native_log import REASONS, handle

HANDSHAKE = (
    "I1129 23:58:40.635425   19305 ssl_transport_security.cc:2563] Handshake failed with error SSL_ERROR_SSL: "
    "error:100000c0:SSL routines:OPENSSL_internal:{}: Invalid certificate verification context\n"
)


@pytest.fixture(autouse=True)
def _nothing_was_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_last_logged", {})


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "no-certificate"),
        ("CERTIFICATE_VERIFY_FAILED", "untrusted-certificate"),
        ("HTTP_REQUEST", "not-tls"),
        ("BAD_PACKET_LENGTH", "other"),
    ],
)
def test_each_refused_handshake_is_counted_and_one_is_logged(cause: str, reason: str) -> None:
    counts: Counter[str] = Counter()
    with capture_logs() as logged:
        for _ in range(50):
            handle(HANDSHAKE.format(cause), lambda each: counts.update([each]))
    assert counts == {reason: 50}
    assert set(counts) <= set(REASONS)
    assert logged == [{"event": "TLS handshake refused", "log_level": "warning", "reason": reason, "cause": cause}]


def test_other_lines_are_logged_once_by_their_place_and_without_their_text() -> None:
    """A client chooses part of some texts."""
    with capture_logs() as logged:
        for number in range(50):
            handle(f"E1129 23:58:40.690450   19305 ssl_transport_security.cc:3238] No match: {number}.secret\n", print)
        handle("I1129 23:58:40.690450   19305 chttp2_transport.cc:1] nothing to do\n", print)
        handle("Segmentation secret\n", print)
    assert [line["where"] for line in logged] == ["ssl_transport_security.cc:3238", ""]
    assert "secret" not in str(logged)
