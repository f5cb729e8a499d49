"""`resumed serve` from the operator's view: rejected settings, shutdown, and failures of workers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, cast

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from resumed_server.rpc.health_service import MAX_STREAMS
from support.command import called
from support.metrics import scraped_until
from support.mtls import Authority, Files, grant
from support.mtls import channel as trusted
from support.raw_http2 import Raw
from support.raw_http2 import connected as raw_connection
from support.server import COMMAND, PATIENCE, running_server, start_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from support.server import RunningServer


AUTHORITY = Authority()


def refused(*options: str, env: dict[str, str] | None = None, prefix: Sequence[str] = ()) -> list[str]:
    """Run a server that must not start, and return its complaints, whether log lines or text."""
    done = subprocess.run(
        [*prefix, *COMMAND, *options],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    complaints = []
    for line in done.stderr.splitlines():
        if not line.startswith("{"):
            complaints.append(line)
        elif (logged := json.loads(line))["event"] == "cannot start":
            complaints.append(f"resumed: {logged['problem']}")
    assert all(line.startswith("resumed: ") for line in complaints), done.stderr
    return complaints


def checked(*options: str, env: dict[str, str] | None = None) -> dict[str, str]:
    """Return the settings that `--check` prints."""
    done = called("serve", *options, "--check", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(re.split(r" +", line, maxsplit=1) for line in done.stdout.splitlines())


def eventually(met: Callable[[], bool]) -> bool:
    """Ask until `met`, for as long as a process may take for anything."""
    deadline = time.monotonic() + PATIENCE
    while not met():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def alive(process: int) -> bool:
    """Return whether the process exists; a zombie does not count."""
    with contextlib.suppress(OSError), open(f"/proc/{process}/stat", encoding="ascii") as state:  # noqa: PTH123
        return state.read().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(params=["grpcio", "native"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.contextmanager
def connected(server: RunningServer) -> Iterator[grpc.Channel]:
    """Yield a new connection."""
    with grpc.insecure_channel(server.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield channel


# --- Rejected settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--frobnicate"], r"No such option.*--frobnicate"),
        (["--max-ttl", "nonsense"], r"--max-ttl: 'nonsense' is not a duration such as 90s"),
        (["--max-ttl", "3600"], r"--max-ttl: '3600' is not a duration"),
        (["--max-ttl", "0s"], r"--max-ttl: 0s is outside 1s to 7d"),
        (["--max-ttl", "-1s"], r"--max-ttl: '-1s' is not a duration"),
        (["--max-ttl", "7.1d"], r"--max-ttl: 7.1d is outside 1s to 7d"),
        (["--capacity", "much"], r"--capacity: 'much' is not a size such as 512MiB"),
        (["--capacity", "1KiB"], r"--capacity: 1KiB is outside 1MiB to"),
        (["--capacity", "1GB"], r"--capacity: '1GB' is not a size"),
        (["--listen", "7400"], r"--listen: '7400' is not an address such as 127.0.0.1:7400"),
        (["--listen", "127.0.0.1:65536"], r"--listen: '127.0.0.1:65536' is not an address"),
        (["--listen", "::1:7400"], r"--listen: '::1:7400' is not an address"),
        (["--listen", "unix:relative"], r"--listen: 'unix:relative': give the absolute path"),
        (["--listen", "unix:/" + "x" * 107], r"--listen: .* longer than the 107 bytes"),
        (["--listen", "0.0.0.0:0"], r"--listen: 0.0.0.0:0 can be reached from other machines.*--insecure"),
        (["--listen", "[::]:0"], r"--listen: \[::\]:0 can be reached from other machines.*--insecure"),
        (["--listen", "store.example:0"], r"--listen: store.example:0 can be reached from other machines"),
        (["--workers", "2", "--listen", "unix:/run/r.sock"], r"--listen: workers cannot share the one socket unix:"),
        (["--workers", "0"], r"--workers: 0 is outside 1 to"),
        (["--workers", "many"], r"--workers: 'many' is not a whole number"),
        (["--log-format", "xml"], r"--log-format: 'xml' is none of json, console"),
        (["--storage", "mysql://x"], r"--storage: .*mysql.*lmdb:"),
        (["--tls-cert", "/dev/null"], r"--tls-cert: needs --tls-key as well"),
        (["--tls-key", "/dev/null"], r"--tls-key: needs --tls-cert as well"),
        (["--client-ca", "/dev/null"], r"--client-ca: needs --tls-cert as well"),
        (["--grants", "/dev/null"], r"--grants: needs --client-ca as well, or the server would not know who calls"),
        (["--max-connection-age", "0s"], r"--max-connection-age: 0s is outside 1s to 1d"),
        (["--health-listen", "8080"], r"--health-listen: '8080' is not an address"),
        (["--workers", "2", "--health-listen", "unix:/run/h.sock"], r"--health-listen: workers cannot share the one"),
        (["--transport", "rust"], r"--transport: 'rust' is none of grpcio, native"),
        (
            ["--transport", "native", "--insecure", "--listen", "0.0.0.0:0"],
            r"--transport: native has no TLS .*0.0.0.0:0; use ",
        ),
        (["--transport", "native", "--max-connection-age", "1m"], r"--transport: native keeps connections; leave "),
        (
            ["--transport", "native", "--check", "--listen", "[::]:0"],
            r"--transport: native has no TLS .*on \[::\]:0; use ",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_setting_that_makes_no_sense_is_one_line(options: list[str], complaint: str) -> None:
    done = called("serve", *options, "--check")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert re.match(f"resumed: {complaint}", line), line


def test_files_that_cannot_be_used_are_told_before_anything_opens(tmp_path: Path) -> None:
    files = Files(tmp_path).write(AUTHORITY.server(), AUTHORITY.pem, grant("dns:shop", ["shop"], ["get"]))
    assert checked(*files.options)["tls-cert"] == str(tmp_path / "tls.crt")
    files.write(grants=grant("dns:shop", ["shop"], ["read"]))
    (line,) = refused(*files.options, "--check")
    assert re.match(r"resumed: --grants: \S+grants.toml: grant 1: operations 'read' must list some of put,", line)
    for name, content, problem in (
        ("tls.key", AUTHORITY.server().key, "do not match"),
        ("tls.crt", b"", r"tls\.crt contains no certificate in PEM format"),
    ):
        (tmp_path / name).write_bytes(content)
        lines = refused(*files.options)
        assert re.match(f"resumed: --tls-cert, --tls-key, --client-ca: .*{problem}", lines[0])
    options = files.options
    (tmp_path / "tls.key").unlink()
    assert "tls.key cannot be read: No such file or directory" in refused(*options)[0]


def test_addresses_that_others_reach_need_client_certificates(tmp_path: Path) -> None:
    files = Files(tmp_path).write(AUTHORITY.server(), AUTHORITY.pem)
    assert checked("--listen", "0.0.0.0:0", *files.options)["insecure"] == "False"
    without_ca = files.options[:4]
    (line,) = refused("--listen", "0.0.0.0:0", *without_ca)
    assert "--client-ca" in line
    assert checked("--listen", "0.0.0.0:0", *without_ca, "--insecure")["insecure"] == "True"


@pytest.mark.parametrize("setting", ["--health-listen", "--metrics-listen"])
def test_a_busy_address_for_probes_is_one_line(setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (line,) = refused("--listen", "127.0.0.1:0", setting, f"127.0.0.1:{taken.getsockname()[1]}")
    assert line.startswith(f"resumed: {setting}: cannot listen on 127.0.0.1:")


def test_metrics_are_served_on_ports_only() -> None:
    """Prometheus does not scrape unix sockets."""
    (line,) = refused("--metrics-listen", "unix:/tmp/m.sock")
    assert line.startswith("resumed: --metrics-listen: ")


def test_all_problems_are_told_at_once() -> None:
    options = ["--max-ttl", "x", "--capacity", "y", "--listen", "z", "--workers", "0", "--storage", "mysql:"]
    told = [line.split(":")[1].strip() for line in refused(*options)]
    assert sorted(told) == ["--capacity", "--listen", "--max-ttl", "--storage", "--workers"]


def test_every_setting_is_read_from_the_environment() -> None:
    given = {
        "RESUMED_LISTEN": "127.0.0.1:7401 unix:/tmp/r.sock",
        "RESUMED_STORAGE": "lmdb:///tmp/nowhere",
        "RESUMED_CAPACITY": "512MiB",
        "RESUMED_MAX_TTL": "90m",
        "RESUMED_THREADS": "3",
        "RESUMED_SHUTDOWN_DELAY": "250ms",
        "RESUMED_NAMESPACE_OPS_PER_SECOND": "5",
        "RESUMED_MAX_CONNECTION_AGE": "90s",
        "RESUMED_HEALTH_LISTEN": "0.0.0.0:7402",
        "RESUMED_METRICS_LISTEN": "0.0.0.0:9464",
        "RESUMED_INSECURE": "true",
        "RESUMED_CORE_DUMPS": "true",
        "RESUMED_LOG_FORMAT": "console",
        "RESUMED_LOG_LEVEL": "debug",
        "RESUMED_OTEL": "true",
    }
    assert checked("--capacity", "2GiB", env=given) == {
        "listen": "127.0.0.1:7401 unix:/tmp/r.sock",
        "storage": "lmdb:///tmp/nowhere",
        "capacity": "2GiB",
        "max-ttl": "90m",
        "transport": "grpcio",
        "workers": "1",
        "threads": "3",
        "shutdown-delay": "250ms",
        "tls-cert": "",
        "tls-key": "",
        "client-ca": "",
        "grants": "",
        "namespace-ops-per-second": "5",
        "namespace-sessions": "0",
        "namespace-bytes": "0B",
        "namespace-watchers": "0",
        "max-connections": "10000",
        "max-connection-age": "90s",
        "health-listen": "0.0.0.0:7402",
        "metrics-listen": "0.0.0.0:9464",
        "insecure": "True",
        "core-dumps": "True",
        "log-format": "console",
        "log-level": "debug",
        "otel": "True",
    }
    assert checked(env={"RESUMED_TRANSPORT": "native"})["transport"] == "native"
    assert refused(env={"RESUMED_MAX_TTL": "soon"}) == refused("--max-ttl", "soon")


def test_workers_are_as_many_as_the_cores(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    bound = subprocess.run(
        ["taskset", "--cpu-list", str(core), *COMMAND, "--check"], check=True, capture_output=True, text=True
    ).stdout
    assert re.search(r"^workers +1$", bound, re.MULTILINE)
    assert 1 <= int(checked()["workers"]) <= len(os.sched_getaffinity(0))
    assert checked("--listen", f"unix:{tmp_path}/socket")["workers"] == "1"


def test_check_prints_json_on_request() -> None:
    done = called("serve", "--check", "--json", "--max-ttl", "90s")
    assert json.loads(done.stdout)["max-ttl"] == "90s"
    assert {name: str(value) for name, value in json.loads(done.stdout).items()} == checked("--max-ttl", "90s")


def test_check_opens_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        store, path = tmp_path / "store", tmp_path / "socket"
        port = taken.getsockname()[1]
        shown = checked("--listen", f"127.0.0.1:{port}", "--listen", f"unix:{path}", "--storage", f"lmdb://{store}")
    assert shown["storage"] == f"lmdb://{store}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize(
    "options",
    [("--max-ttl", "soon", "--threads", "none"), ("--storage", "lmdb:///dev/null/x"),
     ("--storage", "lmdb:///dev/null/x", "--workers", "2")],
)  # fmt: skip
def test_errors_of_the_start_have_the_format_of_the_log(options: tuple[str, ...], log_format: str) -> None:
    command = [*COMMAND, "--listen", "127.0.0.1:0", "--log-format", log_format, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    if log_format == "json":
        problems = [line for line in map(json.loads, lines) if line["event"] == "cannot start"]
        assert {line["level"] for line in problems} == {"critical"}
        assert all(line["problem"].startswith("--") for line in problems)
    else:
        problems = [line for line in lines if "resumed: --" in line]
        assert not any(line.startswith("{") for line in lines)
    assert len(problems) == len(options) // 2 - ("--workers" in options)


def test_strangers_at_the_port_write_no_line_that_is_not_json_and_few_that_are(tmp_path: Path) -> None:
    """The core of gRPC writes a line of text for each failed handshake."""
    files = Files(tmp_path).write(AUTHORITY.server(), AUTHORITY.pem)
    with running_server(*files.options, "--metrics-listen", "127.0.0.1:0") as server:
        host, _, port = server.target.rpartition(":")
        for number in range(300):
            with socket.create_connection((host, int(port)), PATIENCE) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\n\r\n" if number % 2 else b"SSH-2.0-stranger\r\n")
                connection.settimeout(PATIENCE)
                with contextlib.suppress(ConnectionError):
                    connection.recv(1)
        found = scraped_until(server, lambda found: found.total("resumed_tls_handshakes_refused_total") >= 300)
        assert found.value("resumed_tls_handshakes_total") == 300
        assert found.value("resumed_tls_handshakes_refused_total", reason="not-tls") >= 150
        with (
            pytest.raises(grpc.RpcError),
            grpc.secure_channel(
                server.target,
                grpc.ssl_channel_credentials(AUTHORITY.pem),
                [("grpc.ssl_target_name_override", "localhost")],
            ) as channel,
        ):
            SessionStoreServiceStub(channel).Get(pb.GetRequest(namespace="shop", key=b"key"), timeout=PATIENCE)
        found = scraped_until(
            server, lambda found: found.value("resumed_tls_handshakes_refused_total", reason="no-certificate") > 0
        )
        with trusted(server.target, AUTHORITY.pem, AUTHORITY.issue("dns:shop")) as channel:
            SessionStoreServiceStub(channel).Get(pb.GetRequest(namespace="shop", key=b"key"), timeout=PATIENCE)
            found = scraped_until(server, lambda found: found.value("resumed_connections") == 1)
        assert found.value("resumed_max_connections") > 1
    assert all("event" in line for line in server.log_lines())
    refusals = server.log_lines("TLS handshake refused")
    assert {line["reason"] for line in refusals} >= {"not-tls", "no-certificate"}
    assert len(refusals) < 20


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_busy_port_is_one_line(workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (line,) = refused("--listen", f"127.0.0.1:{port}", "--workers", workers)
    assert line.startswith(f"resumed: --listen: cannot listen on 127.0.0.1:{port}: the port is in use; ")


@pytest.mark.parametrize("second", ["1", "2"])
@pytest.mark.parametrize("first", [1, 2])
def test_a_second_server_does_not_join_the_first_ones_port(first: int, second: str, transport: str) -> None:
    """SO_REUSEPORT alone would allow it silently."""
    with running_server("--transport", transport, workers=first) as server:
        (line,) = refused("--listen", server.target, "--workers", second, "--transport", transport)
    assert "the port is in use" in line


def test_a_name_that_does_not_resolve_and_an_address_of_another_machine_are_told_at_once() -> None:
    lines = refused("--insecure", "--listen", "store.invalid:0", "--listen", "192.0.2.1:0")
    assert [line.split(": ")[3].split(";")[0] for line in lines] == [
        "the name does not resolve",
        "this machine does not have this address",
    ]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_unusable_store_path_is_one_line(tmp_path: Path, workers: str) -> None:
    """A file stands where the directory should be, which fails for root as well."""
    (tmp_path / "file").touch()
    url = f"lmdb://{tmp_path}/file/store"
    (line,) = refused("--listen", "127.0.0.1:0", "--storage", url, "--workers", workers)
    assert line.startswith("resumed: --storage: ")
    assert f"{tmp_path}/file/store" in line


def test_an_unreadable_store_path_is_one_line(tmp_path: Path) -> None:
    humble = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    tmp_path.chmod(0)
    try:
        (line,) = refused("--listen", "127.0.0.1:0", "--storage", f"lmdb://{tmp_path}/store", prefix=humble)
    finally:
        tmp_path.chmod(0o700)
    assert line.startswith("resumed: --storage: ")
    assert "denied" in line.lower()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_store_is_set_aside_and_a_new_one_begun(tmp_path: Path, workers: int) -> None:
    """The database is a cache, so the server starts; the old files are kept for analysis."""
    store = tmp_path / "store"
    with running_server("--storage", f"lmdb://{store}"):
        pass
    files = [file for file in tmp_path.rglob("*") if file.is_file() and "lock" not in file.name]
    assert files
    for file in files:
        file.write_bytes(b"garbage" * 4_096)
    with running_server("--storage", f"lmdb://{store}", workers=workers) as server, connected(server) as channel:
        answer = SessionStoreServiceStub(channel).Get(pb.GetRequest(namespace="shop", key=b"k"), timeout=5)
        assert not answer.HasField("session")
    kept = [file for file in tmp_path.rglob("*") if file.is_file() and file.read_bytes().startswith(b"garbage")]
    assert kept


def wiped(store: Path) -> None:
    """Leave the first two pages of a database and nothing that they point to."""
    with (store / "data.mdb").open("r+b") as file:
        file.seek(8_192)
        file.write(bytes(8 << 20))


def test_damage_found_while_serving_ends_the_server_with_status_1(tmp_path: Path) -> None:
    """Systemd or Kubernetes then restarts it with a new database."""
    options = ("--storage", f"lmdb://{tmp_path}/store")
    with running_server(*options) as server:
        wiped(tmp_path / "store")
        assert server.wait() == 1
        assert [line["event"] for line in server.log_lines()][-3:] == ["not ready", "draining", "stopped"]
    with running_server(*options) as server, connected(server) as channel:
        SessionStoreServiceStub(channel).Get(pb.GetRequest(namespace="shop", key=b"k"), timeout=PATIENCE)


def crash(process: int, _store: Path) -> None:
    os.kill(process, signal.SIGSEGV)


def damage(_process: int, store: Path) -> None:
    wiped(store)


@pytest.mark.parametrize("harm", [crash, damage])
def test_workers_begin_a_new_database_by_themselves(tmp_path: Path, harm: Callable[[int, Path], None]) -> None:
    store = tmp_path / "store"
    with running_server("--storage", f"lmdb://{store}", workers=2) as server:
        workers = [line["process"] for line in server.wait_for_log("ready", 2)]
        harm(workers[0], store)
        ready = server.wait_for_log("ready", 4)
        assert len(server.log_lines("database quarantined, creating a new one")) == 1
        assert {line["worker"] for line in server.log_lines("worker died")} == set(workers)
        assert len({line["process"] for line in ready}) == 4
        for _ in range(4):
            with connected(server) as channel:
                request = pb.GetRequest(namespace="shop", key=b"k")
                answer = SessionStoreServiceStub(channel).Get(request, timeout=PATIENCE)
                assert not answer.HasField("session")
        assert server.stop() == 0


# --- Where it listens ----------------------------------------------------------------------------------------------


def test_it_listens_on_several_addresses_and_tells_the_ports(tmp_path: Path, transport: str) -> None:
    path = tmp_path / "socket"
    with running_server("--transport", transport, "--listen", f"unix:{path}", "--listen", "localhost:0") as server:
        addresses = server.wait_for_log("listening")[0]["addresses"]
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        for address in addresses:
            assert not address.endswith(":0")
            with grpc.insecure_channel(address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                assert stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status == 1
    assert len(addresses) == 3
    assert not path.exists()


def test_a_stale_unix_socket_is_replaced_and_one_in_use_is_not(tmp_path: Path, transport: str) -> None:
    path = tmp_path / "socket"
    with running_server("--transport", transport, listen=f"unix:{path}") as server:
        (line,) = refused("--listen", f"unix:{path}")
        assert "another process listens there" in line
        server.kill()
    assert path.exists()
    with running_server("--transport", transport, listen=f"unix:{path}"):
        pass
    path.write_text("precious")
    (line,) = refused("--listen", f"unix:{path}")
    assert "not a socket" in line
    assert path.read_text() == "precious"


# --- How it stops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_that_was_stopped_and_continued_serves_on(workers: int) -> None:
    """An unrelated signal interrupts the wait for a signal."""
    with running_server(workers=workers) as server:
        with connected(server) as channel:
            stub = SessionStoreServiceStub(channel)
            request = pb.GetRequest(namespace="shop", key=b"key")
            children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
            processes = [server.process.pid, *map(int, children)]
            for process in processes:
                os.kill(process, signal.SIGSTOP)
            time.sleep(1.5)  # the real time that a wait takes has to pass: it is in the kernel
            for process in processes:
                os.kill(process, signal.SIGCONT)
            time.sleep(0.5)
            assert stub.Get(request, timeout=PATIENCE, wait_for_ready=True) == pb.GetResponse()
        assert server.process.poll() is None
        assert not server.log_lines("draining")


def test_sigterm_sends_callers_away_before_it_stops_serving(tmp_path: Path, transport: str) -> None:
    with running_server("--transport", transport, "--shutdown-delay", "1s") as server, connected(server) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        server.signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        stub = SessionStoreServiceStub(channel)
        assert not stub.Get(pb.GetRequest(namespace="shop", key=b"k"), timeout=5).HasField("session")
        assert not server.log_lines("stopped")
        watch.cancel()
        assert server.wait() == 0
    assert [line["event"] for line in server.log_lines()] == ["starting", "listening", "ready", "draining", "stopped"]


def test_a_watcher_can_tell_a_rollout_from_an_outage(transport: str) -> None:
    with running_server("--transport", transport, "--shutdown-delay", "0s") as server, connected(server) as channel:
        watch = SessionStoreServiceStub(channel).Watch(pb.WatchRequest(namespace="shop"))
        assert next(watch).live
        server.signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as ended:
            list(watch)
        assert server.wait() == 0
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    status = rpc_status.from_call(cast("grpc.Call", ended.value))
    assert status is not None
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == "ERROR_REASON_DRAINING"
    assert not server.log_lines("the storage does not answer now, try again later")


@pytest.mark.parametrize("workers", [1, 2])
def test_calls_in_flight_finish(workers: int, transport: str) -> None:
    """Continuous callers see complete responses and then the end of the server.

    Calls that arrive between the server's GOAWAY and the client's receipt of it fail with CANCELLED by gRPC's core, and
    were not executed.
    """
    codes: list[grpc.StatusCode] = []

    def call_on() -> None:
        with connected(server) as channel:
            stub = SessionStoreServiceStub(channel)
            request = pb.BatchRequest(
                operations=[pb.BatchOperation(get=pb.GetRequest(namespace="shop", key=b"k"))] * 256
            )
            try:
                while len(stub.Batch(request, timeout=10).results) == len(request.operations):
                    pass
            except grpc.RpcError as error:
                codes.append(error.code())

    with running_server("--transport", transport, "--shutdown-delay", "300ms", workers=workers) as server:
        threads = [threading.Thread(target=call_on) for _ in range(4)]
        for thread in threads:
            thread.start()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        for thread in threads:
            thread.join(PATIENCE)
    assert len(codes) == len(threads)
    assert set(codes) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}, codes


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_signal_ends_it_at_once(workers: int, transport: str) -> None:
    with running_server("--transport", transport, "--shutdown-delay", "1h", workers=workers) as server:
        server.signal(signal.SIGINT)
        server.wait_for_log("draining", workers)
        server.signal(signal.SIGINT)
        assert server.wait() == 0


def test_a_signal_during_the_start_ends_it_cleanly() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        server = start_server("--listen", "127.0.0.1:0", "--shutdown-delay", "0s")
        server.wait_for_log("starting")
        server.signal(number)
        assert server.wait() == 0
        assert all("text" not in line for line in server.log_lines())


# --- Workers -------------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_replaced(transport: str) -> None:
    with running_server("--transport", transport, workers=2) as server:
        request = pb.PutRequest(namespace="shop", key=b"k", value=b"sealed")
        request.ttl.FromSeconds(600)
        with connected(server) as channel:
            SessionStoreServiceStub(channel).Put(request, timeout=5)
        victim = server.wait_for_log("ready", 2)[0]["process"]
        os.kill(victim, signal.SIGKILL)
        server.wait_for_log("ready", 3)
        (died,) = server.log_lines("worker died")
        assert (died["worker"], died["status"]) == (victim, -signal.SIGKILL)
        for _ in range(8):
            with connected(server) as channel:
                answer = SessionStoreServiceStub(channel).Get(pb.GetRequest(namespace="shop", key=b"k"), timeout=5)
                assert answer.session.value == b"sealed"
        assert server.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_sighup_ends_nothing(workers: int) -> None:
    """Operators send it to reload files, which the server does anyway."""
    with running_server(workers=workers) as server, connected(server) as channel:
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        for process in (server.process.pid, *map(int, children)):
            os.kill(process, signal.SIGHUP)
        request = pb.GetRequest(namespace="shop", key=b"k")
        for _ in range(20):
            assert SessionStoreServiceStub(channel).Get(request, timeout=PATIENCE) == pb.GetResponse()
        assert server.stop() == 0
        assert not server.log_lines("worker died")


def test_workers_do_not_outlive_a_killed_supervisor(transport: str) -> None:
    """They would occupy the port, and they skip the drain because the next server waits for it."""
    with running_server("--transport", transport, "--shutdown-delay", "1h", workers=2) as server:
        workers = [line["process"] for line in server.wait_for_log("ready", 2)]
        assert all(map(alive, workers))
        server.process.kill()
        assert eventually(lambda: not any(map(alive, workers)))


def test_health_streams_that_nobody_reads_hold_up_nothing(tmp_path: Path) -> None:
    shop, watch = "spiffe://example.org/shop", "/grpc.health.v1.Health/Watch"
    caller = AUTHORITY.issue(shop)
    files = Files(tmp_path).write(AUTHORITY.server(), AUTHORITY.pem, grant(shop, ["*"], ["get"]))
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running_server(*files.options, "--health-listen", "127.0.0.1:0"))
        (probed,) = server.log_lines("listening")[0]["health"]
        unread = stack.enter_context(Raw(raw_connection(probed)))
        unread.close_windows()
        for number in range(MAX_STREAMS + 8):
            unread.open_call(2 * number + 1, watch)
            unread.send_message(2 * number + 1, b"")
        with grpc.insecure_channel(probed) as probing, trusted(server.target, AUTHORITY.pem, caller) as calling:
            health, stub = health_pb2_grpc.HealthStub(probing), SessionStoreServiceStub(calling)
            assert next(health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)).status == 1

            def allowed() -> bool:
                for service in ("", "live"):
                    request = health_pb2.HealthCheckRequest(service=service)
                    assert health.Check(request, timeout=PATIENCE).status == 1
                try:
                    stub.Get(pb.GetRequest(namespace="shop", key=b"k"), timeout=PATIENCE)
                except grpc.RpcError as error:
                    return error.code() is not grpc.StatusCode.PERMISSION_DENIED
                return True

            assert allowed()
            files.write(grants=grant("spiffe://example.org/other", ["*"], ["get"]))
            assert eventually(lambda: not allowed())
        assert server.stop() == 0


def test_idle_connections_leave_the_locks_of_the_database_alone(tmp_path: Path) -> None:
    """LMDB uses POSIX locks, which a process loses when it closes any descriptor of the file."""
    options = ("--storage", f"lmdb://{tmp_path}", "--max-connections", "100")
    with running_server(*options, workers=2) as server, contextlib.ExitStack() as stack:
        inode = (tmp_path / "lock.mdb").stat().st_ino

        def locks() -> list[tuple[str, str]]:
            fields = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
            return sorted((each[4], each[6]) for each in fields if each[1] == "POSIX" and each[5].endswith(f":{inode}"))

        before = locks()
        assert len({process for process, _ in before}) == 2
        host, _, port = server.target.rpartition(":")
        for _ in range(220):
            stack.enter_context(socket.create_connection((host, int(port)), PATIENCE))
        deadline = time.monotonic() + 2.5  # covers all tasks that run once a second
        while time.monotonic() < deadline:
            assert locks() == before
            time.sleep(0.1)
        with (tmp_path / "lock.mdb").open("r+b") as file, pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)


def test_stopping_leaves_no_process_and_no_directory(tmp_path: Path, transport: str) -> None:
    with running_server("--transport", transport, workers=2, env={"TMPDIR": str(tmp_path)}) as server:
        workers = [line["process"] for line in server.wait_for_log("ready", 2)]
        assert list(tmp_path.iterdir())
        assert server.stop() == 0
    assert not any(map(alive, workers))
    assert not list(tmp_path.iterdir())


def changed(directory: Path, code: str) -> dict[str, str]:
    """Return the environment of a server that runs `code` before anything else."""
    (directory / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])}


def test_a_server_on_a_grpcio_that_is_not_as_expected_serves_and_says_so(tmp_path: Path, transport: str) -> None:
    code = "from resumed_server.rpc._grpcio_private import HandlerArgs\nHandlerArgs.parse = lambda _arguments: None\n"
    options = ("--transport", transport, "--threads", "2")
    with running_server(*options, workers=2, env=changed(tmp_path, code)) as server, connected(server) as channel:
        assert len([line for line in server.log_lines() if line.get("level") == "critical"]) == 2
        stub = SessionStoreServiceStub(channel)
        watches = [stub.Watch(pb.WatchRequest(namespace="shop"), timeout=PATIENCE) for _ in range(8)]
        assert all(next(watch).live for watch in watches)
        assert not stub.Get(pb.GetRequest(namespace="shop", key=b"k"), timeout=PATIENCE).HasField("session")
        assert server.stop() == 0


def test_a_main_loop_that_hangs_is_no_longer_live(tmp_path: Path, transport: str) -> None:
    code = f"""if True:
        import os, time
        from resumed_server.lifecycle import health, supervisor

        wait = supervisor.wait_for_stop_signal
        health.STALLED_SECONDS = 4.0
        supervisor.wait_for_stop_signal = lambda s: time.sleep(3_600) if os.path.exists("{tmp_path}/hang") else wait(s)
    """
    with running_server("--transport", transport, env=changed(tmp_path, code)) as server, connected(server) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def serves(service: str) -> bool:
            request = health_pb2.HealthCheckRequest(service=service)
            return bool(health.Check(request, timeout=PATIENCE).status == health_pb2.HealthCheckResponse.SERVING)

        assert eventually(lambda: serves("live"))
        (tmp_path / "hang").touch()
        assert eventually(lambda: not serves("live"))
        assert serves("")
        server.kill()


def _race(target: str, keys: list[bytes], won: multiprocessing.SimpleQueue[list[bytes]]) -> None:
    with grpc.insecure_channel(target) as channel:
        stub = SessionStoreServiceStub(channel)
        mine = []
        for start in range(0, len(keys), 50):
            calls = [
                (key, stub.Take.future(pb.TakeRequest(namespace="race", key=key))) for key in keys[start : start + 50]
            ]
            mine += [key for key, call in calls if call.result(PATIENCE).HasField("session")]
        won.put(mine)


def test_ten_thousand_takes_raced_by_eight_clients_hand_each_session_out_once(transport: str) -> None:
    keys = [uuid.uuid4().bytes for _ in range(1_250)]
    spawn = multiprocessing.get_context("spawn")
    with running_server("--transport", transport, workers=2) as server:
        with connected(server) as channel:
            stub = SessionStoreServiceStub(channel)
            for start in range(0, len(keys), 250):
                batch = pb.BatchRequest()
                for key in keys[start : start + 250]:
                    put = batch.operations.add().put
                    put.namespace, put.key, put.value = "race", key, b"sealed"
                    put.ttl.FromSeconds(600)
                assert {result.WhichOneof("result") for result in stub.Batch(batch).results} == {"put"}
        won: multiprocessing.SimpleQueue[list[bytes]] = spawn.SimpleQueue()
        clients = [spawn.Process(target=_race, args=(server.target, keys, won)) for _ in range(8)]
        for client in clients:
            client.start()
        winnings = [won.get() for _ in clients]
        for client in clients:
            client.join(PATIENCE)
            client.close()
    assert sorted(key for winning in winnings for key in winning) == sorted(keys)


# --- Without the extra ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["typer", "structlog", "grpc_health"])
def test_without_the_server_extra_the_command_says_what_to_install(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['resumed', 'serve', '--listen', '127.0.0.1:0']; "
        "from resumed_server.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert "pip install 'resumed[server]'" in done.stderr


def test_the_native_transport_refuses_tls() -> None:
    """It has no TLS, so it would serve plaintext."""
    lines = refused("--transport", "native", "--tls-cert", "/nowhere", "--tls-key", "/nowhere")
    assert "resumed: --transport: native has no TLS; leave --tls-cert away, or use --transport grpcio" in lines


@pytest.mark.parametrize("option", ["--check", "--insecure"])
def test_without_the_native_extra_its_transport_says_what_to_install(option: str) -> None:
    code = (
        "import sys; sys.modules['pygrpc_native'] = None; from resumed_server.cli import main; "
        f"sys.argv = ['resumed', 'serve', '--transport', TRANSPORT, {option!r}, '--listen', 'unix:/nowhere/socket']; "
        "main()"
    )

    def run(transport: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code.replace("TRANSPORT", repr(transport))]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)

    assert "native" not in run("grpcio").stderr.replace('"transport": "grpcio"', "")
    done = run("native")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    problem = line if option == "--check" else f"resumed: {json.loads(line)['problem']}"
    assert problem.startswith("resumed: --transport: native needs the package pygrpc-native; pip install")


def test_the_version_is_told() -> None:
    done = subprocess.run([*COMMAND[:-1], "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"resumed \d+\.\d+\.\d+.*\n", done.stdout)


def test_console_logs_are_one_line_an_event(tmp_path: Path) -> None:
    done = start_server("--listen", f"unix:{tmp_path}/s", "--log-format", "console", "--shutdown-delay", "0s")
    assert eventually(lambda: any("ready" in str(line) for line in done.log_lines()))
    assert done.stop() == 0
    texts = [line["text"] for line in done.log_lines()]
    assert len(texts) == 5
    for text in texts:
        with pytest.raises(ValueError, match=r"Expecting|Extra"):
            json.loads(text)
