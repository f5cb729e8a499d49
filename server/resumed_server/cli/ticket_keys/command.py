"""`resumed ticket-keys`: its options, and the parts that they put together."""

from __future__ import annotations

import contextlib
import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import structlog
import typer

import resumed
from resumed._crypto.ticket_secret import MAX_ROTATION
from resumed._policy.ticket_secrets import TicketSecrets
from resumed_server.cli.options import Target, logs_start_errors, parse_option
from resumed_server.cli.ticket_keys.agent import Agent
from resumed_server.cli.ticket_keys.key_files import verify_directory
from resumed_server.cli.ticket_keys.key_set import KeySchedule, create_temporary
from resumed_server.cli.ticket_keys.metrics import AgentMetrics
from resumed_server.cli.ticket_keys.observed_store import ObservedStore
from resumed_server.cli.ticket_keys.outputs import HaproxyFile, HaproxySocket, NginxFiles, Output, TrafficServerFile
from resumed_server.cli.ticket_keys.reload import ReloadCommand
from resumed_server.cli.ticket_keys.revocations import Revocations
from resumed_server.cli.tls_options import TlsOptions, takes_tls
from resumed_server.config.patterns import is_namespace
from resumed_server.config.types import Address, Duration, choice_parser
from resumed_server.errors import UserError
from resumed_server.lifecycle.health import LIVENESS, is_alive
from resumed_server.lifecycle.listeners import reserve_addresses
from resumed_server.observability import logging
from resumed_server.periodic import PeriodicTask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from resumed_server.cli.ticket_keys.sds import SecretDiscovery

_MAX_LIFETIME = 7 * 24 * 3600
_CALL_SECONDS = 1.0
_GRACE_SECONDS = 5.0
_LONGEST_LEAD = 60.0
_REFUSED = {
    "--apache": (
        "Apache 2.4 with OpenSSL 3 authenticates its tickets with a key of zeros instead of that of "
        "SSLSessionTicketKeyFile, so that any client can forge one; put the library under Apache instead "
        "(client/c/README.md)"
    ),
    "--hitch": "Hitch has no setting for ticket keys, and makes its own; put another server before it, such as HAProxy",
}

log = structlog.get_logger()


