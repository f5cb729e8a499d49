"""A server in this process that can lie, hang and count, which no real server can."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc

from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceServicer, add_SessionStoreServiceServicer_to_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PROBE = b"resumed/v1 probe"


class Liar(SessionStoreServiceServicer):
    """Keeps sessions in a dictionary.

    Attributes:
        target: Where it listens.
        spoil: Returns the value to respond with, from key and value.
        lookups: The keys of all lookups, except probes.
    """

    def __init__(self) -> None:
        self.target = ""
        self.spoil: Callable[[bytes, bytes], bytes] = lambda _key, value: value
        self.lookups: list[bytes] = []
        self._sessions: dict[bytes, bytes] = {}
        self._goes_on = threading.Event()
        self._goes_on.set()

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """Answer nothing inside the with block."""
        self._goes_on.clear()
        try:
            yield
        finally:
            self._goes_on.set()

    def Get(self, request: pb.GetRequest, context: Any) -> pb.GetResponse:  # noqa: N802
        """Look up; every call of the contract may come in a Batch as well."""
        self._goes_on.wait()
        if request.key != _PROBE:
            self.lookups.append(request.key)
        value = self._sessions.get(request.key)
        if value is None:
            return pb.GetResponse()
        session = pb.StoredSession(value=self.spoil(request.key, value))
        session.ttl.seconds = 60
        return pb.GetResponse(session=session)

    def Put(self, request: pb.PutRequest, context: Any) -> pb.PutResponse:  # noqa: N802
        """Store."""
        self._goes_on.wait()
        self._sessions[request.key] = request.value
        return pb.PutResponse(ttl=request.ttl)

    def Take(self, request: pb.TakeRequest, context: Any) -> pb.TakeResponse:  # noqa: N802
        """Look up and remove."""
        answer = self.Get(pb.GetRequest(namespace=request.namespace, key=request.key), context)
        self._sessions.pop(request.key, None)
        return pb.TakeResponse(session=answer.session if answer.HasField("session") else None)

    def Remove(self, request: pb.RemoveRequest, context: Any) -> pb.RemoveResponse:  # noqa: N802
        """Remove."""
        self._goes_on.wait()
        return pb.RemoveResponse(removed=self._sessions.pop(request.key, None) is not None)

    def Watch(self, request: pb.WatchRequest, context: Any) -> Iterator[pb.WatchResponse]:  # noqa: N802
        """Be no store that can be watched."""
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")
        yield pb.WatchResponse()

    def Batch(self, request: pb.BatchRequest, context: Any) -> pb.BatchResponse:  # noqa: N802
        """Do all of it."""
        results = []
        for operation in request.operations:
            match operation.WhichOneof("operation"):
                case "put":
                    results.append(pb.BatchResult(put=self.Put(operation.put, context)))
                case "get":
                    results.append(pb.BatchResult(get=self.Get(operation.get, context)))
                case "take":
                    results.append(pb.BatchResult(take=self.Take(operation.take, context)))
                case _:
                    results.append(pb.BatchResult(remove=self.Remove(operation.remove, context)))
        return pb.BatchResponse(results=results)

    def has(self, key: bytes) -> bool:
        """Return whether a session is stored."""
        return key in self._sessions


@contextlib.contextmanager
def lying_store() -> Iterator[Liar]:
    """Serve a Liar on a free port."""
    liar = Liar()
    with ThreadPoolExecutor(32) as pool:
        server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
        add_SessionStoreServiceServicer_to_server(liar, server)
        liar.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield liar
        finally:
            server.stop(None).wait()
