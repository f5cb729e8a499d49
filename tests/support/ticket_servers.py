"""TLS servers that take ticket keys, unmodified, on ports of 127.0.0.1, and the agents that give them keys."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from resumed_server.cli.tls_client import Client, Endpoint, Handshake
from support.ports import free_port
from support.processes import listening_process
from support.server import RunningServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from OpenSSL import SSL

ROOT = Path(__file__).parents[2]
MEMORY = Path("/dev/shm")
ENVOY = ROOT / ".build" / "envoy" / "envoy" / "_bin" / "envoy"
PROGRAMS = {
    "nginx": "/usr/sbin/nginx",
    "haproxy": "/usr/sbin/haproxy",
    "envoy": os.environ.get("RESUMED_ENVOY") or shutil.which("envoy") or str(ENVOY),
    "trafficserver": "/usr/bin/traffic_server",
    "apache": "/usr/sbin/apache2",
}

_NGINX = """\
daemon off;
user root;
worker_processes 1;
pid {directory}/pid;
error_log {directory}/log info;
events {{ worker_connections 128; }}
http {{
  access_log off;
  client_body_temp_path {directory}/body;
  ssl_session_timeout 1h;
  include {keys};
  server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {certificate};
    ssl_certificate_key {certificate};
    ssl_protocols TLSv1.2 TLSv1.3;
    return 200 "ok";
  }}
}}
"""
_HAPROXY = """\
global
  nbthread 1
  tune.ssl.lifetime 3600
  tune.ssl.default-dh-param 2048
  stats socket {directory}/admin level admin
defaults
  mode http
  timeout client 60s
  timeout server 60s
  timeout connect 5s
frontend tls
  bind 127.0.0.1:{port} ssl crt {certificate} ssl-min-ver TLSv1.2 tls-ticket-keys {keys} {more}
  http-request return status 200 content-type text/plain string ok
