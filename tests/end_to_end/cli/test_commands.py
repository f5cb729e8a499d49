"""`resumed keygen`, `check` and `demo` from a newcomer's view."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import lmdb
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from resumed import Keyring, KeyringError
from support.command import run_command
from support.mtls import grant
from support.ports import free_port
from support.server import PATIENCE, running_server
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.server import RunningServer

RESUMED = (sys.executable, "-m", "resumed_server")


def started(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a process of its own; it never shows a traceback."""
    done = subprocess.run([*RESUMED, *arguments], capture_output=True, text=True, timeout=60, check=False, **options)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("resumed: ")
    return line


@pytest.fixture(scope="module")
def store() -> Iterator[RunningServer]:
    """A real server, shared by all tests that do not harm it."""
    with running_server() as server:
        yield server


class TestKeygen:
    def test_makes_a_keyring_for_its_owner_only(self, tmp_path: Path) -> None:
        path = tmp_path / "fleet.keys"
        done = started("keygen", str(path), preexec_fn=lambda: os.umask(0))
        assert done.returncode == 0
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        (key_id,) = Keyring.load(path).key_ids
        assert key_id in done.stdout
        assert re.search(rf"^# {key_id}, made \d{{4}}-\d\d-\d\dT", path.read_text(), re.MULTILINE)

    def test_never_overwrites(self, tmp_path: Path) -> None:
        path = tmp_path / "fleet.keys"
        path.write_text("precious")
        assert "exists" in complaint(run_command("keygen", str(path)))
        assert path.read_text() == "precious"

    def test_says_why_it_cannot_write(self, tmp_path: Path) -> None:
        assert "No such file or directory" in complaint(run_command("keygen", str(tmp_path / "missing" / "fleet.keys")))

    def test_tells_programs_too(self, tmp_path: Path) -> None:
        path = str(tmp_path / "fleet.keys")
        created = json.loads(run_command("keygen", path, "--json").stdout)
        assert created == {"file": path, "created": Keyring.load(path).key_ids[0]}
        added = json.loads(run_command("keygen", path, "--append", "--json").stdout)["added"]
        assert added == Keyring.load(path).key_ids[1]
        early = run_command("keyring", "promote", path, "--json")
        assert early.returncode == 3
        promoted = json.loads(run_command("keyring", "promote", path, "--force", "--json").stdout)
        assert promoted["promoted"] == added == promoted["keys"][0]["id"]
        assert run_command("keyring", "retire", path, "--json").returncode == 3
        retired = json.loads(run_command("keyring", "retire", path, "--force", "--json").stdout)
        assert (retired["retired"], len(retired["keys"])) == (created["created"], 1)
        assert len(base64.b64decode(json.loads(run_command("keygen", "--json").stdout)["key"])) == 32

    def test_prints_the_key_without_a_file(self) -> None:
        first, second = run_command("keygen").stdout, run_command("keygen").stdout
        assert len(base64.b64decode(first, validate=False)) == 32
        assert first.count("\n") == 1
        assert first != second


