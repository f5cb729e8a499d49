"""Frontends fork, exit and crash as servers do, and their sessions outlive them."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

import resumed
from support.tls import CERTIFICATE, Client, Frontend

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from support.server import RunningServer
    from support.tls import Stack

PROGRAM = """
import os, signal, socket, ssl, sys
import resumed
from OpenSSL import SSL
stack, pem, target, keyring = sys.argv[1:5]
if stack == "ssl":
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
else:
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.use_certificate_chain_file(pem)
    context.use_privatekey_file(pem)
shim = resumed.install(context, target=target, namespace="shop", keyring=keyring, deadline=5.0, ignore_id_context=True)

def serve(connection):
    if stack == "ssl":
        peer = context.wrap_socket(connection, server_side=True)
    else:
        peer = SSL.Connection(context, connection)
        peer.set_accept_state()
    peer.sendall(peer.recv(100))
    return peer

def connection():
    return socket.socket(fileno=os.dup(int(sys.argv[5])))
"""


@pytest.fixture
def keyring_file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.keys"
    path.touch(0o600)
    path.write_text(resumed.Keyring.generate())
    return path


class Program:
    """A frontend in a process of its own, which serves the sockets it inherits."""

    def __init__(self, tmp_path: Path, keyring: Path, stack: Stack, target: str) -> None:
        self.pem = tmp_path / "server.pem"
        self.pem.write_bytes(CERTIFICATE.private_key_and_cert_chain_pem.bytes())
        self.stack: Stack = stack
        self.arguments = [stack, str(self.pem), target, str(keyring)]

    def run(self, body: str, *sockets: int) -> subprocess.CompletedProcess[str]:
        """Run `body` behind PROGRAM; argv[5:] are the inherited sockets."""
        return subprocess.run(
            # Python 3.12 and later warn of a fork with threads, which is what some of these tests are about.
            [
                sys.executable,
                "-W",
                "ignore:This process:DeprecationWarning",
                "-c",
                PROGRAM + textwrap.dedent(body),
                *self.arguments,
                *map(str, sockets),
            ],
            pass_fds=sockets,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def program(tmp_path: Path, keyring_file: Path, stack: Stack, store: RunningServer) -> Program:
    """A frontend in a process of its own."""
    return Program(tmp_path, keyring_file, stack, store.target)


def visit_elsewhere(program: Program, client: Client, body: str, keyring_file: Path, store: RunningServer) -> bool:
    """Negotiate a session with `program` and return whether a frontend of this process resumes it."""
    here = Frontend(program.stack, store.target, resumed.Keyring.load(keyring_file))
    ran: list[subprocess.CompletedProcess[str]] = []

    class Elsewhere(Frontend):
        def __init__(self) -> None:
            pass

        def serve(self, connection: socket.socket) -> None:
            with connection:
                ran.append(program.run(body, connection.fileno()))

    first = client.visit(Elsewhere())
    assert ran[0].returncode in (0, -signal.SIGKILL), ran[0].stderr
    assert not ran[0].stderr, ran[0].stderr
    return client.visit(here, first.session).reused


def test_a_frontend_that_exits_leaves_its_sessions(
    program: Program, client: Client, keyring_file: Path, store: RunningServer
) -> None:
    assert visit_elsewhere(program, client, "serve(connection())", keyring_file, store)


def test_a_context_let_go_before_the_exit_leaves_its_sessions(
    program: Program, client: Client, keyring_file: Path, store: RunningServer
) -> None:
    body = """
    peer = serve(connection())
    del peer, context, shim
    import gc
    gc.collect()
    """
    assert visit_elsewhere(program, client, body, keyring_file, store)


def test_a_frontend_killed_after_its_put_leaves_its_sessions(
    program: Program, client: Client, keyring_file: Path, store: RunningServer
) -> None:
    body = "peer = serve(connection()); shim.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    assert visit_elsewhere(program, client, body, keyring_file, store)


def test_a_context_made_before_fork_works_in_the_child(
    program: Program, client: Client, keyring_file: Path, store: RunningServer
) -> None:
    """Pre-fork servers install in the parent and serve in the children."""
    body = """
    child = os.fork()
    if child == 0:
        serve(connection())
        sys.exit(0)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert visit_elsewhere(program, client, body, keyring_file, store)


