"""Validation of the settings of `resumed serve` before anything opens: each, their combination, and their files."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from resumed_server.config.settings import USUAL_AGE, Settings, flag, parse
from resumed_server.errors import UserError
from resumed_server.storage.registry import verify_url


def verify_settings(**given: Any) -> Settings:
    """Parse and validate the settings, from the user's values and the defaults.

    Raises:
        UserError: All problems, one per line.
    """
    values, problems = parse(given)
    problems += _conflicts(values) + _unusable_storage(values) + _unusable_files(values)
    if problems:
        raise UserError("\n".join(problems))
    return Settings(**values)


def _unusable_storage(values: dict[str, Any]) -> list[str]:
    try:
        verify_url(values["storage"])
    except ValueError as problem:
        return [f"--storage: {problem}"]
    return []


def _conflicts(values: dict[str, Any]) -> list[str]:
    addresses = values.get("listen", ())
    native = values.get("transport") == "native"
    problems = [
        f"--listen: {address} can be reached from other machines, and nothing would protect the sessions; give "
        "--tls-cert, --tls-key and --client-ca, or listen on 127.0.0.1, [::1] or unix:/path, or give --insecure if the "
        "network itself is trusted"
        for address in addresses
        if not address.local and not values["insecure"] and not values["client_ca"] and not native
    ]
    problems += [
        f"--metrics-listen: Prometheus asks over TCP, not at {address}; use an address with a port"
        for address in values.get("metrics_listen", ())
        if address.path
    ]
    if native:
        problems += _native_conflicts(values)
    if values["otel"] and not _is_installed("opentelemetry.exporter.otlp.proto.grpc"):
        problems.append("--otel: needs OpenTelemetry; pip install 'resumed[server,otel]'")
    problems += [
        f"{flag(name)}: needs {flag(other)} as well"
        for name, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert"), ("client_ca", "tls_cert"))
        if values[name] and not values[other]
    ]
    if values["grants"] and not values["client_ca"]:
        problems.append("--grants: needs --client-ca as well, or the server would not know who calls")
    if values.get("workers", 1) > 1:
        problems += [
            f"{flag}: workers cannot share the one socket {address}; use --workers 1, or an address with a port"
            for flag, given in (("--listen", addresses), ("--health-listen", values.get("health_listen", ())))
            for address in given
            if address.path
        ]
    return problems


def _native_conflicts(values: dict[str, Any]) -> list[str]:
    """Return the settings that the native transport does not support, one problem per line."""
    problems = [
        f"--transport: native has no TLS and does not know who calls, so it cannot listen on {address}; use a loopback "
        "address or a unix socket, or --transport grpcio"
        for address in values.get("listen", ())
        if not address.local
    ]
    if values["tls_cert"]:
        problems.append("--transport: native has no TLS; leave --tls-cert away, or use --transport grpcio")
    if str(values.get("max_connection_age", USUAL_AGE)) != USUAL_AGE:
        problems.append(
            "--transport: native keeps connections; leave --max-connection-age away, or use --transport grpcio"
        )
    if not _is_installed("pygrpc_native"):
        problems.append("--transport: native needs the package pygrpc-native; pip install 'resumed[server,native]'")
    return problems


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is not installed either
        return False


def _unusable_files(values: dict[str, Any]) -> list[str]:
    """Return the problems of the files of the settings, one per line."""
    problems = []
    if values["tls_cert"] and values["tls_key"]:
        from resumed_server.auth import tls  # noqa: PLC0415 - the other commands start faster without gRPC

        try:
            tls.watch_files(values["tls_cert"], values["tls_key"], values["client_ca"])
        except ValueError as error:
            problems += [f"--tls-cert, --tls-key, --client-ca: {problem}" for problem in str(error).splitlines()]
    if values["grants"]:
        from resumed_server.auth import grants  # noqa: PLC0415 - with it comes the client

        try:
            grants.watch_file(values["grants"])
        except ValueError as error:
            problems += [f"--grants: {problem}" for problem in str(error).splitlines()]
    return problems