class TestGrantsCheck:
    @pytest.fixture
    def file(self, tmp_path: Path) -> str:
        path = tmp_path / "grants.toml"
        path.write_text(
            grant("spiffe://example.org/shop", ["shop", "shop.*"], ["put", "get", "take", "remove", "watch"])
            + grant("dns:frontend.pay.svc", ["pay"], ["put", "get"])
            + grant("spiffe://example.org/ops/*", ["*"], ["purge", "stats"])
        )
        return str(path)

    @staticmethod
    def ask(file: str, identity: str, namespace: str, operation: str) -> subprocess.CompletedProcess[str]:
        """Run `resumed grants check` for one call."""
        asked = ("--identity", identity, "--namespace", namespace, "--operation", operation)
        return run_command("grants", "check", file, *asked)

    @pytest.mark.parametrize(
        ("identity", "namespace", "operation", "answer"),
        [
            ("spiffe://example.org/shop", "shop.eu", "take", "grant 1 (spiffe://example.org/shop) allows"),
            ("spiffe://example.org/ops/anna", "pay", "purge", "grant 3 (spiffe://example.org/ops/*) allows"),
        ],
    )
    def test_names_the_grant_that_allows(
        self, file: str, identity: str, namespace: str, operation: str, answer: str
    ) -> None:
        done = self.ask(file, identity, namespace, operation)
        assert done.returncode == 0
        assert done.stdout.startswith(f"allowed: {answer} {identity} to {operation} in {namespace}")

    @pytest.mark.parametrize(
        ("identity", "namespace", "operation", "nearest"),
        [
            ("spiffe://example.org/shop", "pay", "get", "grant 1 is for that identity, only in shop, shop.*"),
            ("dns:frontend.pay.svc", "pay", "take", "grant 2 is for that identity, only to put, get"),
            ("dns:frontend.pay.svc", "shop", "take", "grant 1 is for spiffe://example.org/shop"),
            ("dns:frontend.pays.svc", "pay", "get", "grant 2 is for dns:frontend.pay.svc"),
            ("spiffe://example.org/ops", "pay", "stats", "grant 3 is for spiffe://example.org/ops/*"),
        ],
    )
    def test_says_what_is_missing(self, file: str, identity: str, namespace: str, operation: str, nearest: str) -> None:
        done = self.ask(file, identity, namespace, operation)
        assert done.returncode == 1
        first, second, *_ = done.stdout.splitlines()
        assert first == f"denied: no grant allows {identity} to {operation} in {namespace}"
        assert second.strip() == nearest

    def test_omitted_options_match_any_value(self, file: str) -> None:
        done = run_command("grants", "check", file, "--namespace", "pay")
        assert done.returncode == 0
        assert "dns:frontend.pay.svc" in done.stdout
        assert "spiffe://example.org/shop" not in done.stdout
        assert run_command("grants", "check", file, "--namespace", "bank", "--operation", "get").returncode == 1
        assert "3 of 3 grants" in run_command("grants", "check", file).stdout

    def test_shows_limits(self, file: str) -> None:
        with Path(file).open("a", encoding="utf-8") as grants:
            grants.write('[[limit]]\nnamespaces = ["pay", "bank"]\nsessions = 7\nbytes = "1MiB"\n')
        shown = run_command("grants", "check", file).stdout
        assert "pay bank" in shown
        assert "7 sessions, 1MiB bytes" in shown
        report = json.loads(run_command("grants", "check", file, "--json").stdout)
        assert report["limits"] == [{"namespaces": ["pay", "bank"], "sessions": 7, "bytes": 1 << 20}]

    def test_warns_of_a_file_that_denies_every_call(self, tmp_path: Path) -> None:
        empty = tmp_path / "empty.toml"
        empty.touch()
        done = run_command("grants", "check", str(empty))
        assert done.returncode == 0
        assert done.stderr == f"resumed: warning: {empty}: it has no [[grant]], so every call is denied\n"
        report = json.loads(run_command("grants", "check", str(empty), "--json").stdout)
        assert report["warning"] == "it has no [[grant]], so every call is denied"

    def test_knows_the_namespace_that_stats_of_all_need(self, file: str) -> None:
        question = ("grants", "check", file, "--namespace", "*", "--operation", "stats", "--identity")
        assert run_command(*question, "spiffe://example.org/ops/anna").returncode == 0
        assert run_command(*question, "spiffe://example.org/shop").returncode == 1

    def test_tells_programs_too(self, file: str) -> None:
        done = run_command(
            "grants", "check", file, "--identity", "dns:frontend.pay.svc", "--operation", "take", "--json"
        )
        report = json.loads(done.stdout)
        assert done.returncode == 1
        assert (report["allowed"], report["namespace"], report["matching"]) == (False, None, [])
        assert report["nearest"][0]["grant"] == 2
        assert report["nearest"][0]["missing"] == ["operation"]

    def test_refuses_a_file_or_a_question_that_makes_no_sense(self, file: str, tmp_path: Path) -> None:
        path = tmp_path / "bad.toml"
        path.write_text(grant("shop", ["Shop"], ["read"]) + grant("dns:shop", [], ["get"]))
        done = run_command("grants", "check", str(path))
        assert done.returncode == 2
        assert [line.split(": ")[2:4][0] for line in done.stderr.splitlines()] == ["grant 1"] * 3 + ["grant 2"]
        for options in (["--identity", "shop"], ["--namespace", "Shop"], ["--operation", "read"]):
            assert options[0] in complaint(run_command("grants", "check", file, *options))
        assert "No such file" in complaint(run_command("grants", "check", str(tmp_path / "missing")))


def read_settings(target: str, *options: str) -> dict[str, Any]:
    """Return the report of `resumed check --json`."""
    done = run_command("check", target, "--json", *options)
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == max(each["status"] for each in report["checks"])
    assert report["ok"] is (done.returncode == 0)
    return report


