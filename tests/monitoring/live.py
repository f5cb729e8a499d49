"""Runs two stores, frontends, clients and a Prometheus, and runs every query of the dashboards: each returns data.

Frontends use the store with LMDB; the other one, with Valkey, has no clients.

With `--pictures DIRECTORY` it runs for longer, stops the server for a while, and draws the dashboards from
Prometheus' data, and `resumed top`. The panels are drawn by matplotlib: the queries are Grafana's, the looks are not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy/grafana"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import dashboards
from rich.console import Console

from resumed_server.cli.keyring.keygen import keygen
from resumed_server.cli.top.command import report
from resumed_server.cli.top.metrics_client import Period, Scrape, scrape_all
from resumed_server.cli.top.view import build_view
from support.frontend import running_frontend
from support.mtls import Authority, Files
from support.redis import valkey_server
from support.server import PATIENCE, RunningServer, running_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FRONTENDS = ("shop", "shop", "pay", "mail")
"""The namespaces of the frontends; those of `mail` share tickets."""
RATE = "10s"
"""Value of Grafana's $__rate_interval for scrapes every second."""

TARGET_LABELS = {name: f"of-the-{name}" for name in ("namespace", "pod", "service", "container", "endpoint")}
"""Labels that a ServiceMonitor gives to the targets; Prometheus renames those of metrics that have the same name."""

Series = list[tuple[str, list[float], list[float]]]
"""Legend, times and values."""