@takes_tls
@logs_start_errors
def ticket_keys(
    target: Target,
    *,
    namespace: Annotated[str, typer.Option(metavar="NAME", help="Namespace of the fleet that shares these tickets.")],
    keyring: Annotated[str, typer.Option(metavar="FILE", help="Keyring of the fleet.")],
    rotation: Annotated[
        str,
        typer.Option(
            metavar="SECONDS",
            help="Time for which a key encrypts, the same at all frontends of a namespace: seconds, or a duration such "
            "as 1h, up to 7d.",
        ),
    ] = "3600",
    lifetime: Annotated[
        str,
        typer.Option(
            metavar="SECONDS",
            help="Longest lifetime of a ticket, the same at all frontends of a namespace: seconds or a duration, up to "
            "7d. Configure the servers to it.",
        ),
    ] = "7200",
    lead: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS",
            help="Time for which a key opens tickets before it encrypts: longer than any server takes to reload. "
            "Default: a tenth of the rotation, 60 s at most.",
        ),
    ] = None,
    sds: Annotated[
        str | None,
        typer.Option(
            metavar="unix:PATH",
            help="Serve the keys to Envoy on this unix socket (SDS), under the name of the namespace or `ticket-keys`.",
        ),
    ] = None,
    nginx: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Write keys for nginx, and DIR/ticket-keys.conf, which its configuration includes."
        ),
    ] = None,
    haproxy: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write DIR/ticket-keys for HAProxy's `tls-ticket-keys`.")
    ] = None,
    haproxy_socket: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Runtime socket of a HAProxy (`stats socket PATH level admin`): its keys change without a reload.",
        ),
    ] = None,
    trafficserver: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Write keys for Apache Traffic Server (proxy.config.ssl.server.ticket_key.filename)."
        ),
    ] = None,
    apache: Annotated[
        str | None, typer.Option(metavar="FILE", help="Refused: Apache's key file is not secure; prints the reason.")
    ] = None,
    hitch: Annotated[
        str | None, typer.Option(metavar="DIR", help="Refused: Hitch takes no ticket keys; prints the reason.")
    ] = None,
    allow_disk: Annotated[
        bool,
        typer.Option("--allow-disk", help="Write keys to a disk, too, where they can be recovered after their end."),
    ] = False,
    reload: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Command to run after a change of files, without a shell, until it succeeds, as 'nginx -s reload'.",
        ),
    ] = None,
    metrics_listen: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDRESS", help="Address that serves metrics for Prometheus over plain HTTP: host:port."),
    ] = None,
    health_listen: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS",
            help="Address that serves grpc.health.v1. Serving: every output has keys, so that its servers can start. "
            "The service `live` reports whether the agent runs.",
        ),
    ] = None,
    log_format: Annotated[str, typer.Option(metavar="FORMAT", help="Format of log lines: json or console.")] = "json",
    log_level: Annotated[
        str, typer.Option(metavar="LEVEL", help="Minimum level of log lines: debug, info, warning or error.")
    ] = "info",
    tls: TlsOptions,
) -> None:
    """Give Envoy, nginx, HAProxy and Traffic Server the ticket keys of a fleet, and rotate them (docs/ticket-keys.md).

    It runs beside the servers until SIGTERM or SIGINT, and leaves the keys in place. While the store does not answer,
    the keys stay.
    """
    for option, value in (("--apache", apache), ("--hitch", hitch)):
        if value is not None:
            raise UserError(f"{option}: {_REFUSED[option]}")
    parse_option("--log-format", log_format, choice_parser("json", "console"))
    parse_option("--log-level", log_level, choice_parser("debug", "info", "warning", "error"))
    if not is_namespace(namespace):
        raise UserError(f"--namespace: {namespace!r} is not 1 to 63 characters of [a-z0-9.-]")
    seconds = int(_seconds("--rotation", rotation, 1, MAX_ROTATION))
    life = int(_seconds("--lifetime", lifetime, 1, _MAX_LIFETIME))
    ahead = min(seconds / 10, _LONGEST_LEAD) if lead is None else _seconds("--lead", lead, 0, seconds / 2)
    outputs = _file_outputs(nginx, haproxy, haproxy_socket or [], trafficserver, allow_disk=allow_disk)
    if sds is None and not outputs:
        raise UserError("nothing to do: give --sds, --nginx, --haproxy or --trafficserver")
    command = ReloadCommand(reload) if reload is not None else None
    store = _store(target, namespace, tls)
    secrets = TicketSecrets(store, _keyring(keyring), rotation=seconds, lifetime=life)

    with contextlib.ExitStack() as stack:
        addresses = {
            option: stack.enter_context(reserve_addresses([_address(option, text) for text in given or []], option))
            for option, given in (
                ("--sds", [sds] if sds is not None else []),
                ("--metrics-listen", metrics_listen),
                ("--health-listen", health_listen),
            )
        }
        _prepare_process(log_format, log_level)
        unread = [output.name for output in outputs if output.needs_reload]
        if unread and not command:
            log.warning("no --reload: nothing has the servers read changed keys", outputs=unread)
        discovery = _serve_secrets(addresses["--sds"], namespace, stack)
        agent = Agent(
            secrets,
            KeySchedule(ahead),
            [*([discovery] if discovery else []), *outputs],
            create_temporary=partial(create_temporary, namespace, rotation=seconds, lifetime=life),
            reload=command,
        )
        task = PeriodicTask("ticket-keys", agent.step, "the keys cannot be brought up to date")
        revocations = Revocations(store, secrets)
        follower = PeriodicTask("revocations", revocations.follow, "revocations cannot be followed")
        _serve_metrics(addresses["--metrics-listen"], AgentMetrics(store, agent, discovery), stack)
        _serve_health(addresses["--health-listen"], agent, task, stack)
        wait_for_stop = stack.enter_context(_stop_signals())
        log.info("starting", namespace=namespace, rotation=seconds, lifetime=life, lead=ahead)
        task.start()
        follower.start()
        wait_for_stop()
        log.info("stopping, the keys stay in place")
        task.stop(_GRACE_SECONDS)
        follower.stop(0.0)
        revocations.close()
    log.info("stopped")


def _prepare_process(log_format: str, log_level: str) -> None:
    """Change the settings of the whole process; from here on errors are log lines."""
    logging.configure(log_format, log_level)
    resumed.forbid_core_dumps()
    os.umask(0o077)  # only this user may read the keys, or connect to the socket of SDS


