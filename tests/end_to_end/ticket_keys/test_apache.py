"""Why the agent writes no file for Apache httpd: the evidence, with the Apache that is installed."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import subprocess
from pathlib import Path

import pytest

from preload.servers import serving
from support.ticket_servers import PROGRAMS
from support.tls import CA

_MAC_BYTES = 32


@pytest.mark.skipif(not Path(PROGRAMS["apache"]).exists(), reason="Apache is not installed")
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_apache_authenticates_tickets_with_zeros_instead_of_the_key_of_its_file(version: str, tmp_path: Path) -> None:
    """If this fails with a later Apache, docs/ticket-keys.md and the refusal of --apache can be reconsidered."""
    certificate, file, session = (tmp_path / name for name in ("localhost.pem", "keys", "session.pem"))
    certificate.write_bytes(CA.issue_cert("localhost").private_key_and_cert_chain_pem.bytes())
    key = os.urandom(48)  # name, HMAC, AES
    file.write_bytes(key)
    with serving("apache", certificate, more=f"SSLSessionTicketKeyFile {file}") as server:
        address = f"127.0.0.1:{server.port}"
        command = ["openssl", "s_client", version, "-connect", address, "-sess_out", str(session), "-ign_eof"]
        subprocess.run(command, input=b"GET / HTTP/1.0\r\n\r\n", capture_output=True, check=True)
    ticket = _ticket_with_name(session, key[:16])
    body, mac = ticket[:-_MAC_BYTES], ticket[-_MAC_BYTES:]
    assert hmac.digest(bytes(16), body, hashlib.sha256) == mac
    assert hmac.digest(key[16:32], body, hashlib.sha256) != mac


def _ticket_with_name(session: Path, name: bytes) -> bytes:
    """Return the ticket in a session file: an OCTET STRING that begins with the name of its key."""
    lines = [line for line in session.read_text().splitlines() if not line.startswith("-")]
    encoded = base64.b64decode("".join(lines))
    start = encoded.index(name)
    assert start > 0, "the ticket does not begin with the name of the key in the file"
    size = int.from_bytes(encoded[start - 2 : start], "big") if encoded[start - 3] == 0x82 else encoded[start - 1]
    return encoded[start : start + size]
