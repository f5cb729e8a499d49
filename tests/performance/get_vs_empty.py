"""Unary Get of the running server against an empty grpcio handler: `python tests/performance/get_vs_empty.py`.

Both are real processes with the same gRPC options and as many threads, pinned to one core; h2load drives them in
turns from another. The server looks up a stored session each time, the empty handler answers an empty message.
"""

# ruff: noqa: T201 - it prints what it measured
from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

sys.path.insert(0, str(Path(__file__).parents[1]))

from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Iterator

TARGET_RATIO = 0.85
KEY = b"k" * 32
SERVICE = "resumed.v1.SessionStoreService"


def empty(request: pb.GetRequest, context: grpc.ServicerContext) -> pb.GetResponse:
    """Answer without doing anything."""
    return pb.GetResponse()


def serve_empty(threads: int) -> None:
    """Run the empty handler until standard input closes."""
    from resumed_server.app import OPTIONS

    server = grpc.server(ThreadPoolExecutor(threads), options=[*OPTIONS.items()])
    handler = grpc.unary_unary_rpc_method_handler(empty, pb.GetRequest.FromString, pb.GetResponse.SerializeToString)
    server.add_registered_method_handlers(SERVICE, {"Get": handler})
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    sys.stdin.read()
    server.stop(None)


@contextlib.contextmanager
def running_empty(threads: int) -> Iterator[str]:
    """Run the empty handler in a process of its own and yield its target."""
    command = [sys.executable, __file__, "--empty", "--threads", str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield f"127.0.0.1:{process.stdout.readline().strip()}"
        assert process.stdin
        process.stdin.close()


def rate(target: str, calls: int, body: str, cores: set[int]) -> float:
    """Return the calls a second that `target` answers."""
    command = ["h2load", "-n", str(calls), "-c", "8", "-m", "8", "-d", body]
    command += ["-H", "content-type: application/grpc", "-H", "te: trailers", f"http://{target}/{SERVICE}/Get"]
    report = subprocess.run(
        command, check=True, capture_output=True, text=True, preexec_fn=lambda: os.sched_setaffinity(0, cores)
    ).stdout
    assert f"{calls} succeeded" in report, report
    found = re.search(r"([\d.]+) req/s", report)
    assert found, report
    return float(found[1])


def main() -> int:
    """Measure, print, and return 0 if the target is reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=6_000, help="calls in each round")
    parser.add_argument("--threads", type=int, default=0, help="threads of both servers (default: the server's own)")
    parser.add_argument("--value", type=int, default=1_000, help="bytes in the session that is looked up")
    parser.add_argument("--empty", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.threads:
        from resumed_server.config import Settings

        options.threads = Settings.verified().threads
    if options.empty:
        serve_empty(options.threads)
        return 0
    if not shutil.which("h2load"):
        sys.exit("get_vs_empty: h2load is missing; apt-get install nghttp2-client")
    cores = sorted(os.sched_getaffinity(0))
    server_core, client_cores = {cores[0]}, set(cores[1:]) or set(cores)
    message = pb.GetRequest(namespace="shop", key=KEY).SerializeToString()
    with tempfile.NamedTemporaryFile() as body, contextlib.ExitStack() as held:
        body.write(struct.pack(">BI", 0, len(message)) + message)
        body.flush()
        os.sched_setaffinity(0, server_core)
        server = held.enter_context(running_server("--threads", str(options.threads)))
        empty = held.enter_context(running_empty(options.threads))
        os.sched_setaffinity(0, cores)
        with grpc.insecure_channel(server.target) as channel:
            request = pb.PutRequest(namespace="shop", key=KEY, value=bytes(options.value))
            request.ttl.FromSeconds(3_600)
            SessionStoreServiceStub(channel).Put(request, wait_for_ready=True, timeout=10)
        rates: dict[str, list[float]] = {"empty": [], "get": []}
        for target in (empty, server.target):
            rate(target, options.calls // 4, body.name, client_cores)
        for _ in range(options.rounds):
            rates["empty"].append(rate(empty, options.calls, body.name, client_cores))
            rates["get"].append(rate(server.target, options.calls, body.name, client_cores))
    ratios = [get / nothing for get, nothing in zip(rates["get"], rates["empty"], strict=True)]
    for name, figures in rates.items():
        print(f"{name:5} {statistics.median(figures):7,.0f} calls/s ({min(figures):,.0f} to {max(figures):,.0f})")
    ratio = statistics.median(ratios)
    print(
        f"ratio {ratio:7.3f} ({min(ratios):.3f} to {max(ratios):.3f}), {options.threads} threads, target {TARGET_RATIO}"
    )
    return int(ratio < TARGET_RATIO)


if __name__ == "__main__":
    sys.exit(main())