def _seconds(option: str, text: str, low: float, high: float) -> float:
    try:
        seconds = float(text) if text.replace(".", "", 1).isdigit() else Duration.parse(text)
    except ValueError:
        raise UserError(f"{option}: {text!r} is neither a number of seconds nor a duration such as 90s or 1h") from None
    if not low <= seconds <= high:
        raise UserError(f"{option}: {text} is outside {low:g} to {high:g} seconds")
    return seconds


def _file_outputs(
    nginx: str | None, haproxy: str | None, sockets: Sequence[str], trafficserver: str | None, *, allow_disk: bool
) -> list[Output]:
    """Return the outputs of files and runtime sockets, after verifying their directories."""
    outputs: list[Output] = []
    if nginx is not None:
        directory = Path(nginx).absolute()
        verify_directory("--nginx", directory, allow_disk=allow_disk)
        outputs.append(NginxFiles(directory))
    if haproxy is not None:
        directory = Path(haproxy).absolute()
        verify_directory("--haproxy", directory, allow_disk=allow_disk)
        file = HaproxyFile(directory, needs_reload=not sockets)
        outputs += [file, *(HaproxySocket(path, file.path) for path in sockets)]
    elif sockets:
        raise UserError("--haproxy-socket: needs --haproxy DIR as well: HAProxy reads the file when it starts")
    if trafficserver is not None:
        path = Path(trafficserver).absolute()
        verify_directory("--trafficserver", path.parent, allow_disk=allow_disk)
        outputs.append(TrafficServerFile(path))
    return outputs


def _store(target: str, namespace: str, tls: TlsOptions) -> ObservedStore:
    try:
        return ObservedStore(target, tls, namespace=namespace, deadline=_CALL_SECONDS)
    except (ValueError, resumed.CredentialsError) as error:
        raise UserError(str(error)) from None


def _keyring(file: str) -> resumed.Keyring:
    try:
        return resumed.Keyring.load(file)
    except resumed.KeyringError as error:
        raise UserError(str(error)) from None


def _address(option: str, text: str) -> Address:
    address = parse_option(option, text, Address.parse)
    if option == "--sds" and not address.path:
        raise UserError(f"--sds: {text} is no unix socket; give unix:PATH, because the keys are not encrypted there")
    if option == "--metrics-listen" and address.path:
        raise UserError(f"--metrics-listen: {text} is a unix socket; give host:port")
    return address


def _serve_secrets(addresses: Sequence[Address], namespace: str, stack: contextlib.ExitStack) -> SecretDiscovery | None:
    if not addresses:
        return None
    from resumed_server.cli.ticket_keys.sds import SecretDiscovery  # noqa: PLC0415 - loads gRPC

    discovery = stack.enter_context(contextlib.closing(SecretDiscovery(addresses[0], namespace)))
    log.info("serving keys to Envoy", address=str(addresses[0]))
    return discovery


def _serve_metrics(addresses: Sequence[Address], metrics: AgentMetrics, stack: contextlib.ExitStack) -> None:
    if not addresses:
        return
    from resumed_server.observability.metrics.http_endpoint import Endpoint  # noqa: PLC0415 - only with metrics

    stack.callback(Endpoint(addresses, metrics).close)
    log.info("serving metrics", addresses=[*map(str, addresses)])


def _serve_health(addresses: Sequence[Address], agent: Agent, task: PeriodicTask, stack: contextlib.ExitStack) -> None:
    if not addresses:
        return
    from resumed_server.rpc import server as rpc_server  # noqa: PLC0415 - loads gRPC
    from resumed_server.rpc.health_service import HealthService  # noqa: PLC0415

    health = HealthService({"": lambda: agent.ready, LIVENESS: lambda: is_alive((task.heartbeat,))})
    server = rpc_server.build_health_server(health, shared=False, use_executor=False)
    for address in addresses:
        rpc_server.listen(server, address, None)
    server.start()
    stack.callback(server.stop, None)
    stack.callback(health.close)
    log.info("serving health", addresses=[*map(str, addresses)])


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], object]]:
    """Yield a function that waits for SIGTERM or SIGINT.

    The signals are handled and not blocked, since the reload command would inherit the mask.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python's handlers run in the main thread only, whichever thread the signal interrupts; the pipe wakes it.
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
        yield lambda: os.read(reader, 1)
    finally:
        signal.set_wakeup_fd(-1)
        os.close(reader)
        os.close(writer)
