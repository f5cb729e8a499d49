"""What libresumed-preload does in a process beside sessions: where it logs, and when it has a thread."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import resumed
from preload.servers import serving, settings
from preload.test_preload import visit
from support.metrics import scraped_until
from support.ports import free_port
from support.server import running_server
from support.tls import VERSIONS, client_context
from support.waiting import until

pytestmark = pytest.mark.skipif("RESUMED_PRELOAD" not in os.environ, reason="needs Rust: make preload-test")

ACCEPTS = """
import ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])
incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
connection = context.wrap_bio(incoming, outgoing, server_side=True)
try:
    connection.do_handshake()
except ssl.SSLWantReadError:
    pass
"""

MEETS = """
import os, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])
{change}
there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
sides = trusting.wrap_bio(back, there), context.wrap_bio(there, back, server_side=True)
for side in sides * 3:
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        pass
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.parametrize("own", [False, True], ids=["RESUMED_LOG", "error log"])
def test_a_full_disk_ends_no_worker(target: str, certificate: Path, keyring: Path, own: bool) -> None:
    """The library would log the rotation of the keyring."""
    environment = settings(target, "full", keyring, deadline="5", **({} if own else {"log": "/dev/full"}))
    context = client_context(VERSIONS[1])
    with serving("nginx", certificate, environment, workers=1, log="/dev/full" if own else "") as server:
        workers = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        before = workers.read_text(encoding="ascii")
        _, session = visit(context, server.port, None)
        keyring.write_text(resumed.Keyring.generate() + "\n" + keyring.read_text())
        for _ in range(4):
            reused, session = visit(context, server.port, session)
            assert reused
        assert workers.read_text(encoding="ascii") == before


def test_a_socket_gets_no_log_line(certificate: Path, keyring: Path) -> None:
    """Under inetd, standard error is the connection of the client."""
    environment = {**os.environ, **settings("127.0.0.1:1", "Not a namespace", keyring)}
    command = [sys.executable, "-c", ACCEPTS, str(certificate)]
    said = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stderr
    assert "namespace must be 1 to 63 characters" in said
    ours, theirs = socket.socketpair()
    with ours, theirs:
        subprocess.run(command, check=True, env=environment, stderr=theirs.fileno())
        theirs.shutdown(socket.SHUT_WR)
        assert ours.recv(4096) == b""


def test_a_line_of_the_log_is_one_write(certificate: Path, keyring: Path) -> None:
    """The workers of a server share its log: a line that is written in pieces mixes with theirs."""
    reader, writer = os.pipe2(os.O_DIRECT)  # each read returns one write
    environment = {**os.environ, **settings("127.0.0.1:1", "Not a namespace", keyring)}
    subprocess.run([sys.executable, "-c", ACCEPTS, str(certificate)], check=True, env=environment, stderr=writer)
    os.close(writer)
    written = os.read(reader, 4096)
    os.close(reader)
    assert b"namespace must be 1 to 63 characters" in written
    assert written.endswith(b"\n")


def test_a_log_file_gets_the_lines_instead(certificate: Path, keyring: Path, tmp_path: Path) -> None:
    log = tmp_path / "resumed.log"
    log.write_text("before\n", encoding="ascii")
    environment = {**os.environ, **settings("127.0.0.1:1", "Not a namespace", keyring, log=str(log))}
    command = [sys.executable, "-c", ACCEPTS, str(certificate)]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    lines = log.read_text(encoding="ascii").splitlines()
    assert lines[0] == "before"
    assert "namespace must be 1 to 63 characters" in lines[1]


@pytest.mark.parametrize("opened", ["a", "w"])
def test_a_file_that_standard_error_has_become_is_written_only_for_appending(
    certificate: Path, keyring: Path, tmp_path: Path, opened: str
) -> None:
    """A daemon that closed standard error reuses its descriptor for the next file, for example a database."""
    late = tmp_path / "late"
    reopen = f"import os; late = open({str(late)!r}, {opened!r}); os.dup2(late.fileno(), 2)\n"
    environment = {**os.environ, **settings("127.0.0.1:1", "Not a namespace", keyring)}
    subprocess.run([sys.executable, "-c", reopen + ACCEPTS, str(certificate)], check=True, env=environment)
    assert ("namespace must be" in late.read_text(encoding="ascii")) == (opened == "a")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
@pytest.mark.parametrize("mixed", [False, True])
def test_a_process_of_mixed_privileges_gets_no_thread(
    target: str, certificate: Path, keyring: Path, tmp_path: Path, mixed: bool
) -> None:
    """ProFTPD changes its user repeatedly, and glibc aborts a process if one of its threads cannot follow."""
    log = tmp_path / "resumed.log"
    change = "import os; os.setresuid(0, 65534, 0)\n" if mixed else ""
    environment = {**os.environ, **settings(target, "mixed", keyring, log=str(log))}
    command = [sys.executable, "-c", MEETS.format(change=change), str(certificate)]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    threads, said = int(done.stdout), log.read_text(encoding="ascii")
    assert ("left alone: it changes between users" in said, threads > 1) == (mixed, not mixed)


@pytest.mark.skipif(not shutil.which("socat"), reason="needs socat: make preload-test")
def test_a_process_for_one_connection_opens_no_mirror(certificate: Path, keyring: Path) -> None:
    """A mirror that lives as long as one connection costs a Watch stream, and resumes nothing."""
    port, context, session = free_port(), client_context(VERSIONS[1]), None
    listen = f"OPENSSL-LISTEN:{port},bind=127.0.0.1,fork,cert={certificate},verify=0"
    with running_server("--metrics-listen", "127.0.0.1:0") as store:
        calls = settings(store.target, "forks", keyring, deadline="5", puts="wait")
        with subprocess.Popen(["socat", listen, "EXEC:cat"], env={**os.environ, **calls}) as server:
            try:
                until(lambda: listens(port))
                for number in range(5):
                    resumed_it, session = visit(context, port, session)
                    assert resumed_it == (number > 0)
                children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
                until(lambda: not children.read_text(encoding="ascii"))  # a Watch counts at its end
            finally:
                server.terminate()
        found = scraped_until(store, lambda found: found.total("resumed_calls_total", method="Get", code="OK") == 4)
    assert found.total("resumed_calls_total", method="Watch") == 0


def listens(port: int) -> bool:
    """Return whether a server accepts connections."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
