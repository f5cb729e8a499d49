"""Programs that libresumed-preload must leave as they are: ProFTPD, OpenSSL 1.1, and a libssl that is loaded later."""

from __future__ import annotations

import contextlib
import ftplib
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

import resumed
from preload.servers import ROOT, settings
from support.ports import free_port
from support.processes import listening_process
from support.tls import CA

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

pytestmark = pytest.mark.skipif("RESUMED_PRELOAD" not in os.environ, reason="needs Rust: make preload-test")

PATIENCE = 30.0
OPENSSL_1_1 = ROOT / ".build" / "openssl-1.1" / "bin" / "python"
"""With psycopg2-binary 2.9.10, which brings a libssl of OpenSSL 1.1."""

PROFTPD = """\
LoadModule mod_tls.c
ServerType standalone
ServerName test
Port {port}
DefaultAddress 127.0.0.1
UseIPv6 off
User nobody
Group nogroup
PidFile {directory}/pid
ScoreboardFile {directory}/scoreboard
DelayTable none
SystemLog {directory}/log
WtmpLog off
AuthUserFile {directory}/users
AuthOrder mod_auth_file.c
RequireValidShell off
TLSEngine on
TLSRequired on
TLSProtocol TLSv1.2 TLSv1.3
TLSRSACertificateFile {directory}/certificate.pem
TLSRSACertificateKeyFile {directory}/certificate.pem
TLSECCertificateFile {directory}/certificate.pem
TLSECCertificateKeyFile {directory}/certificate.pem
TLSLog {directory}/tls.log
"""

CONNECTS = """
import sys, psycopg2
assert b"libssl" in open("/proc/self/maps", "rb").read()
for _ in range(3):
    try:
        psycopg2.connect(host="127.0.0.1", port=int(sys.argv[1]), user="a", dbname="a", password="b", sslmode="require")
    except psycopg2.OperationalError as error:
        assert "no such database" in str(error), error
"""

LOADS = r"""
#include <dlfcn.h>
#include <stdio.h>

int main(void)
{
    void *library = dlopen("libssl.so.3", RTLD_NOW | RTLD_LOCAL);
    void *(*method)(void) = (void *(*)(void))dlsym(library, "TLS_server_method");
    void *(*new)(void *) = (void *(*)(void *))dlsym(library, "SSL_CTX_new");
    void *(*connection)(void *) = (void *(*)(void *))dlsym(library, "SSL_new");
    int (*handshake)(void *) = (int (*)(void *))dlsym(library, "SSL_accept");
    void (*release)(void *) = (void (*)(void *))dlsym(library, "SSL_free");
    void *context = new(method()), *ssl = connection(context);
    int done = handshake(ssl);

    release(ssl);
    dlclose(library);
    return printf("%d\n", done) < 0;
}
"""


@pytest.fixture
def environment(target: str, tmp_path: Path) -> Mapping[str, str]:
    """Put the library under a program."""
    keyring = tmp_path / "fleet.keys"
    keyring.touch(0o600)
    keyring.write_text(resumed.Keyring.generate() + "\n", encoding="ascii")
    return {**os.environ, **settings(target, "programs", keyring, deadline="5")}


class Client(ftplib.FTP_TLS):
    """Resumes the control connection's session on data connections, which ProFTPD requires."""

    def ntransfercmd(self, cmd: str, rest: int | str | None = None) -> tuple[socket.socket, int | None]:
        """Begin a transfer."""
        connection, size = ftplib.FTP.ntransfercmd(self, cmd, rest)
        assert isinstance(self.sock, ssl.SSLSocket)
        return self.context.wrap_socket(connection, server_hostname=self.host, session=self.sock.session), size


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("proftpd"), reason="needs root, and Debian's proftpd")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_proftpd_lists_directories(environment: Mapping[str, str], tmp_path: Path, version: ssl.TLSVersion) -> None:
    """ProFTPD changes its user, which would fail with an additional thread."""
    directory = tmp_path / "ftp"
    directory.mkdir()
    directory.chmod(0o755)
    for parent in list(tmp_path.parents)[:2]:
        parent.chmod(0o755)
    tmp_path.chmod(0o755)
    (directory / "certificate.pem").write_bytes(CA.issue_cert("localhost").private_key_and_cert_chain_pem.bytes())
    (directory / "certificate.pem").chmod(0o600)
    hashed = subprocess.check_output(["openssl", "passwd", "-6", "secret"], text=True).strip()
    (directory / "users").write_text(f"user:{hashed}:65534:65534::{directory}:/bin/sh\n", encoding="ascii")
    (directory / "users").chmod(0o600)
    port = free_port()
    (directory / "config").write_text(PROFTPD.format(directory=directory, port=port), encoding="ascii")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    server = subprocess.Popen(["proftpd", "-n", "-q", "-c", directory / "config"], env=environment)
    with listening_process(server, port):
        for _ in range(5):
            with Client(context=context, timeout=PATIENCE) as client:
                client.connect("127.0.0.1", port)
                client.login("user", "secret")
                client.prot_p()
                lines: list[str] = []
                client.retrlines("LIST", lines.append)
                assert any("certificate.pem" in line for line in lines)
                client.quit()


