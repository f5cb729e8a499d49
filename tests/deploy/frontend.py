"""The demo frontend with mutual TLS to the store: `--tls DIRECTORY` in front of its own options."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import resumed
from resumed_server import demo_frontend


class Frontend(demo_frontend.Frontend):
    """A frontend that shows the store a certificate."""

    tls: str

    def __init__(self, name: str, stack: str, certificate: str, tickets: int | None, store: dict[str, Any]) -> None:
        files = {"ca": "ca.crt", "cert": "tls.crt", "key": "tls.key"}
        credentials = resumed.Credentials(**{kind: f"{self.tls}/{file}" for kind, file in files.items()})
        super().__init__(name, stack, certificate, tickets, store | {"credentials": credentials})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tls", required=True, metavar="DIRECTORY")
    options, sys.argv[1:] = parser.parse_known_args()
    Frontend.tls = options.tls
    demo_frontend.Frontend = Frontend  # type: ignore[assignment,misc]
    demo_frontend.main()
