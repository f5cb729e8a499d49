"""Debian's TLS servers, unmodified, with libresumed under them or without.

As a program it is one such server for tests/conformance: `servers.py nginx --certificate FILE --target HOST:PORT
--namespace NAME --keyring FILE` prints its port of 127.0.0.1, and serves until SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))

import trustme

from support.ports import free_port
from support.processes import listening_process
from support.tls import CA

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / ".build" / "cargo" / "release" / "libresumed_preload.so"

_NGINX = """\
daemon off;
master_process {master};
user root;
worker_processes {workers};
pid {directory}/pid;
error_log {log} info;
events {{ worker_connections 512; }}
http {{
  access_log off;
  keepalive_timeout 60s;
  client_body_temp_path {directory}/body;
  server {{
    listen 127.0.0.1:{port} ssl;
    server_name localhost;
    ssl_certificate {certificate};
    ssl_certificate_key {certificate};
    ssl_protocols TLSv1.2 TLSv1.3;
    {more}
    return 200 "ok";
  }}
  {beside}
}}
"""
_APACHE = """\
ServerRoot {directory}
ServerName localhost
PidFile {directory}/pid
ErrorLog {directory}/error.log
Mutex file:{directory}
DocumentRoot {directory}
Listen 127.0.0.1:{port}
StartServers {workers}
ServerLimit {workers}
ThreadsPerChild 25
MinSpareThreads {spare}
MaxSpareThreads {threads}
MaxRequestWorkers {threads}
KeepAlive On
KeepAliveTimeout 60
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule socache_shmcb_module /usr/lib/apache2/modules/mod_socache_shmcb.so
LoadModule ssl_module /usr/lib/apache2/modules/mod_ssl.so
SSLEngine on
SSLProtocol -all +TLSv1.2 +TLSv1.3
SSLCertificateFile {certificate}
SSLCertificateKeyFile {certificate}
{more}
<IfDefine !NoCache>
SSLSessionCache shmcb:{directory}/cache(512000)
</IfDefine>
{beside}
"""
_HAPROXY = """\
global
  nbthread {workers}
  tune.ssl.default-dh-param 2048
defaults
  mode http
  timeout client 60s
  timeout server 60s
  timeout connect 5s
frontend tls
  bind 127.0.0.1:{port} ssl crt {certificate} ssl-min-ver TLSv1.2 {more}
  http-request return status 200 content-type text/plain string ok
"""
_STUNNEL = """\
foreground = yes
pid =
debug = notice
[tls]
accept = 127.0.0.1:{port}
cert = {certificate}
key = {certificate}
sslVersionMin = TLSv1.2
exec = /bin/cat
execArgs = cat
{more}
"""
SERVERS = {
    "nginx": ("/usr/sbin/nginx", _NGINX, ["-p", "{directory}", "-e", "{log}", "-c", "{config}"]),
    "apache": ("/usr/sbin/apache2", _APACHE, ["-DFOREGROUND", "-f", "{config}"]),
    "haproxy": ("/usr/sbin/haproxy", _HAPROXY, ["-W", "-db", "-f", "{config}"]),
    "stunnel": ("/usr/bin/stunnel4", _STUNNEL, ["{config}"]),
}


_CLIENT_CERTIFICATES = {
    "nginx": "ssl_client_certificate {0}; ssl_verify_client on;",
    "apache": "SSLCACertificateFile {0}\nSSLVerifyClient require",
    "haproxy": "ca-file {0} verify required",
}
"""Settings that require a client certificate of the authorities in a file."""


def settings(target: str, namespace: str, keyring: Path, **more: str) -> dict[str, str]:
    """Return the environment that puts libresumed under a server."""
    named = {"target": target, "namespace": namespace, "keyring": str(keyring), **more}
    return {"LD_PRELOAD": str(LIBRARY), **{f"RESUMED_{name.upper()}": value for name, value in named.items()}}


def context_files(directory: Path, *, seconds: float) -> dict[str, Path]:
    """Write the certificates that contexts.c needs, by its options; one of a client is valid for so many seconds."""
    soon = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=seconds)
    issued = {
        "certificate": CA.issue_cert("localhost"),
        "other": CA.issue_cert("localhost", "other.example"),
        "client": CA.issue_cert("client@example.org"),
        "short": CA.issue_cert("client@example.org", not_after=soon),
        "stranger": trustme.CA().issue_cert("client@example.org"),
    }
    paths = {name: directory / f"{name}.pem" for name in (*issued, "ca")}
    for name, certificate in issued.items():
        paths[name].write_bytes(certificate.private_key_and_cert_chain_pem.bytes())
    CA.cert_pem.write_to_path(str(paths["ca"]))
    return paths


class Server:
    """A server that listens on `port`, in a process of its own that may fork workers."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, directory: Path) -> None:
        self.process, self.port, self._directory = process, port, directory

    def log(self) -> str:
        """Return the output of the server and its workers."""
        return "".join(
            path.read_text(errors="replace")
            for path in (self._directory / "stderr", self._directory / "error.log")
            if path.exists()
        )


