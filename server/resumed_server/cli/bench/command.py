"""`resumed bench`: how many full and resumed handshakes any TLS servers make, and how long each takes."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from resumed_server.config.types import Address, Duration
from resumed_server.errors import UserError

try:
    from resumed_server.cli.bench.load_generator import Plan, Tally, measure
    from resumed_server.cli.tls_client import PATIENCE, Endpoint
except ModuleNotFoundError as missing:
    if missing.name != "OpenSSL":
        raise
    raise UserError("resumed bench needs pyOpenSSL: pip install 'resumed[pyopenssl]'") from None

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_BUSY = 0.9
"""The share of its processes' time from which on the client itself may be the limit."""
_LONGEST = 86_400
_REASONS_SHOWN = 5


def bench(
    targets: Sequence[str],
    *,
    tls: str | None,
    resume: float,
    duration: str,
    count: int | None,
    sni: str | None,
    ca: str | None,
    insecure: bool,
    send: str,
    as_json: bool,
    **load: int,
) -> bool:
    """Visit the servers, print what came of it, and return whether every visit succeeded.

    Args:
        targets: Where the servers listen, each as host:port.
        tls: "1.2" or "1.3"; None for the newest that both ends know.
        resume: How many of a hundred visits offer a session.
        duration: For how long, as in "10s"; with a `count` only that ends it.
        count: How many visits.
        sni: The name to ask for; by default the first target's host.
        ca: File with the certificates to trust, as PEM; by default the system's.
        insecure: Whether to trust any certificate.
        send: What to send behind the handshake, with the escapes of Python's strings.
        as_json: Print JSON instead of a table.
        load: `clients`, `connections` and `processes` of the Plan.

    Raises:
        UserError: An argument is outside its range, or a server cannot be reached or is not trusted.
    """
    if ca is not None and insecure:
        raise UserError("--ca and --insecure contradict each other; give one of them")
    addresses = list(dict.fromkeys(_parsed("TARGET", target, _address) for target in targets))
    plan = Plan(
        endpoints=tuple(_reached(address) for address in addresses),
        server_name=sni or addresses[0].host,
        version=tls,
        send=_parsed("--send", send, _unescaped),
        share=resume / 100,
        seconds=None if count else _parsed("--duration", duration, _duration),
        count=count,
        **load,
    )
    context = _context(tls, ca, insecure=insecure)
    for endpoint in plan.endpoints:
        _try_out(endpoint, plan, context)
    with _progress(plan, quiet=as_json):
        tally = measure(plan)
    report = _report(plan, tally)
    if as_json:
        Console(soft_wrap=True).print_json(data=report)
    else:
        _show(report, plan)
    return not tally.failures


def _parsed(name: str, text: str, parse: Any) -> Any:
    try:
        return parse(text)
    except ValueError as problem:
        raise UserError(f"{name}: {problem}") from None


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


def _unescaped(text: str) -> bytes:
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape").encode()


def _reached(address: Address) -> Endpoint:
    try:
        return Endpoint.resolved(address.host, address.port)
    except OSError as error:
        raise UserError(f"{address}: the name does not resolve ({error.strerror}); check its spelling") from None


def _context(tls: str | None, ca: str | None, *, insecure: bool) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca)
    except ssl.SSLError:
        raise UserError(f"--ca: {ca} holds no certificates as PEM") from None
    except OSError as error:
        raise UserError(f"--ca: {ca}: {error.strerror}") from None
    if insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if tls:
        only = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}[tls]
        context.minimum_version = context.maximum_version = only
    return context


def _try_out(endpoint: Endpoint, plan: Plan, context: ssl.SSLContext) -> None:
    """Visit a server once, to find out what is wrong before the load: the only visit that checks the certificate."""
    try:
        with socket.socket(endpoint.family, socket.SOCK_STREAM) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(endpoint.address)
            with context.wrap_socket(connection, server_hostname=plan.server_name):
                pass
    except ssl.SSLCertVerificationError as error:
        raise UserError(
            f"{endpoint.name}: its certificate is not trusted ({error.verify_message.rstrip('.')}); "
            "give --ca FILE, --sni NAME, or --insecure"
        ) from None
    except ssl.SSLError as error:
        what = f"no TLS {plan.version or '1.2 or 1.3'} there ({error.reason or error})"
        raise UserError(f"{endpoint.name}: {what}; check the port and --tls") from None
    except TimeoutError:
        raise UserError(f"{endpoint.name}: no answer in {PATIENCE:g} s; check address, port and firewall") from None
    except OSError as error:
        raise UserError(f"{endpoint.name}: {error.strerror or error}; is the server running?") from None


@contextlib.contextmanager
def _progress(plan: Plan, *, quiet: bool) -> Iterator[None]:
    """Show that something is done; on a terminal only."""
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
        what = f"{plan.count:,} visits" if plan.count else f"visits for {plan.seconds:g} s"
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
        "failures": _by_reason(plan, tally),
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


def _by_reason(plan: Plan, tally: Tally) -> dict[str, int]:
    return {
        f"{plan.endpoints[server].name}: {reason}": number for (server, reason), number in tally.failures.most_common()
    }


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
    until = "until the first byte of the answer" if plan.send else "until the handshake's end"
    console.print(
        f"from the first packet {until}; {report['per_second']:,.0f} visits a second for {report['seconds']:g} s"
    )
    if report["offered"]:
        console.print(f"resumed: {report['resumed_of_offered']:.1%} of {report['offered']:,} sessions offered")
    for reason, number in list(report["failures"].items())[:_REASONS_SHOWN]:
        console.print(f"[red]failed:[/red] {number:,} times {reason}")
    console.print(f"this client: {report['client_cpu']:.0%} of {report['processes']} core(s)")
    if report["client_cpu"] > _BUSY:
        console.print("[yellow]The client itself may be the limit: give it more --processes, on cores of their own.")


def _cells(figures: dict[str, Any]) -> list[str]:
    handshakes, rate, *times = figures.values()
    return [f"{handshakes:,}", f"{rate:,.0f}", *("-" if each is None else f"{each:.2f}" for each in times)]