class Prometheus:
    """A Prometheus that scrapes `targets` every second."""

    def __init__(self, directory: Path, targets: Sequence[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._address = f"127.0.0.1:{free.getsockname()[1]}"
        (directory / "prometheus.yml").write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                    "rule_files": [str(Path(__file__).parents[2] / "deploy/prometheus/alerts.yaml")],
                    "scrape_configs": [
                        {"job_name": "resumed", "static_configs": [{"targets": list(targets), "labels": TARGET_LABELS}]}
                    ],
                }
            )
        )
        self._process = subprocess.Popen(
            [
                *("prometheus", f"--config.file={directory}/prometheus.yml", f"--web.listen-address={self._address}"),
                f"--storage.tsdb.path={directory}/data",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(PATIENCE)

    def labels(self) -> set[str]:
        """Return the names of all labels."""
        with urllib.request.urlopen(f"http://{self._address}/api/v1/labels", timeout=PATIENCE) as answer:
            return set(json.load(answer)["data"])

    def ask(self, query: str, legend: str, start: float, end: float) -> Series:
        """Return the results of a panel's query for every second of a period."""
        query = query.replace(dashboards.RANGE, RATE)
        for variable in ("$instance", "$job", "$namespace"):
            query = query.replace(variable, ".*")
        asked = urllib.parse.urlencode({"query": query, "start": start, "end": end, "step": "1"})
        with urllib.request.urlopen(f"http://{self._address}/api/v1/query_range?{asked}", timeout=PATIENCE) as answer:
            found = json.load(answer)["data"]["result"]
        series: Series = []
        for each in found:
            name = legend
            for label, value in each["metric"].items():
                name = name.replace(f"{{{{{label}}}}}", value)
            times, values = zip(*each["values"], strict=True)
            series.append((name, [moment - start for moment in times], [float(value) for value in values]))
        return series


@contextlib.contextmanager
def secured_server(directory: Path) -> Iterator[tuple[RunningServer, list[str]]]:
    """Run a store with TLS and limits; yield it, and the options with which frontends connect."""
    authority = Authority()
    files = Files(directory).write(authority.server(), authority.pem)
    client = authority.issue("spiffe://example.org/frontend")
    (directory / "client.pem").write_bytes(client.certificate + client.key)
    options = ("--metrics-listen", "127.0.0.1:0", "--namespace-sessions", "1000000")
    with running_server(*files.options, *options, workers=2) as store:
        target = store.target.replace("127.0.0.1", "localhost")
        yield store, ["--target", target, "--ca", f"{directory}/ca.crt", "--cert", f"{directory}/client.pem"]


@contextlib.contextmanager
def frontends(connection: Sequence[str], directory: Path) -> Iterator[list[dict[str, int]]]:
    """Run a frontend for each of FRONTENDS; yield their ports."""
    keygen(str(directory / "keys"))
    with contextlib.ExitStack() as held:
        yield [
            held.enter_context(
                running_frontend(
                    directory,
                    *(*connection, "--namespace", namespace, "--keyring", str(directory / "keys")),
                    *(["--mirror"] if namespace == "pay" else []),
                    *(["--sessions", "tickets", "--tickets-tls12"] if namespace == "mail" else []),
                )
            )
            for namespace in FRONTENDS
        ]


@contextlib.contextmanager
def clients(*groups: Sequence[int], seconds: float) -> Iterator[None]:
    """Have clients visit the ports of each group in turn, for some seconds."""
    with contextlib.ExitStack() as held:
        for group in groups:
            command = [sys.executable, "-m", "resumed_server", "bench", *(f"localhost:{port}" for port in group)]
            command += ["--insecure", "--connections", "2", "--clients", "40", "--processes", "1", "--resume", "85"]
            process = subprocess.Popen(
                [*command, "--duration", f"{seconds:.0f}s"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            held.callback(process.wait, PATIENCE + seconds)
            held.callback(process.terminate)
        yield


def observe(directory: Path, seconds: float, outage: float) -> tuple[dict[str, list[Series]], Any]:
    """Let all run, without the store for some seconds; return each panel's series, and what `resumed top` shows."""
    with (
        secured_server(directory) as (store, connection),
        valkey_server() as valkey,
        running_server("--storage", valkey.url, "--metrics-listen", "127.0.0.1:0") as other,
        frontends(connection, directory) as ports,
    ):
        stores = [each.log_lines("listening")[0]["metrics"][0] for each in (store, other)]
        scraped = [*stores, *(f"127.0.0.1:{each['metrics']}" for each in ports)]
        shop, pay, mail = [
            [each["port"] for each, name in zip(ports, FRONTENDS, strict=True) if name == wanted]
            for wanted in ("shop", "pay", "mail")
        ]
        with contextlib.closing(Prometheus(directory, scraped)) as prometheus:
            start = time.time()
            with clients(shop, shop[:1], pay, mail, seconds=seconds + outage):
                time.sleep(seconds / 2)
                urls = [f"http://{each}/metrics" for each in scraped]
                before = scrape_all(urls)
                time.sleep(5)
                after = scrape_all(urls)
                if outage:
                    workers = list(
                        map(
                            int,
                            Path(f"/proc/{store.process.pid}/task/{store.process.pid}/children").read_text().split(),
                        )
                    )
                    for worker in workers:
                        os.kill(worker, signal.SIGSTOP)
                    time.sleep(outage)
                    for worker in workers:
                        os.kill(worker, signal.SIGCONT)
                time.sleep(max(0.0, seconds / 2 - 5))
            end = time.time()
            if renamed := [label for label in prometheus.labels() if label.startswith("exported_")]:
                raise SystemExit(f"labels of metrics that are those of targets: {', '.join(renamed)}")
            panels = {
                name: [
                    [
                        series
                        for legend, query in panel.queries.items()
                        for series in prometheus.ask(query, legend, start, end)
                    ]
                    for panel in panels
                ]
                for name, panels in dashboards.DASHBOARDS.items()
            }
    periods = {
        url: Period(was, found)
        for url, found in after.items()
        if isinstance(found, Scrape) and isinstance(was := before[url], Scrape)
    }
    return panels, build_view(report(periods, {}))


def draw(name: str, found: Sequence[Series], path: Path) -> None:
    """Draw a dashboard."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, PercentFormatter

    formats: dict[str, Any] = {
        "s": EngFormatter("s"),
        "bytes": EngFormatter("B"),
        "percentunit": PercentFormatter(1.0),
        "cps": FuncFormatter(lambda value, _: f"{value:g}/s"),
        "short": EngFormatter(""),
    }
    with rc_context({"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "resumed"}):
        rows = math.ceil(len(found) / 3)
        figure = Figure(figsize=(13, 2.4 * rows), layout="constrained")
        for axes, panel, series in zip(figure.subplots(rows, 3).flat, dashboards.DASHBOARDS[name], found, strict=False):
            flat = not any(value for _, _, values in series for value in values)
            for legend, times, values in series:
                axes.plot(times, values, label=legend if flat or any(values) else None, linewidth=1.2)
            axes.set_title(panel.title, fontsize=9, loc="left")
            axes.margins(y=0.4)  # the legend
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(formats[panel.unit])
            axes.grid(alpha=0.25)
            if series:
                axes.legend(fontsize=6, loc="upper left", ncols=2, framealpha=0.6)
        for axes in list(figure.axes)[len(found) :]:
            axes.remove()
        figure.savefig(path, metadata={"Date": None})


def main() -> int:
    """Observe, check, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, metavar="DIRECTORY", help="where pictures go")
    pictures = parser.parse_args().pictures
    with tempfile.TemporaryDirectory() as directory:
        panels, tables = observe(Path(directory), *((80.0, 12.0) if pictures else (16.0, 0.0)))
    empty = [
        f"{name}: {panel.title}"
        for name, found in panels.items()
        for panel, series in zip(dashboards.DASHBOARDS[name], found, strict=True)
        if len(series) < len(panel.queries)
    ]
    console = Console()
    console.print(tables)
    console.print("\n".join(empty) or "Each query of each panel has an answer.")
    if pictures:
        pictures.mkdir(exist_ok=True)
        for name, found in panels.items():
            draw(name, found, pictures / f"dashboard-{name}.svg")
        recording = Console(record=True, width=150, file=io.StringIO())
        recording.print(tables)
        picture = recording.export_svg(title="resumed top")
        # Without the fonts that rich would have fetched.
        (pictures / "top.svg").write_text(re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.DOTALL))
    return bool(empty)


if __name__ == "__main__":
    sys.exit(main())