@contextlib.contextmanager
def serving(
    name: str,
    certificate: Path,
    environment: Mapping[str, str] | None = None,
    *,
    workers: int = 2,
    more: str = "",
    beside: str = "",
    under: Sequence[str] = (),
    log: str = "",
) -> Iterator[Server]:
    """Run one of SERVERS.

    Args:
        name: Which.
        certificate: File with the certificate and its key.
        environment: What settings() returned.
        workers: Number of processes or threads; with 0 nginx serves in its only process.
        more: For the configuration of the virtual host.
        beside: For the configuration behind it (nginx, Apache).
        under: A command that runs the server's, with its arguments: valgrind.
        log: The error log (nginx), instead of one that log() returns.
    """
    program, template, arguments = SERVERS[name]
    directory = Path(tempfile.mkdtemp(prefix=f"resumed-{name}-"))
    directory.chmod(0o755)
    port = free_port()
    config, log = directory / "config", log or f"{directory}/error.log"
    config.write_text(
        template.format(
            directory=directory, port=port, certificate=certificate, workers=workers or 1, threads=25 * workers,
            spare=25 * workers, more=more, beside=beside, master="on" if workers else "off",
            log=log,
        )
    )  # fmt: skip
    filled = [argument.format(directory=directory, config=config, log=log) for argument in arguments]
    with (directory / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [*under, program, *filled],
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            env={**os.environ, **(environment or {})},
        )
    server = Server(process, port, directory)
    try:
        with listening_process(process, port, server.log):
            yield server
    finally:
        shutil.rmtree(directory)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", choices=SERVERS)
    parser.add_argument("--certificate", type=Path, required=True)
    parser.add_argument("--client-ca", type=Path)
    parser.add_argument("--target", required=True)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--keyring", type=Path, required=True)
    parser.add_argument("--deadline", default="0.05")
    parser.add_argument("--mirror", default="0")
    parser.add_argument("--single-use", action="store_const", const="1", default="0")
    parser.add_argument("--any-id", action="store_const", const="any", default="sealed")
    arguments = parser.parse_args()
    environment = settings(
        arguments.target,
        arguments.namespace,
        arguments.keyring,
        deadline=arguments.deadline,
        mirror=arguments.mirror,
        single_use=arguments.single_use,
        ids=arguments.any_id,
        ignore_id_context="1",
        **({"verified_namespace": f"{arguments.namespace}.verified"} if arguments.client_ca else {}),
    )
    more = _CLIENT_CERTIFICATES[arguments.server].format(arguments.client_ca) if arguments.client_ca else ""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with serving(arguments.server, arguments.certificate, environment, workers=1, more=more) as server:
        print(server.port, flush=True)  # noqa: T201
        stop.wait()


if __name__ == "__main__":
    main()
