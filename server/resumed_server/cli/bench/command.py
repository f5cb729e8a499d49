"""`resumed bench`: measure full and resumed handshakes of any TLS servers."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from resumed_server.cli.options import AsJson, parse_option
from resumed_server.config.types import Address, Duration
from resumed_server.errors import ExitStatus, UserError

try:
    from resumed_server.cli.bench.load_generator import Plan, Tally, measure
    from resumed_server.cli.tls_client import PATIENCE, Endpoint
except ModuleNotFoundError as missing:
    if missing.name != "OpenSSL":
        raise
    raise UserError("resumed bench needs pyOpenSSL: pip install 'resumed[pyopenssl]'") from None

if TYPE_CHECKING:
    from collections.abc import Iterator

_BUSY = 0.9
"""The share of processor time above which this client may be the bottleneck."""
_LONGEST = 86_400
_REASONS_SHOWN = 5


class TlsVersion(str, Enum):
    """Versions of TLS."""

    TLS12 = "1.2"
    TLS13 = "1.3"


def bench(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...", help="TLS servers of any kind, as host:port; the clients connect to them in turns."
        ),
    ],
    *,
    tls: Annotated[
        TlsVersion | None, typer.Option(help="Version of TLS. Default: the newest version of the servers.")
    ] = None,
    resume: Annotated[
        float,
        typer.Option(
            metavar="PERCENT", min=0, max=100, help="Share of the connections that offer the client's last session."
        ),
    ] = 90,
    duration: Annotated[str, typer.Option(metavar="DURATION", help="Duration of the test, such as 10s or 5m.")] = "10s",
    count: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Number of connections to make, instead of a duration.")
    ] = None,
    connections: Annotated[
        int, typer.Option(metavar="N", min=1, max=10_000, help="Concurrent connections, of all processes together.")
    ] = 8,
    clients: Annotated[
        int,
        typer.Option(metavar="N", min=1, max=1_000_000, help="Simulated clients; each of them connects in its turn."),
    ] = 256,
    processes: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=256, help="Processes of this client. Default: half the number of cores."),
    ] = None,
    sni: Annotated[
        str | None, typer.Option(metavar="NAME", help="Server name to send. Default: the host of the first TARGET.")
    ] = None,
    ca: Annotated[
        str | None, typer.Option(metavar="FILE", help="Certificates to trust (PEM), instead of the system's.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Trust any certificate.")] = False,
    send: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="Send this after the handshake, with the escapes of Python's strings, and include the first byte of "
            r"the response in the times; such as 'GET / HTTP/1.0\r\n\r\n'.",
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Measure any TLS servers: full and resumed handshakes per second, and their durations.

    Each client connects to one server after the other, and offers there the session of its last connection.

    The exit status is 1 if a connection failed.
    """
    if ca is not None and insecure:
        raise UserError("--ca and --insecure contradict each other; give one of them")
    addresses = list(dict.fromkeys(parse_option("TARGET", target, _address) for target in targets))
    plan = Plan(
        endpoints=tuple(_resolve(address) for address in addresses),
        server_name=sni or addresses[0].host,
        version=tls.value if tls else None,
        send=parse_option("--send", send, _unescape),
        share=resume / 100,
        seconds=None if count else parse_option("--duration", duration, _duration),
        count=count,
        clients=clients,
        connections=connections,
        processes=min(processes or max(1, (os.cpu_count() or 1) // 2), connections),
    )
    context = _context(plan.version, ca, insecure=insecure)
    for endpoint in plan.endpoints:
        _try_out(endpoint, plan, context)
    with _progress(plan, quiet=as_json):
        tally = measure(plan)
    report = _report(plan, tally)
    if as_json:
        Console(soft_wrap=True).print_json(data=report)
    else:
        _show(report, plan)
    if tally.failures:
        raise typer.Exit(ExitStatus.FAILED)


def _address(text: str) -> Address:
    address = Address.parse(text)
    if address.path or not address.port:
        raise ValueError(f"{text!r} is not a server's host:port, as in 127.0.0.1:8443")
    return address


def _duration(text: str) -> float:
    seconds = Duration.parse(text)
    if not 0 < seconds <= _LONGEST:
        raise ValueError(f"{text!r} is not above 0 and at most 24h")
    return seconds


def _unescape(text: str) -> bytes:
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape").encode()


def _resolve(address: Address) -> Endpoint:
    try:
        return Endpoint.resolve(address.host, address.port)
    except OSError as error:
        text = f"{address}: the name does not resolve ({error.strerror}); check the spelling"
        raise UserError(text, ExitStatus.RETRY) from None


def _context(tls: str | None, ca: str | None, *, insecure: bool) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca)
    except ssl.SSLError:
        raise UserError(f"--ca: {ca} contains no PEM certificates") from None
    except OSError as error:
        raise UserError(f"--ca: {ca}: {error.strerror}") from None
    if insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if tls:
        only = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}[tls]
        context.minimum_version = context.maximum_version = only
    return context


