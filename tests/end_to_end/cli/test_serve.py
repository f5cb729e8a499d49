"""`resumed serve` from the operator's view: rejected settings, shutdown, and failures of workers."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import stat
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
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
from support.mtls import Authority, Files, grant
from support.mtls import channel as trusted
from support.raw_http2 import Raw, open_socket
from support.server import PATIENCE, running_server, start_server
from support.serving import complaints_of, is_alive, open_channel
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable


AUTHORITY = Authority()


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
    with running_server("--storage", f"lmdb://{store}", workers=workers) as server, open_channel(server) as channel:
        answer = SessionStoreServiceStub(channel).Get(pb.GetRequest(namespace="shop", key=b"k"), timeout=5)
        assert not answer.HasField("session")
    assert any(starts_with(file, b"garbage") for file in tmp_path.rglob("*") if file.is_file())


def starts_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def wipe(store: Path) -> None:
    """Leave the first two pages of a database and nothing that they point to."""
    with (store / "data.mdb").open("r+b") as file:
        file.seek(8_192)
        file.write(bytes(8 << 20))


def test_damage_found_while_serving_ends_the_server_with_status_1(tmp_path: Path) -> None:
    """Systemd or Kubernetes then restarts it with a new database."""
    options = ("--storage", f"lmdb://{tmp_path}/store")
    with running_server(*options) as server:
        wipe(tmp_path / "store")
        assert server.wait() == 1
        assert [line["event"] for line in server.log_lines()][-3:] == ["not ready", "draining", "stopped"]
    with running_server(*options) as server, open_channel(server) as channel:
        SessionStoreServiceStub(channel).Get(pb.GetRequest(namespace="shop", key=b"k"), timeout=PATIENCE)


def crash(process: int, _store: Path) -> None:
    os.kill(process, signal.SIGSEGV)


def damage(_process: int, store: Path) -> None:
    wipe(store)


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
            with open_channel(server) as channel:
                request = pb.GetRequest(namespace="shop", key=b"k")
                answer = SessionStoreServiceStub(channel).Get(request, timeout=PATIENCE)
                assert not answer.HasField("session")
        assert server.stop() == 0


# --- Where it listens ----------------------------------------------------------------------------------------------


def test_it_listens_on_several_addresses_and_logs_the_ports(tmp_path: Path, transport: str) -> None:
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
        (line,) = complaints_of("--listen", f"unix:{path}")
        assert "another process listens there" in line
        server.kill()
    assert path.exists()
    with running_server("--transport", transport, listen=f"unix:{path}"):
        pass
    path.write_text("precious")
    (line,) = complaints_of("--listen", f"unix:{path}")
    assert "not a socket" in line
    assert path.read_text() == "precious"


# --- How it stops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_that_was_stopped_and_continued_serves_on(workers: int) -> None:
    """An unrelated signal interrupts the wait for a signal."""
    with running_server(workers=workers) as server:
        with open_channel(server) as channel:
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
    with running_server("--transport", transport, "--shutdown-delay", "1s") as server, open_channel(server) as channel:
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


def test_a_watcher_can_distinguish_a_rollout_from_an_outage(transport: str) -> None:
    with running_server("--transport", transport, "--shutdown-delay", "0s") as server, open_channel(server) as channel:
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
        with open_channel(server) as channel:
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
        with open_channel(server) as channel:
            SessionStoreServiceStub(channel).Put(request, timeout=5)
        victim = server.wait_for_log("ready", 2)[0]["process"]
        os.kill(victim, signal.SIGKILL)
        server.wait_for_log("ready", 3)
        (died,) = server.log_lines("worker died")
        assert (died["worker"], died["status"]) == (victim, -signal.SIGKILL)
        for _ in range(8):
            with open_channel(server) as channel:
                answer = SessionStoreServiceStub(channel).Get(pb.GetRequest(namespace="shop", key=b"k"), timeout=5)
                assert answer.session.value == b"sealed"
        assert server.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_sighup_ends_nothing(workers: int) -> None:
    """Operators send it to reload files, which the server does anyway."""
    with running_server(workers=workers) as server, open_channel(server) as channel:
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
        assert all(map(is_alive, workers))
        server.process.kill()
        until(lambda: not any(map(is_alive, workers)))


def test_unread_health_streams_delay_nothing(tmp_path: Path) -> None:
    shop, watch = "spiffe://example.org/shop", "/grpc.health.v1.Health/Watch"
    caller = AUTHORITY.issue(shop)
    files = Files(tmp_path).write(AUTHORITY.server(), AUTHORITY.pem, grant(shop, ["*"], ["get"]))
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running_server(*files.options, "--health-listen", "127.0.0.1:0"))
        (probed,) = server.log_lines("listening")[0]["health"]
        unread = stack.enter_context(Raw(open_socket(probed)))
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
            until(lambda: not allowed())
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
    assert not any(map(is_alive, workers))
    assert not list(tmp_path.iterdir())


def patch_module(directory: Path, code: str) -> dict[str, str]:
    """Return the environment of a server that runs `code` before anything else."""
    (directory / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])}


def test_a_server_on_a_grpcio_that_is_not_as_expected_serves_and_says_so(tmp_path: Path, transport: str) -> None:
    code = "from resumed_server.rpc._grpcio_private import HandlerArgs\nHandlerArgs.parse = lambda _arguments: None\n"
    options = ("--transport", transport, "--threads", "2")
    with (
        running_server(*options, workers=2, env=patch_module(tmp_path, code)) as server,
        open_channel(server) as channel,
    ):
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
    with (
        running_server("--transport", transport, env=patch_module(tmp_path, code)) as server,
        open_channel(server) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)

        def serves(service: str) -> bool:
            request = health_pb2.HealthCheckRequest(service=service)
            return bool(health.Check(request, timeout=PATIENCE).status == health_pb2.HealthCheckResponse.SERVING)

        until(lambda: serves("live"))
        (tmp_path / "hang").touch()
        until(lambda: not serves("live"))
        assert serves("")
        server.kill()


def _race(target: str, keys: list[bytes]) -> list[bytes]:
    """Take all sessions on a connection of its own, and return the keys of those that were received."""
    with grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = SessionStoreServiceStub(channel)
        mine = []
        for start in range(0, len(keys), 50):
            calls = [
                (key, stub.Take.future(pb.TakeRequest(namespace="race", key=key))) for key in keys[start : start + 50]
            ]
            mine += [key for key, call in calls if call.result(PATIENCE).HasField("session")]
        return mine


def test_ten_thousand_takes_raced_by_eight_clients_hand_each_session_out_once(transport: str) -> None:
    keys = [uuid.uuid4().bytes for _ in range(1_250)]
    with running_server("--transport", transport, workers=2) as server:
        with open_channel(server) as channel:
            stub = SessionStoreServiceStub(channel)
            for start in range(0, len(keys), 250):
                batch = pb.BatchRequest()
                for key in keys[start : start + 250]:
                    put = batch.operations.add().put
                    put.namespace, put.key, put.value = "race", key, b"sealed"
                    put.ttl.FromSeconds(600)
                assert {result.WhichOneof("result") for result in stub.Batch(batch).results} == {"put"}
        with ThreadPoolExecutor(8) as clients:
            winnings = clients.map(_race, [server.target] * 8, [keys] * 8)
            assert sorted(key for winning in winnings for key in winning) == sorted(keys)