def test_a_child_works_even_if_the_parent_had_used_the_store(
    program: Program, client: Client, keyring_file: Path, store: RunningServer
) -> None:
    body = """
    shim._policy._store.get(b"x", deadline=5)
    child = os.fork()
    if child == 0:
        serve(connection())
        assert shim.flush(5), shim.stats
        sys.exit(0)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert visit_elsewhere(program, client, body, keyring_file, store)


def test_the_interpreter_exits_cleanly_with_handshakes_running(program: Program) -> None:
    body = """
    import threading
    # Not in the threads: OpenSSL itself crashes where one loads certificates while the process exits.
    client = ssl.create_default_context()
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    def churn():
        session = None
        while True:
            ours, theirs = socket.socketpair()
            thread = threading.Thread(target=serve, args=(theirs,), daemon=True)
            thread.start()
            with client.wrap_socket(ours, session=session) as tls:
                tls.sendall(b"x")
                tls.recv(1)
                session = tls.session
            thread.join()
            started.set()
    started = threading.Event()
    for _ in range(4):
        threading.Thread(target=churn, daemon=True).start()
    started.wait(30)
    """
    for _ in range(5):
        result = program.run(body, 0)
        assert result.returncode == 0, result.stderr


def test_a_signal_handler_that_raises_during_a_look_up_ends_the_server(program: Program) -> None:
    """The exception must not cross C, and must not be lost."""
    body = """
    import threading, time
    class Stop(BaseException):
        pass
    def stop(*_):
        raise Stop("now")
    def interrupted(*_):
        signal.raise_signal(signal.SIGTERM)
    def visit():
        # A client that knows TLS 1.3 offers a random id, which a server of TLS 1.2 looks up.
        client = ssl.create_default_context()
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        with client.wrap_socket(ours) as tls:
            tls.sendall(b"x")
            tls.recv(1)
    signal.signal(signal.SIGTERM, stop)
    shim._policy.on_get_session = interrupted
    if sys.argv[1] == "ssl":
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    else:
        context.set_max_proto_version(SSL.TLS1_2_VERSION)
    ours, theirs = socket.socketpair()
    threading.Thread(target=visit, daemon=True).start()
    served = False
    try:
        serve(theirs)
        served = True
        while True:
            time.sleep(0.01)
    except Stop as error:
        assert str(error) == "now"
        assert shim.stats.misses["internal-error"] == 0
        sys.exit(8 if served and sys.argv[1] == "ssl" else 7)
    """
    result = program.run(body, 0)
    assert result.returncode == 7, result.stderr


def test_a_frontend_needs_no_grpcio(program: Program, client: Client, keyring_file: Path, store: RunningServer) -> None:
    """The package grpcio is large and starts threads that do not survive a fork."""
    body = """
    assert not {name for name in sys.modules if name.partition(".")[0] == "grpc"}
    sys.modules["grpc"] = None
    import resumed.prometheus, resumed._tracing
    shim._policy._mirror and shim._policy._mirror.follow()
    serve(connection())
    assert shim.flush(5)
    try:
        import resumed.v1.session_store_pb2_grpc
    except ImportError:
        sys.exit(0)
    sys.exit("grpcio can be imported")
    """
    assert visit_elsewhere(program, client, body, keyring_file, store)


def test_ctrl_c_during_a_look_up_ends_the_server(program: Program) -> None:
    """KeyboardInterrupt must not cross C, and must not be lost."""
    body = """
    import threading, time
    signal.signal(signal.SIGINT, signal.default_int_handler)
    binding = shim._binding
    def interrupted(*_):
        signal.raise_signal(signal.SIGINT)
    shim._policy.on_get_session = interrupted
    try:
        binding._on_get(0, 0, 0, __import__("ctypes").addressof(__import__("ctypes").c_int(1)))
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(7)
    """
    assert program.run(body, 0).returncode == 7
