"""The check of a certificate's validity."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING

from resumed_server.cli.diagnose.checks import CheckWarning
from resumed_server.cli.diagnosis import Failure

if TYPE_CHECKING:
    from cryptography import x509

SOON_DAYS = 7
"""A certificate that expires within this time causes a warning."""


def validity(certificate: x509.Certificate) -> str:
    """Return a note on the remaining validity of a certificate.

    Raises:
        Failure: It is not valid now.
        CheckWarning: It expires within SOON_DAYS.
    """
    now, end = datetime.now(timezone.utc), certificate.not_valid_after_utc
    if certificate.not_valid_before_utc > now:
        raise Failure(
            f"a certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC only",
            "correct this machine's clock, or wait",
        )
    if end <= now:
        raise Failure(f"a certificate expired at {end:%Y-%m-%d %H:%M} UTC", "renew it; or correct this machine's clock")
    left = f"valid for {(end - now).days} days"
    if (end - now).days < SOON_DAYS:
        raise CheckWarning(left, "renew the certificate")
    return left