def _try_out(endpoint: Endpoint, plan: Plan, context: ssl.SSLContext) -> None:
    """Connect to a server once before the load; only this connection verifies the certificate."""
    try:
        with socket.socket(endpoint.family, socket.SOCK_STREAM) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(endpoint.address)
            with context.wrap_socket(connection, server_hostname=plan.server_name):
                pass
    except ssl.SSLCertVerificationError as error:
        raise UserError(
            f"{endpoint.name}: its certificate is not trusted ({error.verify_message.rstrip('.')}); "
            "give --ca FILE, --sni NAME, or --insecure",
            ExitStatus.FAILED,
        ) from None
    except ssl.SSLError as error:
        what = f"no TLS {plan.version or '1.2 or 1.3'} there ({error.reason or error})"
        raise UserError(f"{endpoint.name}: {what}; check the port and --tls", ExitStatus.FAILED) from None
    except TimeoutError:
        text = f"{endpoint.name}: no response in {PATIENCE:g} s; check address, port, firewall"
        raise UserError(text, ExitStatus.RETRY) from None
    except OSError as error:
        text = f"{endpoint.name}: {error.strerror or error}; is the server running?"
        raise UserError(text, ExitStatus.RETRY) from None


@contextlib.contextmanager
def _progress(plan: Plan, *, quiet: bool) -> Iterator[None]:
    """Show a progress bar, on a terminal only."""
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
        what = f"{plan.count:,} connections" if plan.count else f"connections for {plan.seconds:g} s"
        progress.add_task(f"{what} to {len(plan.endpoints)} server(s)", total=None)
        yield


def _report(plan: Plan, tally: Tally) -> dict[str, Any]:
    resumed = tally.seconds(resumed=True)
    return {
        "targets": [endpoint.name for endpoint in plan.endpoints],
        "versions": dict(tally.versions),
        "seconds": round(tally.wall, 3),
        "processes": plan.processes,
        "connections": plan.connections,
        "clients": plan.clients,
        "per_second": round(sum(map(len, tally.times.values())) / tally.wall, 1),
        "full": _figures(tally.seconds(resumed=False), tally.wall),
        "resumed": _figures(resumed, tally.wall),
        "offered": tally.offered,
        "resumed_of_offered": round(len(resumed) / tally.offered, 6) if tally.offered else None,
        "failures": {
            f"{plan.endpoints[server].name}: {reason}": number
            for (server, reason), number in tally.failures.most_common()
        },
        "client_cpu": round(tally.cpu / tally.wall / plan.processes, 3),
        "by_target": {
            endpoint.name: {
                kind: _figures(tally.seconds(resumed=kind == "resumed", server=number), tally.wall)
                for kind in ("full", "resumed")
            }
            for number, endpoint in enumerate(plan.endpoints)
        },
    }


def _figures(seconds: list[float], wall: float) -> dict[str, float | int | None]:
    figures: dict[str, float | int | None] = {
        "handshakes": len(seconds),
        "per_second": round(len(seconds) / wall, 1),
    }
    for percent in (50, 90, 99):
        found = round(1e3 * seconds[len(seconds) * percent // 100], 4) if seconds else None
        figures[f"p{percent}_ms"] = found
    return figures


def _show(report: dict[str, Any], plan: Plan) -> None:
    console = Console(highlight=False)
    versions = ", ".join(version.replace("TLSv", "TLS ") for version in report["versions"])
    table = Table(
        "", "handshakes", "per second", "p50 ms", "p90 ms", "p99 ms", title=versions or None, title_justify="left"
    )
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("full", *_cells(report["full"]))
    table.add_row("resumed", *_cells(report["resumed"]), end_section=True)
    if len(plan.endpoints) > 1:
        for target, kinds in report["by_target"].items():
            for kind, figures in kinds.items():
                table.add_row(f"{kind}, {target}", *_cells(figures))
    console.print(table)
    until = "until the first byte of the response" if plan.send else "until the end of the handshake"
    console.print(
        f"from the first packet {until}; {report['per_second']:,.0f} connections per second for {report['seconds']:g} s"
    )
    if report["offered"]:
        console.print(f"resumed: {report['resumed_of_offered']:.1%} of {report['offered']:,} sessions offered")
    for reason, number in list(report["failures"].items())[:_REASONS_SHOWN]:
        console.print(f"[red]failed:[/red] {number:,} times: {reason}")
    console.print(f"this client used {report['client_cpu']:.0%} of {report['processes']} core(s)")
    if report["client_cpu"] > _BUSY:
        console.print("[yellow]This client may be the bottleneck: give it more --processes, on separate cores.")


def _cells(figures: dict[str, Any]) -> list[str]:
    handshakes, rate, *times = figures.values()
    return [f"{handshakes:,}", f"{rate:,.0f}", *("-" if each is None else f"{each:.2f}" for each in times)]
