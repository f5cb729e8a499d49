"""A grpcio server whose Get does nothing, in a process of its own: the cost of a call without a store."""

# ruff: noqa: T201 - the server prints its port
from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from resumed.v1 import session_store_pb2 as pb
from resumed_server.rpc.server import OPTIONS, build_grpc_server

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVICE = "resumed.v1.SessionStoreService"


def return_empty(request: pb.GetRequest, context: grpc.ServicerContext) -> pb.GetResponse:
    """Return an empty response."""
    return pb.GetResponse()


def serve(threads: int, executor: str) -> None:
    """Run until standard input closes."""
    server = (
        build_grpc_server(threads, shared=False)
        if executor == "store"
        else grpc.server(ThreadPoolExecutor(threads), options=[*OPTIONS.items()])
    )
    handler = grpc.unary_unary_rpc_method_handler(
        return_empty, pb.GetRequest.FromString, pb.GetResponse.SerializeToString
    )
    server.add_registered_method_handlers(SERVICE, {"Get": handler})
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    sys.stdin.read()
    server.stop(None)


@contextlib.contextmanager
def run_empty_server(threads: int, executor: str = "store") -> Iterator[tuple[str, int]]:
    """Run the server, on the store's executor or on one of the standard library; yield target and process id."""
    command = [sys.executable, __file__, "--threads", str(threads), "--executor", executor]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield f"127.0.0.1:{process.stdout.readline().strip()}", process.pid
        assert process.stdin
        process.stdin.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--executor", choices=("store", "grpcio"), required=True)
    options = parser.parse_args()
    serve(options.threads, options.executor)
