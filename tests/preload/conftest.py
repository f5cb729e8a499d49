from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import resumed
from support.server import running_server
from support.tls import CA

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """Run a store."""
    with running_server() as server:
        yield server.target


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Write a certificate for two names, and its key."""
    path = tmp_path / "certificate.pem"
    path.write_bytes(CA.issue_cert("localhost", "other.example").private_key_and_cert_chain_pem.bytes())
    return path


@pytest.fixture
def keyring(tmp_path: Path) -> Path:
    """Write a keyring."""
    path = tmp_path / "fleet.keys"
    path.touch(0o600)
    path.write_text(resumed.Keyring.generate() + "\n")
    return path