@contextlib.contextmanager
def database(certificate: Path) -> Iterator[int]:
    """Answer clients of PostgreSQL over TLS: there is no such database."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    answer = b"SFATAL\0C3D000\0Mno such database\0\0"

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connection.recv(8)  # SSLRequest
                connection.sendall(b"S")
                with context.wrap_socket(connection, server_side=True) as tls:
                    tls.recv(4096)
                    tls.sendall(b"E" + struct.pack(">I", len(answer) + 4) + answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]


@pytest.mark.skipif(not OPENSSL_1_1.exists(), reason="needs psycopg2-binary: make preload-test")
def test_a_program_with_openssl_1_1_keeps_it(environment: Mapping[str, str], tmp_path: Path) -> None:
    """The preloaded functions have the symbol version of OpenSSL 3."""
    certificate = tmp_path / "certificate.pem"
    certificate.write_bytes(CA.issue_cert("localhost").private_key_and_cert_chain_pem.bytes())
    with database(certificate) as port:
        subprocess.run(
            [OPENSSL_1_1, "-c", CONNECTS, str(port)], check=True, env=environment, timeout=PATIENCE, cwd=tmp_path
        )


def test_a_libssl_that_is_loaded_later_works(environment: Mapping[str, str], tmp_path: Path) -> None:
    """The program loads it with RTLD_LOCAL, and finds its functions by dlsym()."""
    source, program = tmp_path / "loads.c", tmp_path / "loads"
    source.write_text(LOADS, encoding="ascii")
    subprocess.run(["cc", source, "-o", program, "-ldl"], check=True)
    assert subprocess.check_output([program], env=environment, text=True) == "-1\n"
    # CPython loads its own modules so.
    loaded = "import ssl; ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); print(ssl.OPENSSL_VERSION)"
    subprocess.run([sys.executable, "-c", loaded], check=True, env=environment, stdout=subprocess.DEVNULL)


def test_a_connection_is_checked_with_all_settings_of_the_program(
    environment: Mapping[str, str], tmp_path: Path
) -> None:
    """preloaded.c sets info callbacks during the handshake, and id contexts on each connection."""
    paths = [tmp_path / name for name in ("one.pem", "other.pem")]
    for path, names in zip(paths, (("localhost",), ("localhost", "other.example")), strict=True):
        path.write_bytes(CA.issue_cert(*names).private_key_and_cert_chain_pem.bytes())
    source, program = ROOT / "client" / "c" / "tests" / "preloaded.c", tmp_path / "preloaded"
    subprocess.run(["cc", "-Wall", "-Wextra", "-Werror", source, "-o", program, "-lssl", "-lcrypto"], check=True)
    once = {**environment, "RESUMED_SINGLE_USE": "1", "RESUMED_PUTS": "wait"}
    done = subprocess.run([program, *paths], env=once, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "hits: store 4; misses: context-mismatch 2;" in done.stderr, done.stderr


@pytest.mark.parametrize("callbacks", ["observer", "cache"])
def test_callbacks_that_observe_sessions_are_called_and_those_of_a_cache_replaced(
    environment: Mapping[str, str], tmp_path: Path, callbacks: str
) -> None:
    """observed.c: servers with a get callback have a cache in which a session would outlive its removal."""
    certificate, program = tmp_path / "certificate.pem", tmp_path / "observed"
    certificate.write_bytes(CA.issue_cert("localhost").private_key_and_cert_chain_pem.bytes())
    source = ROOT / "client" / "c" / "tests" / "observed.c"
    subprocess.run(["cc", "-Wall", "-Wextra", "-Werror", source, "-o", program, "-lssl", "-lcrypto"], check=True)
    command = [str(program), str(certificate), callbacks]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the server's own session cache is not used") == (callbacks == "cache"), done.stderr


def test_a_program_that_keeps_openssls_objects_in_shared_memory_is_left_alone(
    environment: Mapping[str, str], tmp_path: Path
) -> None:
    """shared_memory.c: in another process, a pointer of the library's leads nowhere."""
    certificate, program = tmp_path / "certificate.pem", tmp_path / "shared_memory"
    certificate.write_bytes(CA.issue_cert("localhost").private_key_and_cert_chain_pem.bytes())
    source = ROOT / "client" / "c" / "tests" / "shared_memory.c"
    subprocess.run(["cc", "-Wall", "-Wextra", "-Werror", source, "-o", program, "-lssl", "-lcrypto"], check=True)
    command = [str(program), str(certificate)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("in memory that its processes share") == 1, done.stderr