"""
_ENVOY = """\
node: {{id: envoy, cluster: fleet}}
static_resources:
  clusters:
  - name: sds
    connect_timeout: 1s
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment: {{cluster_name: sds, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{pipe: {{path: {keys}}}}}}}}}]}}]}}
  listeners:
  - name: tls
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          common_tls_context:
            tls_certificates: [{{certificate_chain: {{filename: {certificate}}}, private_key: {{filename: {certificate}}}}}]
          session_ticket_keys_sds_secret_config:
            name: {more}
            sds_config:
              resource_api_version: V3
              api_config_source: {{api_type: {api}, transport_api_version: V3, grpc_services: [{{envoy_grpc: {{cluster_name: sds}}}}]}}
      filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: tls
          route_config: {{virtual_hosts: [{{name: all, domains: ["*"], routes: [{{match: {{prefix: /}}, direct_response: {{status: 200, body: {{inline_string: ok}}}}}}]}}]}}
          http_filters: [{{name: envoy.filters.http.router, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]
"""  # noqa: E501


@dataclass
class TicketServer:
    """A server that listens on `port`, in a process of its own."""

    name: str
    port: int
    directory: Path
    process: subprocess.Popen[bytes]
    reload_command: list[str] = field(default_factory=list)

    def log(self) -> str:
        """Return the output of the server."""
        paths = (self.directory / "stderr", self.directory / "log")
        return "".join(path.read_text(errors="replace") for path in paths if path.exists())

    def visit(self, version: str, session: SSL.Session | None = None) -> Handshake:
        """Connect with a version of TLS, offer a session, and make a request."""
        return client_of(version).visit(Endpoint.resolve("127.0.0.1", self.port), session)


@cache
def client_of(version: str) -> Client:
    """Return the client that has all sessions of a version of TLS."""
    return Client("localhost", version, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")


@contextlib.contextmanager
def ticket_server(
    name: str, certificate: Path, keys: Path, *, more: str = "", api: str = "GRPC"
) -> Iterator[TicketServer]:
    """Run a server.

    Args:
        name: One of PROGRAMS.
        certificate: File with the certificate and its key.
        keys: The file with keys, or the socket of SDS.
        more: For the `bind` line of HAProxy; the name of Envoy's secret.
        api: The kind of Envoy's stream.
    """
    directory, port = Path(tempfile.mkdtemp(prefix=f"resumed-{name}-")), free_port()
    values = {"directory": directory, "port": port, "certificate": certificate, "keys": keys, "more": more, "api": api}
    config = directory / "config.yaml"
    reload_command: list[str] = []
    if name == "nginx":
        config.write_text(_NGINX.format(**values))
        arguments = ["-p", str(directory), "-e", str(directory / "log"), "-c", str(config)]
    elif name == "haproxy":
        config.write_text(_HAPROXY.format(**values))
        arguments = ["-W", "-db", "-f", str(config)]
    elif name == "envoy":
        config.write_text(_ENVOY.format(**values))
        arguments = ["-c", str(config), "--concurrency", "1", "--use-dynamic-base-id", "-l", "info"]
    else:
        arguments = _write_trafficserver(directory, port, certificate, keys)
        reload_command = ["/usr/bin/traffic_ctl", *arguments, "config", "reload"]
    with (directory / "stderr").open("wb") as stderr:
        process = subprocess.Popen([PROGRAMS[name], *arguments], stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr)
    server = TicketServer(name, port, directory, process, reload_command)
    if name in {"nginx", "haproxy"}:
        server.reload_command = ["kill", "-HUP" if name == "nginx" else "-USR2", str(process.pid)]
    try:
        with listening_process(process, port, server.log):
            yield server
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _write_trafficserver(directory: Path, port: int, certificate: Path, keys: Path) -> list[str]:
    etc, cache = directory / "etc" / "trafficserver", directory / "cache"
    for path in etc, directory / "var" / "log" / "trafficserver", directory / "run", cache:
        path.mkdir(parents=True)
    shutil.copytree("/etc/trafficserver", etc, dirs_exist_ok=True)
    places = {
        "prefix": directory, "exec_prefix": "/usr", "bindir": "/usr/bin", "sbindir": "/usr/sbin", "sysconfdir": etc,
        "datadir": cache, "includedir": "/usr/include", "libdir": "/usr/lib/trafficserver",
        "libexecdir": "/usr/lib/trafficserver/modules", "localstatedir": directory / "var",
        "runtimedir": directory / "run", "logdir": directory / "var" / "log" / "trafficserver",
        "mandir": "/usr/share/man", "infodir": "/usr/share/info", "cachedir": cache,
    }  # fmt: skip
    records = {
        "http.server_ports STRING": f"{port}:ssl:ip-in=127.0.0.1",
        "ssl.server.cert.path STRING": certificate.parent,
        "ssl.server.private_key.path STRING": certificate.parent,
        "ssl.server.ticket_key.filename STRING": keys,
        "exec_thread.autoconfig.enabled INT": 0,
        "exec_thread.limit INT": 1,
        "admin.user_id STRING": "#-1",
        "url_remap.remap_required INT": 1,
    }
    (directory / "runroot.yaml").write_text("".join(f"{name}: {path}\n" for name, path in places.items()))
    files = {
        "records.config": "".join(f"CONFIG proxy.config.{name} {value}\n" for name, value in records.items()),
        "storage.config": f"{cache} 16M\n",
        "ssl_multicert.config": f"dest_ip=* ssl_cert_name={certificate.name} ssl_key_name={certificate.name}\n",
        "remap.config": "",
    }
    for name, text in files.items():
        (etc / name).write_text(text)
    return [f"--run-root={directory}/runroot.yaml"]


@contextlib.contextmanager
def running_agent(target: str, keyring: Path, *options: str, namespace: str = "shop") -> Iterator[RunningServer]:
    """Run `resumed ticket-keys` until the end."""
    agent = start_agent(target, keyring, *options, namespace=namespace)
    try:
        yield agent
    finally:
        agent.stop()


def start_agent(target: str, keyring: Path, *options: str, namespace: str = "shop") -> RunningServer:
    """Run `resumed ticket-keys`, and wait for nothing."""
    command: Sequence[str] = (sys.executable, "-m", "resumed_server", "ticket-keys", target)
    return RunningServer([*command, "--namespace", namespace, "--keyring", str(keyring), *options])


def write_reload_script(path: Path, servers: Callable[[], Sequence[TicketServer]]) -> Callable[[], None]:
    """Write a program that reloads servers, for --reload; return a function that brings it up to date."""

    def update() -> None:
        lines = [" ".join(each.reload_command) for each in servers() if each.reload_command]
        new = path.with_suffix(".new")
        new.write_text("\n".join(["#!/bin/sh", "set -e", *lines, "true", ""]))
        new.chmod(0o755)
        new.replace(path)

    update()
    return update
