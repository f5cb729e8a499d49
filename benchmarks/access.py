"""The cost of TLS and grants for a Get: `python benchmarks/access.py`.

Servers of one process each, which differ in their access control only, answer the same client in turns, over one
connection. The figures are the CPU time of the server's process per call: other processes distort the wall clock.
"""

# ruff: noqa: T201 - the script prints its figures
from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

from benchmarks.measuring import cpu_seconds
from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from resumed_server.auth import tls
from resumed_server.auth.authorizer import GrantsAuthorizer
from resumed_server.auth.grants import watch_file
from resumed_server.auth.tls import ServerCertificates
from resumed_server.limits.enforcer import LimitEnforcer
from support.mtls import Authority, Files, channel, grant
from support.server import running_server

if TYPE_CHECKING:
    from support.server import RunningServer

SHOP = "spiffe://example.org/shop"
OTHER_GRANTS = 100
"""Grants before the relevant one: the server caches its decision, so they must cost nothing."""
KEY = b"k" * 32


def measure_authorization(authority: Authority, grants: str) -> list[float]:
    """Return the durations of an authorization within a call over TLS, in microseconds, sorted."""
    durations = []
    with tempfile.TemporaryDirectory() as directory:
        files = Files(Path(directory)).write(authority.server(), authority.pem, grants)
        certificates = tls.watch_files(*files.options[1:6:2])
        granted = watch_file(files.options[7])
        authorizer = GrantsAuthorizer(granted, LimitEnforcer(None, granted))

        def get(_request: bytes, context: grpc.ServicerContext) -> bytes:
            for _ in range(200):
                started = time.perf_counter()
                for _ in range(100):
                    authorizer.authenticate(context).authorize("get", "shop")
                durations.append((time.perf_counter() - started) / 100 * 1e6)
            return b""

        server = grpc.server(ThreadPoolExecutor(1))
        server.add_registered_method_handlers("measured", {"Get": grpc.unary_unary_rpc_method_handler(get)})
        port = server.add_secure_port("127.0.0.1:0", ServerCertificates(certificates, renewal=600).for_listener())
        server.start()
        with channel(f"127.0.0.1:{port}", authority.pem, authority.issue(SHOP)) as connection:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = connection.unary_unary("/measured/Get")
            call(b"")
        server.stop(None)
    return sorted(durations)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=5_000, help="calls in a round, at each server")
    arguments = parser.parse_args()
    authority = Authority()
    pem = authority.issue(SHOP)
    grants = "".join(grant(f"spiffe://example.org/other-{n}", ["*"], ["get"]) for n in range(OTHER_GRANTS))
    grants += grant(SHOP, ["shop"], ["put", "get"])
    authorization = measure_authorization(authority, grants)
    print(f"authorization: {statistics.median(authorization):.2f} us ({authorization[0]:.2f} at best), within a call")
    kinds: dict[str, tuple[RunningServer, SessionStoreServiceStub]] = {}
    with contextlib.ExitStack() as exit_stack:
        for kind in ("plaintext", "mutual TLS", "mutual TLS and grants"):
            files = Files(Path(exit_stack.enter_context(tempfile.TemporaryDirectory())))
            if kind != "plaintext":
                files.write(authority.server(), authority.pem, grants if "grants" in kind else None)
            server = exit_stack.enter_context(running_server(*files.options))
            grpc_channel = (
                grpc.insecure_channel(server.target)
                if kind == "plaintext"
                else channel(server.target, authority.pem, pem)
            )
            stub = SessionStoreServiceStub(exit_stack.enter_context(grpc_channel))
            put = pb.PutRequest(namespace="shop", key=KEY, value=b"v" * 300)
            put.ttl.FromSeconds(3_600)
            stub.Put(put)
            kinds[kind] = server, stub
        durations: dict[str, list[float]] = {kind: [] for kind in kinds}
        request = pb.GetRequest(namespace="shop", key=KEY)
        for _ in range(arguments.rounds):
            for kind, (server, stub) in kinds.items():
                before = cpu_seconds([server.process.pid])
                for _ in range(arguments.calls):
                    stub.Get(request)
                durations[kind].append((cpu_seconds([server.process.pid]) - before) / arguments.calls * 1e6)
    for kind, figures in durations.items():
        ratios = [mine / base for mine, base in zip(figures, durations["mutual TLS"], strict=True)]
        print(
            f"{kind:<22} {statistics.median(figures):6.1f} us a Get ({min(figures):.1f} to {max(figures):.1f}), "
            f"{statistics.median(ratios):.3f} times mutual TLS ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