def failed_step(target: str, *options: str) -> dict[str, Any]:
    """Return the step that failed: the ones before it are well, the ones behind it were not tried."""
    steps = read_settings(target, *options)["checks"]
    outcomes = [step["outcome"] for step in steps]
    failed = outcomes.index("failed")
    assert outcomes == ["ok"] * failed + ["failed"] + ["not tried"] * (len(steps) - failed - 1)
    step: dict[str, Any] = steps[failed]
    assert step["advice"]
    return step


class TestCheck:
    def test_all_is_well(self, store: RunningServer, tmp_path: Path) -> None:
        run_command("keygen", str(tmp_path / "keys"))
        report = read_settings(store.target, "--keyring", str(tmp_path / "keys"), "--namespace", "shop")
        assert report["ok"], report
        assert [step["name"] for step in report["checks"] if step["milliseconds"] is None] == []
        assert Keyring.load(tmp_path / "keys").key_ids[0] in report["checks"][0]["note"]

    def test_shows_a_table(self, store: RunningServer) -> None:
        done = run_command("check", store.target)
        assert done.returncode == 0, done
        for step in ("connect", "health", "Put", "Get", "Take", "Remove", "Batch", "Watch"):
            assert step in done.stdout

    def test_store_down(self) -> None:
        step = failed_step(f"127.0.0.1:{free_port()}")
        assert step["name"] == "connect"
        assert "no process listens there" in step["note"]

    def test_name_does_not_resolve(self) -> None:
        assert "does not resolve" in failed_step("dns:///store.invalid:7400")["note"]

    def test_missing_socket(self, tmp_path: Path) -> None:
        assert "no such socket" in failed_step(f"unix:{tmp_path}/none.sock")["note"]

    def test_no_answer(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            step = failed_step(f"127.0.0.1:{silent.getsockname()[1]}", "--deadline", "0.3")
        assert "no answer in time" in step["note"]

    def test_port_of_something_else(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other, ThreadPoolExecutor() as pool:

            def hang_up() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        connection, _ = other.accept()
                        with connection:
                            connection.recv(4096)
                            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

            pool.submit(hang_up)
            step = failed_step(f"127.0.0.1:{other.getsockname()[1]}")
            other.shutdown(socket.SHUT_RDWR)
        assert step["name"] == "connect"
        assert "a web server or proxy responds, not the store" in step["note"]

    def test_no_resumed_server(self) -> None:
        with grpc_server() as target:
            step = failed_step(target)
        assert step["name"] == "health"
        assert "not a resumed store" in step["note"]

    def test_not_serving(self) -> None:
        with grpc_server(serving=False) as target:
            step = failed_step(target)
        assert step["name"] == "health"
        assert "NOT_SERVING" in step["note"]

    def test_denied(self) -> None:
        with grpc_server(serving=True, refusal=grpc.StatusCode.PERMISSION_DENIED) as target:
            step = failed_step(target)
        assert step["name"] == "seal and Put"
        assert "no grant allows this" in step["note"]

    @pytest.mark.parametrize(
        ("content", "mode", "problem", "advice"),
        [
            (None, 0o600, "No such file", "resumed keygen"),
            ("not a key\n", 0o600, "line 1: not a key", "resumed keygen"),
            (f"{Keyring.generate()}\n", 0o644, "others may read", "chmod 600"),
        ],
        ids=["missing", "malformed", "open to others"],
    )
    def test_bad_keyring(self, tmp_path: Path, content: str | None, mode: int, problem: str, advice: str) -> None:
        path = tmp_path / "keys"
        if content is not None:
            path.write_text(content)
            path.chmod(mode)
        with pytest.raises(KeyringError):
            Keyring.load(path)
        step = failed_step("127.0.0.1:1", "--keyring", str(path))
        assert step["name"] == "keyring"
        assert problem in step["note"]
        assert advice in step["advice"]

    def test_leaves_nothing_behind(self, tmp_path: Path) -> None:
        with running_server("--storage", f"lmdb://{tmp_path}/store") as server:
            assert read_settings(server.target)["ok"]
        with lmdb.open(f"{tmp_path}/store", max_dbs=8, readonly=True) as env, env.begin() as transaction:
            counts = {}
            for table in (b"sessions", b"expiries", b"tombstones"):
                counts[table] = transaction.stat(env.open_db(table, transaction))["entries"]
        assert counts == {b"sessions": 4, b"expiries": 0, b"tombstones": 4}

    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            ((), "TARGET"),
            (("",), "TARGET"),
            (("here", "--namespace", "Not a name"), "--namespace"),
            (("here", "--deadline", "0"), "--deadline"),
            (("here", "--deadline", "soon"), "--deadline"),
            (("here", "--fast"), "--fast"),
            (("here",), "use host:port"),
            (("here:7400", "--ca", "missing.crt"), "missing.crt"),
        ],
    )
    def test_bad_usage(self, arguments: tuple[str, ...], part: str) -> None:
        assert part in complaint(run_command("check", *arguments))


