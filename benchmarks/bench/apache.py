"""Debian's Apache as a TLS frontend, with a session cache of the caller's choice."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from typing import TYPE_CHECKING

from resumed_server.cli.tls_client import Endpoint
from support.ports import free_port
from support.processes import listening_process

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

APACHE, MEMCACHED = "/usr/sbin/apache2", "memcached"
_CONFIG = """\
ServerRoot {directory}
ServerName localhost
PidFile {directory}/pid
ErrorLog {directory}/error.log
Mutex file:{directory}
DocumentRoot {directory}
Listen 127.0.0.1:{port}
StartServers 1
ServerLimit 1
ThreadsPerChild 25
MaxRequestWorkers 25
KeepAlive Off
{modules}
SSLEngine on
SSLProtocol -all +TLSv{version}
SSLSessionTickets off
SSLSessionCache {cache}
SSLSessionCacheTimeout 7200
SSLCertificateFile {certificate}
SSLCertificateKeyFile {certificate}
"""
_MODULES = ("mpm_event", "authz_core", "ssl", "socache_shmcb", "socache_memcache", "socache_redis")


@contextlib.contextmanager
def run_apache(directory: Path, certificate: Path, version: str, cache: str) -> Iterator[Endpoint]:
    """Run an Apache that speaks one version of TLS, without tickets.

    Args:
        directory: A directory for this Apache alone; "{directory}" in `cache` stands for it.
        certificate: File with the certificate and its key.
        version: "1.2" or "1.3".
        cache: A value of SSLSessionCache, such as "none" or "memcache:127.0.0.1:11211".
    """
    directory.mkdir()
    port = free_port()
    modules = "\n".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in _MODULES)
    config = directory / "apache.conf"
    config.write_text(
        _CONFIG.format(
            directory=directory,
            port=port,
            modules=modules,
            version=version,
            cache=cache.format(directory=directory),
            certificate=certificate,
        )
    )
    with _run([APACHE, "-f", str(config), "-DFOREGROUND"], port):
        yield Endpoint.resolve("127.0.0.1", port)


@contextlib.contextmanager
def run_memcached() -> Iterator[str]:
    """Run a memcached and yield its host:port."""
    port = free_port()
    with _run([MEMCACHED, "-u", "nobody", "-l", "127.0.0.1", "-p", str(port), "-U", "0"], port):
        yield f"127.0.0.1:{port}"


def list_missing() -> list[str]:
    """Return those of the programs that are not installed."""
    return [program for program in (APACHE, MEMCACHED, "redis-server") if not shutil.which(program)]


def _run(command: list[str], port: int) -> contextlib.AbstractContextManager[None]:
    return listening_process(subprocess.Popen(command, stdin=subprocess.DEVNULL), port)
