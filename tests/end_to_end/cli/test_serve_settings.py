"""`resumed serve`: rejected settings, `--check`, missing extras, and the log of a start."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import grpc
import pytest

from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from support.command import run_command
from support.metrics import scraped_until
from support.mtls import Authority, Files, grant
from support.mtls import channel as trusted
from support.server import COMMAND, PATIENCE, running_server, start_server
from support.serving import complaints_of, read_settings
from support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

AUTHORITY = Authority()


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
    done = run_command("serve", *options, "--check")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert re.match(f"resumed: {complaint}", line), line


def test_unusable_files_are_reported_before_any_resource_opens(tmp_path: Path) -> None:
    files = Files(tmp_path).write(AUTHORITY.server(), AUTHORITY.pem, grant("dns:shop", ["shop"], ["get"]))
    assert read_settings(*files.options)["tls-cert"] == str(tmp_path / "tls.crt")
    files.write(grants=grant("dns:shop", ["shop"], ["read"]))
    (line,) = complaints_of(*files.options, "--check")
    assert re.match(r"resumed: --grants: \S+grants.toml: grant 1: operations 'read' must list some of put,", line)
    for name, content, problem in (
        ("tls.key", AUTHORITY.server().key, "do not match"),
        ("tls.crt", b"", r"tls\.crt contains no certificate in PEM format"),
    ):
        (tmp_path / name).write_bytes(content)
        lines = complaints_of(*files.options)
        assert re.match(f"resumed: --tls-cert, --tls-key, --client-ca: .*{problem}", lines[0])
    options = files.options
    (tmp_path / "tls.key").unlink()
    assert "tls.key cannot be read: No such file or directory" in complaints_of(*options)[0]


def test_addresses_that_others_reach_need_client_certificates(tmp_path: Path) -> None:
    files = Files(tmp_path).write(AUTHORITY.server(), AUTHORITY.pem)
    assert read_settings("--listen", "0.0.0.0:0", *files.options)["insecure"] == "False"
    without_ca = files.options[:4]
    (line,) = complaints_of("--listen", "0.0.0.0:0", *without_ca)
    assert "--client-ca" in line
    assert read_settings("--listen", "0.0.0.0:0", *without_ca, "--insecure")["insecure"] == "True"


@pytest.mark.parametrize("setting", ["--health-listen", "--metrics-listen"])
def test_a_busy_address_for_probes_is_one_line(setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (line,) = complaints_of("--listen", "127.0.0.1:0", setting, f"127.0.0.1:{taken.getsockname()[1]}")
    assert line.startswith(f"resumed: {setting}: cannot listen on 127.0.0.1:")


def test_metrics_are_served_on_ports_only() -> None:
    """Prometheus does not scrape unix sockets."""
    (line,) = complaints_of("--metrics-listen", "unix:/tmp/m.sock")
    assert line.startswith("resumed: --metrics-listen: ")


def test_all_problems_are_reported_together() -> None:
    options = ["--max-ttl", "x", "--capacity", "y", "--listen", "z", "--workers", "0", "--storage", "mysql:"]
    told = [line.split(":")[1].strip() for line in complaints_of(*options)]
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
    assert read_settings("--capacity", "2GiB", env=given) == {
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
    assert read_settings(env={"RESUMED_TRANSPORT": "native"})["transport"] == "native"
    assert complaints_of(env={"RESUMED_MAX_TTL": "soon"}) == complaints_of("--max-ttl", "soon")


def test_workers_are_as_many_as_the_cores(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    bound = subprocess.run(
        ["taskset", "--cpu-list", str(core), *COMMAND, "--check"], check=True, capture_output=True, text=True
    ).stdout
    assert re.search(r"^workers +1$", bound, re.MULTILINE)
    assert 1 <= int(read_settings()["workers"]) <= len(os.sched_getaffinity(0))
    assert read_settings("--listen", f"unix:{tmp_path}/socket")["workers"] == "1"


def test_check_prints_json_on_request() -> None:
    done = run_command("serve", "--check", "--json", "--max-ttl", "90s")
    assert json.loads(done.stdout)["max-ttl"] == "90s"
    assert {name: str(value) for name, value in json.loads(done.stdout).items()} == read_settings("--max-ttl", "90s")


def test_check_opens_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        store, path = tmp_path / "store", tmp_path / "socket"
        port = taken.getsockname()[1]
        shown = read_settings(
            "--listen", f"127.0.0.1:{port}", "--listen", f"unix:{path}", "--storage", f"lmdb://{store}"
        )
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
        (line,) = complaints_of("--listen", f"127.0.0.1:{port}", "--workers", workers)
    assert line.startswith(f"resumed: --listen: cannot listen on 127.0.0.1:{port}: the port is in use; ")


@pytest.mark.parametrize("second", ["1", "2"])
@pytest.mark.parametrize("first", [1, 2])
def test_a_second_server_does_not_join_the_first_ones_port(first: int, second: str, transport: str) -> None:
    """SO_REUSEPORT alone would allow it silently."""
    with running_server("--transport", transport, workers=first) as server:
        (line,) = complaints_of("--listen", server.target, "--workers", second, "--transport", transport)
    assert "the port is in use" in line


def test_an_unresolvable_name_and_a_foreign_address_are_reported_together() -> None:
    lines = complaints_of("--insecure", "--listen", "store.invalid:0", "--listen", "192.0.2.1:0")
    assert [line.split(": ")[3].split(";")[0] for line in lines] == [
        "the name does not resolve",
        "this machine does not have this address",
    ]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_unusable_store_path_is_one_line(tmp_path: Path, workers: str) -> None:
    """A file stands where the directory should be, which fails for root as well."""
    (tmp_path / "file").touch()
    url = f"lmdb://{tmp_path}/file/store"
    (line,) = complaints_of("--listen", "127.0.0.1:0", "--storage", url, "--workers", workers)
    assert line.startswith("resumed: --storage: ")
    assert f"{tmp_path}/file/store" in line


def test_an_unreadable_store_path_is_one_line(tmp_path: Path) -> None:
    humble = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    tmp_path.chmod(0)
    try:
        (line,) = complaints_of("--listen", "127.0.0.1:0", "--storage", f"lmdb://{tmp_path}/store", prefix=humble)
    finally:
        tmp_path.chmod(0o700)
    assert line.startswith("resumed: --storage: ")
    assert "denied" in line.lower()


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
    lines = complaints_of("--transport", "native", "--tls-cert", "/nowhere", "--tls-key", "/nowhere")
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


def test_the_version_is_printed() -> None:
    done = subprocess.run([*COMMAND[:-1], "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"resumed \d+\.\d+\.\d+.*\n", done.stdout)


def test_console_logs_are_one_line_an_event(tmp_path: Path) -> None:
    done = start_server("--listen", f"unix:{tmp_path}/s", "--log-format", "console", "--shutdown-delay", "0s")
    until(lambda: any("ready" in str(line) for line in done.log_lines()))
    assert done.stop() == 0
    texts = [line["text"] for line in done.log_lines()]
    assert len(texts) == 5
    for text in texts:
        with pytest.raises(ValueError, match=r"Expecting|Extra"):
            json.loads(text)