class TestDemo:
    def test_everything_resumes_that_should(self, tmp_path: Path) -> None:
        done = started("demo", env={**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "100"})
        assert done.returncode == 0, done.stdout + done.stderr
        crossings = re.findall(r"│ *(s_client|Python) *│ *(1\.[23]) *│ *(\w+) *│ *(\w+) *│.*5 of 5", done.stdout)
        assert set(crossings) == {
            (client, version, first, second)
            for client in ("s_client", "Python")
            for version in ("1.2", "1.3")
            for first, second in (("ssl", "pyOpenSSL"), ("pyOpenSSL", "ssl"))
        }
        assert "resumed.install(" in done.stdout
        assert left_behind(tmp_path) == []

    def test_tells_programs_too(self) -> None:
        done = started("demo", "--json")
        found = json.loads(done.stdout)
        assert found["ok"]
        assert [row["reused"] for row in found["crossings"]] == [found["rounds"]] * 12
        assert {row["second"] for row in found["crossings"][8:]} == {"ssl tickets", "pyOpenSSL tickets"}
        assert all(row["reused"] is row["expected"] for row in found["endings"])
        assert found["calls"]["hits"] > 0

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
    @pytest.mark.parametrize("moment", ["serve", "demo.frontend"])
    def test_leaves_nothing_behind_when_interrupted(
        self, tmp_path: Path, number: signal.Signals, status: int, moment: str
    ) -> None:
        process = subprocess.Popen(
            [*RESUMED, "demo"],
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until(lambda: any(moment in command for command in processes_of(tmp_path)))
        if number is signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        assert process.wait(PATIENCE) == status
        assert left_behind(tmp_path) == []

    def test_says_in_one_line_that_pyopenssl_is_missing(self, tmp_path: Path) -> None:
        (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['elftools'] = None\n")
        line = complaint(started("demo", env={**os.environ, "PYTHONPATH": str(tmp_path)}))
        assert "pip install 'resumed[pyopenssl]'" in line


@pytest.mark.parametrize(
    ("shell", "typed", "completed"),
    [
        ("bash", "resumed do", {"doctor"}),
        ("bash", "resumed serve --metr", {"--metrics-listen"}),
        ("bash", "resumed grants ", {"check"}),
        ("fish", "resumed keyg", {"keygen"}),
    ],
)
def test_shells_complete_commands_and_options(shell: str, typed: str, completed: set[str]) -> None:
    asked = {
        "_RESUMED_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(typed.count(" ")),
        "_TYPER_COMPLETE_ARGS": typed,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = started(env={**os.environ, **asked})
    assert {line.split("\t")[0] for line in done.stdout.splitlines()} == completed, done


def test_help_does_not_wait_for_grpc() -> None:
    code = "import sys; from resumed_server import cli; sys.exit('grpc' in sys.modules or 'resumed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", ["keygen", "demo"])
def test_unknown_option(command: str) -> None:
    assert "--nonsense" in complaint(run_command(command, "--nonsense"))


@contextlib.contextmanager
def grpc_server(*, serving: bool | None = None, refusal: grpc.StatusCode | None = None) -> Iterator[str]:
    """Run a gRPC server that is no resumed store; it has a health service where it says whether it serves."""
    server = grpc.server(ThreadPoolExecutor(2))
    if serving is not None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        servicer = health.HealthServicer()
        servicer.set("resumed.v1.SessionStoreService", status)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    if refusal is not None:
        put: Any = grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort(refusal, "no"))
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("resumed.v1.SessionStoreService", {"Put": put}),)
        )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def processes_of(directory: Path) -> list[str]:
    commands = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            commands.append(file.read_text().replace("\0", " "))
    return [command for command in commands if str(directory) in command]


def left_behind(directory: Path) -> list[str]:
    return [*processes_of(directory), *map(str, directory.iterdir())]
