"""The private names of the installed grpcio, and servers without them."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from structlog.testing import capture_logs

from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub, add_SessionStoreServiceServicer_to_server
from resumed_server.rpc import _grpcio_private as private_grpcio
from resumed_server.rpc import selftest
from resumed_server.rpc._grpcio_private import HandlerArgs, missing_names
from resumed_server.rpc.delay_queue import DelayedRejection
from resumed_server.rpc.selftest import IncompatibleGrpcio, check_grpcio, is_grpcio_compatible
from resumed_server.rpc.server import build_grpc_server
from resumed_server.rpc.session_service import SessionStoreService
from resumed_server.storage.lmdb.engine import LmdbEngine
from resumed_server.watch.hub import WatchHub
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 20.0


def test_the_installed_grpcio_is_compatible() -> None:
    """All names exist, the calls of the self-test succeed, and no thread remains."""
    assert missing_names() == []
    before = threading.active_count()
    with capture_logs() as logged:
        assert is_grpcio_compatible()
    assert not logged
    until(lambda: threading.active_count() <= before + 1)  # grpcio's own client keeps one


def one_argument_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handler functions have one more argument."""
    of = HandlerArgs.parse
    monkeypatch.setattr(HandlerArgs, "parse", lambda arguments: of((*arguments, None)))


def another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls have another handler function."""
    monkeypatch.setattr(private_grpcio, "_HANDLER_FUNCTIONS", [])


def another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function that waits for a message has another name."""
    monkeypatch.setattr(private_grpcio, "_UNARY_REQUEST", "another")


def a_name_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the names does not exist."""
    monkeypatch.setitem(private_grpcio._NAMES, "grpc._server", ("_receive_message", "_gone"))


def a_module_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the modules does not exist."""
    monkeypatch.setitem(private_grpcio._NAMES, "grpc._gone", ("name",))


def another_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """A private function has other arguments: the call fails in grpcio's own thread, and ends the thread."""
    monkeypatch.setattr(HandlerArgs, "start_receiving", lambda _answering: None)


def message_never_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrival of a message has no effect."""
    start_receiving = HandlerArgs.start_receiving
    monkeypatch.setattr(
        HandlerArgs, "start_receiving", lambda answering, _arrived: start_receiving(answering, lambda: None)
    )


def rejected_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another exception ends the call whose rejection is delayed."""
    monkeypatch.setattr(DelayedRejection, "__init__", lambda *_: (_ for _ in ()).throw(ValueError))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of grpcio's thread
@pytest.mark.parametrize(
    "change",
    [
        one_argument_more,
        another_function,
        another_name,
        a_name_is_gone,
        a_module_is_gone,
        another_signature,
        message_never_queued,
        rejected_at_once,
    ],
    ids=lambda change: change.__name__,
)
def test_an_incompatible_grpcio_is_detected_and_logged_once(
    change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "STEP_SECONDS", 1.0)
    change(monkeypatch)
    with pytest.raises(IncompatibleGrpcio):
        check_grpcio()
    with capture_logs() as logged:
        assert not is_grpcio_compatible()
    (line,) = logged
    assert (line["log_level"], line["version"]) == ("critical", grpc.__version__)


@contextlib.contextmanager
def store(server: grpc.Server) -> Iterator[SessionStoreServiceStub]:
    """Serve a store with `server`; yield a client."""
    with contextlib.closing(LmdbEngine(None, capacity=8 << 20)) as engine:
        watchers = WatchHub(engine)
        add_SessionStoreServiceServicer_to_server(SessionStoreService(engine, watchers, 3_600.0), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield SessionStoreServiceStub(channel)
        watchers.close()
        server.stop(None).wait(PATIENCE)


def test_without_private_names_watchers_occupy_no_thread_of_other_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HandlerArgs, "parse", lambda _arguments: None)
    with store(build_grpc_server(2, shared=False, use_executor=False)) as stub:
        watches = [stub.Watch(pb.WatchRequest(namespace="shop"), timeout=PATIENCE) for _ in range(8)]
        assert all(next(watch).live for watch in watches)
        put = pb.PutRequest(namespace="shop", key=b"k", value=b"v")
        put.ttl.seconds = 60
        stub.Put(put, timeout=PATIENCE)
        assert stub.Get(pb.GetRequest(namespace="shop", key=b"k"), timeout=PATIENCE).session.value == b"v"
        assert all(next(each for each in watch if each.events) for watch in watches)


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
def test_without_private_names_rejections_are_not_delayed(kind: str) -> None:

    def refuse(_request: bytes, _context: grpc.ServicerContext) -> bytes:
        raise DelayedRejection(3_600.0, lambda context: context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "later"))

    def refuse_stream(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield refuse(request, context)

    server = build_grpc_server(1, shared=False, use_executor=False)
    method: Any = refuse_stream if kind.endswith("stream") else refuse
    handler = getattr(grpc, f"{kind}_rpc_method_handler")(method, bytes, bytes)
    server.add_registered_method_handlers("test.Service", {"Call": handler})
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as refused:
                list(getattr(channel, kind)("/test.Service/Call")(b"", timeout=PATIENCE))
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    server.stop(None).wait(PATIENCE)
