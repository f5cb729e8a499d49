"""Servers and frontends for the commands of the docs, started when the first command needs them."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from functools import cached_property
from pathlib import Path

from docs.markdown import blocks
from support.frontend import running_frontend
from support.mtls import Authority
from support.redis import valkey_server
from support.server import RunningServer, running_server, start_server
from support.tls import CA, CERTIFICATE, PATIENCE

_TLS = {"tls-cert": "store.crt", "tls-key": "store.key", "client-ca": "store-ca.crt", "grants": "grants.toml"}


class Stage:
    """Everything runs on this machine, and is ended and deleted by `close`.

    Attributes:
        directory: The directory that every page's own is a copy of: keyring, certificates, grants.
    """

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        # Not pytest's: the path of a unix socket must be short.
        self._root = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="docs-")))
        self.directory = self._root / "files"
        self.directory.mkdir()
        self._authority = Authority()
        self._write()
        self._environment = {
            "HOME": str(self._root),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "COLUMNS": "200",
        }

    def close(self) -> None:
        """End all that was started."""
        self._held.close()

    def run(self, command: str, directory: Path, *, may_fail: bool = False) -> str:
        """Run a command with values for the docs' placeholders, and return its output.

        It must succeed unless it `may_fail`; a server need only become ready.
        """
        if re.match(r"resumed serve(?!.* --(check|help)\b)", command):
            return self._serve(self._put_in(command, self._serving, directory), directory)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self._put_in(command, self._there, directory)],
            cwd=directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=12 * PATIENCE,
            check=False,
        )
        assert may_fail or done.returncode == 0, f"{command}\nexit status {done.returncode}\n{done.stdout}"
        return done.stdout

    @property
    def _there(self) -> dict[str, str]:
        """What stands for what, where commands are clients; names of properties of this class begin with a dot."""
        return {
            "dns:///store:7400": ".store",
            "store.example:7400": ".tls_store",
            "127.0.0.1:7400": ".store",
            r"\bSTORE\b": ".store",
            r"\bTARGET\b": ".store",
            r"\bNAMESPACE\b": "shop",
            r"\bFRONTEND-A\b|\b(shop-)?a\.example:443": ".frontend_a",
            r"\bFRONTEND-B\b|\b(shop-)?b\.example:443": ".frontend_b",
            "127.0.0.1:9464": ".store_metrics",
            "frontend-1:9465": ".frontend_metrics",
        }

    @property
    def _serving(self) -> dict[str, str]:
        """What stands for what, where commands serve: free ports, and a directory that goes."""
        return {
            r"(127\.0\.0\.1|0\.0\.0\.0):\d+": "127.0.0.1:0",
            "/run/resumed/|/run/resumed(?=.sock)": "{directory}/",
            "lmdb:///[a-z/]+": "lmdb://{directory}/store",
            r"redis://store:6379|redis://…|redis://redis:6379|redis://valkey:6379": ".redis",
        }

    def _put_in(self, command: str, stand_ins: dict[str, str], directory: Path) -> str:
        command = re.sub(r" (\.\.\.|…)$", "", command)  # and so on
        for pattern, found in stand_ins.items():
            if re.search(pattern, command):
                text = getattr(self, found[1:]) if found.startswith(".") else found.format(directory=directory)
                command = re.sub(pattern, text, command)
        return command

    def _serve(self, command: str, directory: Path) -> str:
        listen = () if "--listen" in command else ("--listen", "127.0.0.1:0")
        options = (*shlex.split(command)[2:], *listen, "--workers", "1", "--shutdown-delay", "0s")
        server = start_server(*options, env=self._environment, cwd=directory)
        try:
            server.wait_for_log("ready")
        finally:
            server.stop()
        return ""

    @cached_property
    def _store(self) -> RunningServer:
        return self._held.enter_context(running_server("--metrics-listen", "127.0.0.1:0"))

    @property
    def store(self) -> str:
        """Where a store is."""
        return self._store.target

    @cached_property
    def store_metrics(self) -> str:
        """Where that store's metrics are."""
        address: str = self._store.log_lines("listening")[0]["metrics"][0]
        return address

    @cached_property
    def tls_store(self) -> str:
        """Where a store with mutual TLS and grants is."""
        options = (f"--{name}={self.directory / file}" for name, file in _TLS.items())
        server = self._held.enter_context(running_server(*options))
        return server.target.replace("127.0.0.1", "localhost")

    @cached_property
    def redis(self) -> str:
        """The URL of a Valkey."""
        return self._held.enter_context(valkey_server()).url

    @cached_property
    def _frontends(self) -> list[dict[str, int]]:
        keyring = str(self.directory / "fleet.keys")
        options = ("--target", self.store, "--namespace", "shop", "--keyring", keyring, "--deadline", str(PATIENCE))
        return [self._held.enter_context(running_frontend(self.directory, *options)) for _ in range(2)]

    @property
    def frontend_a(self) -> str:
        """Where a frontend is."""
        return f"localhost:{self._frontends[0]['port']}"

    @property
    def frontend_b(self) -> str:
        """Where another one is, in a process of its own."""
        return f"localhost:{self._frontends[1]['port']}"

    @property
    def frontend_metrics(self) -> str:
        """Where the first one's metrics are."""
        return f"localhost:{self._frontends[0]['metrics']}"

    def _write(self) -> None:
        grants = ("\n".join(block.lines) for block in blocks(Path("docs/store.md")) if block.lines[0] == "[[grant]]")
        files = {
            "server.pem": CERTIFICATE.private_key_and_cert_chain_pem.bytes(),
            "frontends-ca.crt": CA.cert_pem.bytes(),
            "ca.crt": self._authority.pem,  # until a page makes one
            "store-ca.crt": self._authority.pem,
            "grants.toml": "\n".join(grants).encode(),
        }
        for name, identity in (("store", "dns:localhost"), ("operator", "spiffe://example.org/operator")):
            pem = self._authority.issue(identity)
            files |= {f"{name}.crt": pem.certificate, f"{name}.key": pem.key}
        for name, content in files.items():
            (self.directory / name).write_bytes(content)
        command = [sys.executable, "-m", "resumed_server", "keygen", str(self.directory / "fleet.keys")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
