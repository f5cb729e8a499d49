from __future__ import annotations

import os
import ssl
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from preload.servers import serving, settings
from preload.test_preload import INSTALLED, REQUEST, warm_up
from resumed_server.cli.tls_client import Client, Endpoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif("RESUMED_PRELOAD" not in os.environ, reason="needs Rust: make preload-test")


def test_unlike_servers_choose_the_same_cipher_for_a_client(target: str, certificate: Path, keyring: Path) -> None:
    """By default HAProxy takes the order of the server; nginx and Apache that of the client, AES-128 in browsers."""
    environment = settings(target, "order", keyring, deadline="5", mirror="0", ignore_id_context="1")
    client = Client("localhost", "1.3", REQUEST, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384")
    with ExitStack() as stack:
        names = [name for name in ("nginx", "haproxy", "apache") if name in INSTALLED]
        ports = [stack.enter_context(serving(name, certificate, environment, workers=1)).port for name in names]
        warm_up(ports, ssl.TLSVersion.TLSv1_3)
        endpoints = [Endpoint.resolve("127.0.0.1", port) for port in ports]
        session = client.visit(endpoints[-1]).session
        for _ in range(3):
            for endpoint in endpoints:
                visit = client.visit(endpoint, session)
                assert visit.resumed
                session = visit.session
