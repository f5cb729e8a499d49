"""Starts client/java/examples/Server.java for behaviour.toml: Netty reads keys in PKCS #8 only."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

BUILD = Path(__file__).parents[2] / ".build" / "java"
JAVA = ["java", "-XX:TieredStopAtLevel=1", "-Xmx64m"]


def main() -> None:
    """Become the server."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option in "--certificate", "--target", "--namespace", "--keyring":
        parser.add_argument(option, required=True)
    arguments = parser.parse_args()
    key = load_pem_private_key(Path(arguments.certificate).read_bytes(), None)
    descriptor, path = tempfile.mkstemp(dir=Path(arguments.certificate).parent)
    os.write(descriptor, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    os.close(descriptor)
    classpath = f"{BUILD}/classes:{BUILD}/examples:{(BUILD / 'classpath').read_text(encoding='utf-8')}"
    options = ["--chain", arguments.certificate, "--key", path, "--target", arguments.target]
    options += ["--namespace", arguments.namespace, "--keyring", arguments.keyring]
    os.execvp(JAVA[0], [*JAVA, "-cp", classpath, "Server", *options])


if __name__ == "__main__":
    main()
