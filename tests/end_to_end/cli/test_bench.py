"""`resumed bench` measures OpenSSL's own TLS server and frontends with the client library."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from benchmarks.fleet import Fleet
from support.command import run_command
from support.tls import CA, CERTIFICATE, STACKS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.server import RunningServer

BENCH = (sys.executable, "-m", "resumed_server", "bench")
FEW_CLIENTS = ("--clients", "8", "--connections", "4", "--processes", "2")


class Server(NamedTuple):
    """A TLS server; `ca` is the file with the certificate that signed its own."""

    target: str
    ca: str
    process: subprocess.Popen[bytes]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; it never shows a traceback."""
    done = subprocess.run([*BENCH, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def report(*arguments: str) -> dict[str, Any]:
    """Return the report of a run in which every visit succeeded."""
    done = bench(*arguments, "--json")
    assert done.returncode == 0, done
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["failures"] == {}
    return found


def complaint(*arguments: str, status: int = 1) -> str:
    """Return the one line with which a run was refused."""
    return complained(bench(*arguments), status)


def complained(done: subprocess.CompletedProcess[str], status: int) -> str:
    """Return the one line with which a run that has ended was refused."""
    assert done.returncode == status, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("resumed: ")
    return line


@contextlib.contextmanager
def s_server(directory: Path, *options: str) -> Iterator[Server]:
    certificate, ca = directory / "server.pem", directory / "ca.pem"
    certificate.write_bytes(CERTIFICATE.private_key_and_cert_chain_pem.bytes())
    CA.cert_pem.write_to_path(str(ca))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", str(certificate), "-www", *options]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            while b"ACCEPT" not in process.stdout.readline():
                assert process.poll() is None
            # Otherwise its report fills the pipe.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield Server(f"127.0.0.1:{port}", str(ca), process)
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run one s_server for all that do not harm it."""
    with s_server(tmp_path_factory.mktemp("s_server")) as running:
        yield running


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_it_offers_the_given_share_of_sessions(server: Server, version: str) -> None:
    options = ("--ca", server.ca, "--sni", "localhost", "--tls", version, "--count", "400", "--resume", "75")
    found = report(server.target, *options, *FEW_CLIENTS)
    assert found["versions"] == {f"TLSv{version}": 400}
    assert found["offered"] == pytest.approx(300, abs=8)  # each client begins somewhere
    assert found["resumed_of_offered"] == 1
    assert found["full"]["handshakes"] + found["resumed"]["handshakes"] == 400
    for kind in ("full", "resumed"):
        assert 0 < found[kind]["p50_ms"] <= found[kind]["p90_ms"] <= found[kind]["p99_ms"]
        assert found[kind]["per_second"] == pytest.approx(found[kind]["handshakes"] / found["seconds"], rel=0.01)


@pytest.mark.parametrize(("percent", "offered"), [("0", 0), ("100", 100)])
def test_all_full_or_all_resumed(server: Server, percent: str, offered: int) -> None:
    found = report(server.target, "--insecure", "--count", "100", "--resume", percent, *FEW_CLIENTS)
    assert (found["offered"], found["resumed"]["handshakes"]) == (offered, offered)


@pytest.mark.parametrize("options", [(), ("-num_tickets", "0")])
def test_a_server_without_sessions_is_measured_too(tmp_path: Path, options: tuple[str, ...]) -> None:
    with s_server(tmp_path, "-no_ticket", "-no_cache", *options) as server:
        found = report(server.target, "--insecure", "--count", "50", "--resume", "90", *FEW_CLIENTS)
    assert found["full"]["handshakes"] == 50


def test_waits_for_an_answer(server: Server) -> None:
    """With --send the answer is part of the time."""
    ask = ("--send", r"GET / HTTP/1.0\r\n\r\n", "--count", "50", "--connections", "1")
    assert report(server.target, "--insecure", *ask)["resumed_of_offered"] == 1


def test_ends_when_the_time_is_over(server: Server) -> None:
    assert 0.2 < report(server.target, "--insecure", "--duration", "300ms")["seconds"] < 5  # and not the 10 s of before


@pytest.mark.parametrize(("version", "shared"), [("1.2", True), ("1.3", True), ("1.3", False)])
def test_sessions_cross_frontends_that_share_a_store(
    store: RunningServer, tmp_path: Path, version: str, shared: bool
) -> None:
    fleet = Fleet(str(tmp_path))
    options = ("--insecure", "--sni", "localhost", "--tls", version, "--count", "200", "--send", r"who\n", *FEW_CLIENTS)
    shim = ("--puts", "wait", "--deadline", "5")
    target = store.target if shared else None
    with fleet.frontend(STACKS[0], target, *shim) as first, fleet.frontend(STACKS[1], target, *shim) as second:
        targets = f"127.0.0.1:{first}", f"127.0.0.1:{second}"
        found = report(*targets, *options, "--resume", "50")
    assert found["resumed_of_offered"] == shared
    visits = [sum(figures["handshakes"] for figures in found["by_target"][each].values()) for each in targets]
    assert visits == [pytest.approx(100, abs=8)] * 2


def test_tells_of_visits_that_fail(tmp_path: Path) -> None:
    with s_server(tmp_path) as server:
        command = [*BENCH, server.target, "--insecure", "--duration", "4s", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            time_of_load = wait_for_load(running.pid)
            server.process.kill()
            said, _ = running.communicate(timeout=60)
    found = json.loads(said)
    assert running.returncode == 1, time_of_load
    assert f"{server.target}: Connection refused" in found["failures"]


def wait_for_load(pid: int) -> float:
    """Wait until the command has a process that makes visits, and has used some time; return which."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    end = time.monotonic() + 30
    while time.monotonic() < end:
        used = 0.0
        for child in children.read_text().split():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                used = max(used, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
        if used > 1:
            return used
        time.sleep(0.02)
    raise AssertionError("no load")


def test_ctrl_c_leaves_nothing_behind(server: Server) -> None:
    command = [*BENCH, server.target, "--insecure", "--duration", "60s", *FEW_CLIENTS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as running:
        wait_for_load(running.pid)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does
        said = running.communicate(timeout=30)
    assert running.returncode == 130
    assert b"Traceback" not in b"".join(said)
    assert gone(running.pid)


def gone(group: int) -> bool:
    """Wait until a process group is empty."""
    end = time.monotonic() + 30
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.02)
        return False
    return True


def test_shows_a_table(server: Server) -> None:
    said = bench(server.target, "--insecure", "--count", "50").stdout
    for part in ("full", "resumed", "p99", "per second", "100.0% of", "this client used"):
        assert part in said


class TestErrors:
    def test_untrusted_certificate(self, server: Server) -> None:
        assert "--ca FILE" in complaint(server.target, "--sni", "localhost")
        assert "not trusted" in complaint(server.target, "--ca", server.ca, "--sni", "elsewhere.example")

    def test_nothing_listens(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            target = f"127.0.0.1:{free.getsockname()[1]}"
        assert "Connection refused; is the server running?" in complaint(target, status=3)

    def test_no_tls(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:

            def answer() -> None:
                connection, _ = other.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

            thread = threading.Thread(target=answer)
            thread.start()
            said = complaint(f"127.0.0.1:{other.getsockname()[1]}", "--insecure")
            thread.join()
        assert "no TLS 1.2 or 1.3 there" in said

    def test_version_that_the_server_does_not_speak(self, tmp_path: Path) -> None:
        with s_server(tmp_path, "-tls1_2") as server:
            assert "no TLS 1.3 there" in complaint(server.target, "--insecure", "--tls", "1.3")

    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            ((), "TARGET"),
            (("localhost",), "TARGET"),
            (("unix:/run/server.sock",), "host:port"),
            (("no-such-host.invalid:443",), "does not resolve"),
            (("localhost:1", "--tls", "1.1"), "--tls"),
            (("localhost:1", "--resume", "101"), "--resume"),
            (("localhost:1", "--duration", "10"), "--duration"),
            (("localhost:1", "--duration", "0s"), "--duration"),
            (("localhost:1", "--count", "0"), "--count"),
            (("localhost:1", "--connections", "0"), "--connections"),
            (("localhost:1", "--ca", "/missing.pem"), "/missing.pem: No such file"),
            (("localhost:1", "--ca", "/dev/null"), "contains no PEM certificates"),
            (("localhost:1", "--ca", "/missing.pem", "--insecure"), "contradict"),
            (("localhost:1", "--send", "\\x"), "--send"),
        ],
    )
    def test_bad_usage(self, arguments: tuple[str, ...], part: str) -> None:
        assert part in complained(run_command("bench", *arguments), 3 if "resolve" in part else 2)

    def test_pyopenssl_is_missing(self, tmp_path: Path) -> None:
        (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['OpenSSL'] = None\n")
        done = subprocess.run(
            [*BENCH, "localhost:1"],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr == "resumed: resumed bench needs pyOpenSSL: pip install 'resumed[pyopenssl]'\n"
