"""`resumed top` with a running server and a frontend."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import prometheus_client
import pytest

import resumed
import resumed.prometheus
from support.server import PATIENCE, running_server
from support.tls import VERSIONS, Client, Frontend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.server import RunningServer

TOP = (sys.executable, "-m", "resumed_server", "top")


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server("--metrics-listen", "127.0.0.1:0", workers=2) as server:
        yield server


def top(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*TOP, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert "Traceback" not in done.stderr
    return done


def endpoint(server: RunningServer) -> str:
    address: str = server.log_lines("listening")[0]["metrics"][0]
    return address


def test_live_traffic_is_shown_by_store_worker_and_namespace(server: RunningServer) -> None:
    registry, client = prometheus_client.CollectorRegistry(), Client(VERSIONS[0])
    frontend = Frontend("ssl", server.target, resumed.Keyring.from_keys([os.urandom(32)]))
    resumed.prometheus.export(frontend.shim, registry)
    exporter, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
    stopped = threading.Event()

    def come_and_go() -> None:
        session = client.visit(frontend).session
        while not stopped.is_set():
            client.visit(frontend, session)

    traffic = threading.Thread(target=come_and_go)
    traffic.start()
    ports = (endpoint(server), f"127.0.0.1:{exporter.server_port}")
    try:
        done = top(*ports, "--interval", "1200ms", "--count", "1", "--json")
        shown = top(*ports, "--interval", "1200ms", "--count", "1")
    finally:
        stopped.set()
        traffic.join()
        exporter.shutdown()
        exporter.server_close()
        thread.join()
        frontend.shim.uninstall()
    reports: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    (report,) = reports
    (store,) = report["stores"]
    assert store["up"] and store["calls"] > 0 and store["failed"] == 0  # noqa: PT018 - one fact
    assert store["sessions"] is not None
    assert [worker["worker"] for worker in report["workers"]] == ["0", "1"]
    (shop,) = [each for each in report["namespaces"] if each["namespace"] == "shop"]
    assert shop["resumed"] > 0
    assert (shop["namespace"], shop["hit_rate"], shop["foreign"], shop["breakers_open"]) == ("shop", 1.0, 0.0, 0)
    assert shop["lookup_p99"] > 0
    assert re.search(r"shop +1 +[\d,]+ +100.0% +0.0%", shown.stdout), shown.stdout
    assert shown.stdout.count(endpoint(server)) == 4


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        (("127.0.0.1:1",), 3, "http://127.0.0.1:1/metrics Connection refused; start the store with --metrics-listen"),
        (("here",), 2, "ENDPOINT: 'here'"),
        (("127.0.0.1:1", "--interval", "1"), 2, "--interval"),
        (("127.0.0.1:1", "--interval", "2h"), 2, "--interval"),
        (("127.0.0.1:1", "--count", "0"), 2, "--count"),
    ],
)
def test_an_endpoint_that_cannot_be_scraped_is_one_line(arguments: tuple[str, ...], status: int, part: str) -> None:
    done = top(*arguments)
    assert done.returncode == status
    (line,) = done.stderr.splitlines()
    assert line.startswith("resumed: ")
    assert part in line


def test_an_endpoint_without_metrics_of_resumed_is_shown_beside_the_others(server: RunningServer) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        url = f"127.0.0.1:{other.server_port}"
        done = top(url, endpoint(server), "--interval", "100ms", "--count", "1", "--json")
        other.shutdown()
        thread.join()
    assert json.loads(done.stdout)["unreachable"] == {
        f"http://{url}/metrics": "answers with HTTP status 404; correct the address"
    }
