"""How long a certificate is valid, as a step tells it."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING

from resumed_server.cli.diagnose.checks import Concern, Failure

if TYPE_CHECKING:
    from cryptography import x509

SOON_DAYS = 7
"""A certificate that ends sooner is a concern."""


def validity(certificate: x509.Certificate) -> str:
    """Say how long a certificate is valid.

    Raises:
        Failure: It is not, now.
        Concern: It soon is not.
    """
    now, end = datetime.now(timezone.utc), certificate.not_valid_after_utc
    if certificate.not_valid_before_utc > now:
        raise Failure(
            f"a certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC only",
            "set this machine's clock right, or wait",
        )
    if end <= now:
        raise Failure(
            f"a certificate expired at {end:%Y-%m-%d %H:%M} UTC", "renew it; or set this machine's clock right"
        )
    left = f"valid for {(end - now).days} days"
    if (end - now).days < SOON_DAYS:
        raise Concern(left, "renew the certificate")
    return left
