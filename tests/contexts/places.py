"""Servers with several hosts on one port, configured as cases.toml says: a Place is a process of one of SERVERS."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ROOT = Path(__file__).parents[2]
BUILD = ROOT / ".build" / "contexts"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PATIENCE = 30.0
"""Seconds that a server may take to start or to end; only a broken one takes them."""
HTTP, REDIS, MQTT, LINES = "http", "redis", "mqtt", "lines"


@dataclass(frozen=True)
class Exchange:
    """A protocol of one request: a client that is served receives a text that others do not."""

    request: bytes
    served: bytes
    start_tls: str = ""
    """The protocol that begins in plain text: `postgresql` or `mysql`."""


@dataclass(frozen=True)
class Profile:
    """How a host is configured: a [host.NAME] of cases.toml."""

    certificates: Sequence[str] = ("site",)
    verify: str = ""
    ca: str = "one"
    depth: int | None = None
    crl: str = ""
    id_context: str = ""
    per_connection: bool = False
    namespace: str = ""
    location: bool = False
    redirect: bool = False
    check_host: str = ""
    security_level: int | None = None
    partial_chain: bool = False


@dataclass(frozen=True)
class Host:
    """A host of a port: which profile, and what chooses it: "" (the first host), a server name, `alpn`, or `switch`."""

    by: str
    name: str
    profile: Profile


@dataclass(frozen=True)
class Library:
    """A version of the clients: where the libraries are, and what Python imports."""

    preload: Path
    c_server: Path
    python: Sequence[Path]


@dataclass(frozen=True)
class Settings:
    """Options of an installed client."""

    library: Library
    target: str
    namespace: str
    keyring: Path
    verified: bool = False
    ignore_id_context: bool = False
    single_host: bool = False
    mirror: bool = False
    single_use: bool = False
    tickets: bool = False

    def environment(self) -> dict[str, str]:
        """Return the environment that puts the preloaded library under a server."""
        named = {
            "target": self.target, "namespace": self.namespace, "keyring": str(self.keyring), "deadline": "5",
            "mirror": "1MiB" if self.mirror else "0", "single_use": str(int(self.single_use)), "puts": "wait",
        }  # fmt: skip
        if self.verified:
            named["verified_namespace"] = f"{self.namespace}.verified"
        if self.ignore_id_context:
            named["ignore_id_context"] = "1"
        if self.tickets:
            named |= {"sessions": "tickets", "tickets_tls12": "1"}
        return {
            "LD_PRELOAD": str(self.library.preload),
            **{f"RESUMED_{name.upper()}": each for name, each in named.items()},
        }

    def arguments(self) -> dict[str, object]:
        """Return the arguments of resumed.install()."""
        named: dict[str, object] = {
            "target": self.target, "namespace": self.namespace, "keyring": str(self.keyring), "deadline": 5.0,
            "puts": "wait", "ignore_id_context": self.ignore_id_context, "mirror": self.mirror,
            "single_use": self.single_use,
        }  # fmt: skip
        return named | ({"sessions": "tickets", "tickets_tls12": True} if self.tickets else {})

    def options(self) -> list[str]:
        """Return the options of server.c."""
        options = ["--target", self.target, "--namespace", self.namespace, "--keyring", str(self.keyring)]
        options += ["--mirror"] if self.mirror else []
        options += ["--single-use"] if self.single_use else []
        options += ["--ignore-id-context"] if self.ignore_id_context else []
        options += ["--tickets"] if self.tickets else []
        return options + (["--single-host"] if self.single_host else [])


@dataclass
class Site:
    """Parameters of a server's configuration."""

    hosts: Sequence[Host]
    directory: Path
    port: int
    certificates: Path
    backends: Sequence[int]
    environment: Mapping[str, str] = field(default_factory=dict)
    """The settings of the library, for servers that start their workers without the environment."""
    files: dict[str, str] = field(default_factory=dict)
    prepare: str = ""
    """A script of the shell, run in the server's directory as root before the server starts."""

    def server_files(self, host: Host) -> list[Path]:
        """Return the files with a host's certificates and keys."""
        return [self.certificates / f"{name}.pem" for name in host.profile.certificates]

    def ca(self, host: Host) -> Path:
        """Return the file with the authorities that a host trusts."""
        return self.certificates / f"ca-{host.profile.ca}.pem"

    def crl(self, host: Host) -> Path:
        """Return the file with a host's CRL."""
        return self.certificates / f"crl-{host.profile.crl}.pem"


def _nginx(site: Site) -> list[str]:
    servers = []
    for host in site.hosts:
        profile = host.profile
        lines = [f"listen 127.0.0.1:{site.port} ssl{'' if host.by else ' default_server'};"]
        lines.append(f"server_name {host.by or 'localhost'};")
        lines += [f"ssl_certificate {path}; ssl_certificate_key {path};" for path in site.server_files(host)]
        if profile.verify:
            word = {"require": "on", "optional": "optional", "optional_no_ca": "optional_no_ca"}[profile.verify]
            lines.append(f"ssl_verify_client {word}; ssl_client_certificate {site.ca(host)};")
        if profile.depth is not None:
            lines.append(f"ssl_verify_depth {profile.depth};")
        if profile.crl:
            lines.append(f"ssl_crl {site.crl(host)};")
        lines.append(f'return 200 "served {host.name}, client $ssl_client_verify $ssl_client_s_dn\\n";')
        servers.append("server {\n  " + "\n  ".join(lines) + "\n}")
    text = "\n".join(servers)
    site.files["config"] = f"""daemon off; user root; worker_processes 1; pid {site.directory}/pid;
error_log {site.directory}/error.log info;
events {{ worker_connections 512; }}
http {{ access_log off; client_body_temp_path {site.directory}/body; ssl_protocols TLSv1.2 TLSv1.3;
{text}
}}
"""
    return ["/usr/sbin/nginx", "-p", "{d}", "-e", "{d}/error.log", "-c", "{d}/config"]


_APACHE = """ServerRoot {d}
PidFile {d}/pid
ErrorLog {d}/error.log
Mutex file:{d}
StartServers 1
ServerLimit 1
ThreadsPerChild 8
MinSpareThreads 8
MaxSpareThreads 8
MaxRequestWorkers 8
LoadModule mpm_event_module {m}/mod_mpm_event.so
LoadModule authz_core_module {m}/mod_authz_core.so
LoadModule headers_module {m}/mod_headers.so
LoadModule mime_module {m}/mod_mime.so
LoadModule dir_module {m}/mod_dir.so
LoadModule socache_shmcb_module {m}/mod_socache_shmcb.so
LoadModule ssl_module {m}/mod_ssl.so
TypesConfig /dev/null
DirectoryIndex index.html
SSLSessionCache shmcb:{d}/cache(512000)
SSLProtocol -all +TLSv1.2 +TLSv1.3
ServerName localhost:443
Listen 127.0.0.1:{port}
<Directory />
  Require all granted
</Directory>
"""


def _apache(site: Site) -> list[str]:
    parts = [_APACHE.format(d=site.directory, m="/usr/lib/apache2/modules", port=site.port)]
    words = {"require": "require", "optional": "optional", "optional_no_ca": "optional_no_ca"}
    for number, host in enumerate(site.hosts):
        profile = host.profile
        # The port in a name is a part of the id context: as on two machines, it is the same at both places.
        lines = [f"ServerName {host.by or 'localhost'}:443", f"DocumentRoot {site.directory}/{number}", "SSLEngine on"]
        lines.append('Header set X-Client "%{SSL_CLIENT_VERIFY}s %{SSL_CLIENT_S_DN}s"')
        for path in site.server_files(host):
            lines += [f"SSLCertificateFile {path}", f"SSLCertificateKeyFile {path}"]
        if profile.verify:
            lines.append(f"SSLCACertificateFile {site.ca(host)}")
            verify = f"SSLVerifyClient {words[profile.verify]}"
            lines.append(f"<Location /admin>\n{verify}\n</Location>" if profile.location else verify)
        if profile.depth is not None:
            lines.append(f"SSLVerifyDepth {profile.depth}")
        if profile.crl:
            lines += [f"SSLCARevocationFile {site.crl(host)}", "SSLCARevocationCheck leaf"]
        text = "\n".join(lines)
        parts.append(f"<VirtualHost 127.0.0.1:{site.port}>\n{text}\n</VirtualHost>")
        for page in "index.html", "admin":
            site.files[f"{number}/{page}"] = f"served {host.name}, "
    site.files["config"] = "\n".join(parts) + "\n"
    return ["/usr/sbin/apache2", "-DFOREGROUND", "-f", "{d}/config"]


def _haproxy(site: Site) -> list[str]:
    def line(host: Host) -> str:
        profile, crt = host.profile, " ".join(map(str, site.server_files(host)[:1]))
        # The first line is the default of the port; the first one whose filter has a name serves it.
        return f"{crt} [{verification(profile)}] {host.by or 'first.invalid'}"

    def verification(profile: Profile) -> str:
        if not profile.verify:
            return ""
        word = "required" if profile.verify == "require" else "optional"
        text = f"verify {word} ca-file {site.certificates}/ca-{profile.ca}.pem"
        text += f" crl-file {site.certificates}/crl-{profile.crl}.pem" if profile.crl else ""
        return text + (" crt-ignore-err all ca-ignore-err all" if profile.verify == "optional_no_ca" else "")

    first, several = site.hosts[0], len(site.hosts) > 1
    site.files["list"] = "".join(f"{line(host)}\n" for host in site.hosts)
    certificates = " ".join(f"crt {path}" for path in site.server_files(first))
    bind = f"crt-list {site.directory}/list" if several else f"{certificates} {verification(first.profile)}"
    answer = "served %[ssl_fc_sni,lower], client %[ssl_c_verify] %[ssl_c_s_dn]"
    site.files["config"] = f"""global
  nbthread 1
defaults
  mode http
  timeout client 60s
  timeout server 60s
  timeout connect 5s
frontend tls
  bind 127.0.0.1:{site.port} ssl {bind} ssl-min-ver TLSv1.2
  http-request return status 200 content-type text/plain lf-string "{answer}"
"""
    return ["/usr/sbin/haproxy", "-W", "-db", "-f", "{d}/config"]


def _stunnel(site: Site) -> list[str]:
    sections = []
    for number, host in enumerate(site.hosts):
        profile, (path, *_) = host.profile, site.server_files(host)
        lines = [f"cert = {path}", f"key = {path}", f"connect = 127.0.0.1:{site.backends[0]}"]
        if number:
            lines.append(f"sni = tls:{host.by}")
        else:
            lines += [f"accept = 127.0.0.1:{site.port}", "sslVersionMin = TLSv1.2"]
        if profile.verify:
            lines += ["verifyChain = yes", f"CAfile = {site.ca(host)}"]
            lines += ["requireCert = no"] if profile.verify == "optional" else []
        lines += [f"CRLfile = {site.crl(host)}"] if profile.crl else []
        lines += [f"redirect = 127.0.0.1:{site.backends[1]}"] if profile.redirect else []
        lines += [f"checkHost = {profile.check_host}"] if profile.check_host else []
        sections.append(f"[{'host' + str(number) if number else 'tls'}]\n" + "\n".join(lines))
    site.files["config"] = "foreground = yes\npid =\ndebug = notice\n" + "\n".join(sections) + "\n"
    return ["/usr/bin/stunnel4", "{d}/config"]


def _lighttpd(site: Site) -> list[str]:
    root = (site.certificates / "ca-servers.pem").read_text()

    def lines(number: int, host: Host) -> str:
        (original, *_), profile = site.server_files(host), host.profile
        # With ssl.ca-file, lighttpd builds the chain of its own certificate from that, unless the file has a chain.
        site.files[f"{number}.pem"] = original.read_text() + root
        path = site.directory / f"{number}.pem"
        text = f'ssl.pemfile = "{path}"\nssl.privkey = "{path}"\n'
        if profile.verify:
            text += f'ssl.ca-file = "{site.ca(host)}"\nssl.verifyclient.activate = "enable"\n'
            text += 'ssl.verifyclient.enforce = "enable"\n' if profile.verify == "require" else (
                'ssl.verifyclient.enforce = "disable"\n'
            )  # fmt: skip
        if profile.depth is not None:
            text += f"ssl.verifyclient.depth = {profile.depth}\n"
        if profile.crl:
            text += f'ssl.ca-crl-file = "{site.crl(host)}"\n'
        return text

    first, *others = site.hosts
    site.files["www/index.html"] = "served\n"
    site.files["config"] = f"""server.document-root = "{site.directory}/www"
server.port = {site.port}
server.bind = "127.0.0.1"
server.modules = ( "mod_openssl" )
server.errorlog = "{site.directory}/error.log"
index-file.names = ( "index.html" )
ssl.engine = "enable"
ssl.openssl.ssl-conf-cmd = ("MinProtocol" => "TLSv1.2")
{lines(0, first)}
""" + "\n".join(f'$HTTP["host"] == "{host.by}" {{\n{lines(number, host)}}}' for number, host in enumerate(others, 1))
    return ["/usr/sbin/lighttpd", "-D", "-f", "{d}/config"]


def _trafficserver(site: Site) -> list[str]:
    root = site.directory / "ts"
    etc = root / "etc" / "trafficserver"
    for path in etc, root / "var" / "log" / "trafficserver", root / "run", root / "cache":
        path.mkdir(parents=True)
    shutil.copytree("/etc/trafficserver", etc, dirs_exist_ok=True, symlinks=False)
    first, *others = site.hosts
    names = ",".join(path.name for path in site.server_files(first))
    places = {
        "prefix": root, "exec_prefix": "/usr", "bindir": "/usr/bin", "sbindir": "/usr/sbin", "sysconfdir": etc,
        "datadir": root / "cache", "includedir": "/usr/include", "libdir": "/usr/lib/trafficserver",
        "libexecdir": "/usr/lib/trafficserver/modules", "localstatedir": root / "var", "runtimedir": root / "run",
        "logdir": root / "var" / "log" / "trafficserver", "mandir": "/usr/share/man", "infodir": "/usr/share/info",
        "cachedir": root / "cache",
    }  # fmt: skip
    records = {
        "http.server_ports STRING": f"{site.port}:ssl:ip-in=127.0.0.1",
        "ssl.server.cert.path STRING": site.certificates,
        "ssl.server.private_key.path STRING": site.certificates,
        "exec_thread.autoconfig.enabled INT": 0,
        "exec_thread.limit INT": 1,
        "admin.user_id STRING": "#-1",
        "url_remap.remap_required INT": 1,
    }
    verifying = next((host for host in site.hosts if host.profile.verify), None)
    if verifying:
        records["ssl.CA.cert.filename STRING"] = site.ca(verifying)
    if first.profile.verify:
        records["ssl.client.certification_level INT"] = 2 if first.profile.verify == "require" else 1
    sni = "\n".join(
        f"- fqdn: {host.by}\n  verify_client: {'STRICT' if host.profile.verify == 'require' else 'NONE'}"
        for host in others
    )
    site.files |= {
        "ts/runroot.yaml": "".join(f"{name}: {path}\n" for name, path in places.items()),
        "ts/etc/trafficserver/records.config": "".join(
            f"CONFIG proxy.config.{name} {value}\n" for name, value in records.items()
        ),
        "ts/etc/trafficserver/storage.config": f"{root}/cache 16M\n",
        "ts/etc/trafficserver/ssl_multicert.config": f"dest_ip=* ssl_cert_name={names} ssl_key_name={names}\n",
        "ts/etc/trafficserver/remap.config": f"map / http://127.0.0.1:{site.backends[0]}/\n",
        "ts/etc/trafficserver/sni.yaml": f"sni:\n{sni}\n" if others else "",
    }
    return ["/usr/bin/traffic_server", "--run-root={d}/ts/runroot.yaml"]


def _redis(site: Site) -> list[str]:
    (host,) = site.hosts
    (path, *_), profile = site.server_files(host), host.profile
    word = {"": "no", "optional": "optional", "require": "yes"}[profile.verify]
    return [
        "/usr/bin/redis-server", "--port", "0", "--bind", "127.0.0.1", "--tls-port", str(site.port), "--tls-cert-file",
        str(path), "--tls-key-file", str(path), "--tls-ca-cert-file", str(site.ca(host)), "--tls-auth-clients", word,
        "--save", "", "--dir", "{d}", "--protected-mode", "no",
    ]  # fmt: skip


def _mosquitto(site: Site) -> list[str]:
    (host,) = site.hosts
    (path, *_), profile = site.server_files(host), host.profile
    text = f"listener {site.port} 127.0.0.1\ncertfile {path}\nkeyfile {path}\nallow_anonymous true\nuser root\n"
    if profile.verify:
        text += f"cafile {site.ca(host)}\nrequire_certificate {'true' if profile.verify == 'require' else 'false'}\n"
    if profile.crl:
        text += f"crlfile {site.crl(host)}\n"
    site.files["config"] = text
    return ["/usr/sbin/mosquitto", "-c", "{d}/config"]


@dataclass(frozen=True)
class Kind:
    """One of SERVERS."""

    program: str
    protocol: str | Exchange
    configure: Callable[[Site], list[str]] | None = None
    root: Path | None = None
    """The root directory of the server's file system, if that is not this machine's."""
    user: str = "root"

    def run_in_root(self, directory: Path, command: Sequence[str]) -> list[str]:
        """Return the command line that runs a command with the server's root directory, user and working directory."""
        if not self.root:
            return list(command)
        into = ["chroot", *([f"--userspec={self.user}:"] if self.user != "root" else []), str(self.root)]
        return [*into, "/bin/sh", "-c", 'cd "$1"; shift; exec "$@"', "sh", str(directory), *command]


SERVERS = {
    "ssl": Kind(sys.executable, LINES),
    "asyncio": Kind(sys.executable, LINES),
    "pyopenssl": Kind(sys.executable, LINES),
    "c": Kind("", LINES),
    "nginx": Kind("/usr/sbin/nginx", HTTP, _nginx),
    "apache": Kind("/usr/sbin/apache2", HTTP, _apache),
    "haproxy": Kind("/usr/sbin/haproxy", HTTP, _haproxy),
    "stunnel": Kind("/usr/bin/stunnel4", HTTP, _stunnel),
    "lighttpd": Kind("/usr/sbin/lighttpd", HTTP, _lighttpd),
    "trafficserver": Kind("/usr/bin/traffic_server", HTTP, _trafficserver),
    "redis": Kind("/usr/bin/redis-server", REDIS, _redis),
    "mosquitto": Kind("/usr/sbin/mosquitto", MQTT, _mosquitto),
}
PRELOADED = tuple(name for name, kind in SERVERS.items() if kind.configure)


class Forked:
    """A frontend in Python: a process that frontend.py has forked. It is used as a Popen is."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._descriptor = os.pidfd_open(pid)
        except ProcessLookupError:  # it has ended already
            self._descriptor = -1

    @classmethod
    def begin(cls, description: str, library: Library, *, imports: Sequence[str]) -> Forked:
        """Begin one that serves as `description` says, with a version of the client to import."""
        with _lock:
            forge = _forge(os.pathsep.join(map(str, library.python)), *imports)
            assert forge.stdin
            assert forge.stdout
            forge.stdin.write(f"{description}\n")
            forge.stdin.flush()
            return cls(int(forge.stdout.readline()))

    def poll(self) -> int | None:
        """Return None while it runs."""
        return None if self._descriptor >= 0 and not self._ended(0.0) else 0

    def terminate(self) -> None:
        """Ask it to end."""
        if self._descriptor >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGTERM)

    def wait(self, timeout: float = PATIENCE) -> None:
        """Wait until it has ended, for some seconds."""
        if self._descriptor >= 0:
            if not self._ended(timeout):
                raise subprocess.TimeoutExpired("frontend.py", timeout)
            os.close(self._descriptor)
            self._descriptor = -1

    def _ended(self, timeout: float) -> bool:
        return bool(select.select([self._descriptor], [], [], timeout)[0])


@cache
def _forge(path: str, *imports: str) -> subprocess.Popen[str]:
    """Return the process that forks frontends with this path of Python; it ends when this process does."""
    forge = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("frontend.py")), *imports], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
    )  # fmt: skip
    atexit.register(forge.communicate)
    return forge


class Place:
    """A server's process with hosts on one port of 127.0.0.1."""

    def __init__(
        self,
        server: str,
        hosts: Sequence[Host],
        certificates: Path,
        settings: Settings | None,
        library: Library,
        *,
        kind: Kind | None = None,
    ) -> None:
        self.server, self.kind = server, kind or SERVERS[server]
        root = self.kind.root
        self.directory = Path(tempfile.mkdtemp(prefix=f"resumed-contexts-{server}-", dir=root and root / "tmp"))
        self.directory.chmod(0o755)
        self.port = next_port()
        self.switch = self.directory / "switch"
        inside = Path("/") / self.directory.relative_to(root) if root else self.directory
        preloaded = settings.environment() if settings else {}
        site = Site(hosts, inside, self.port, certificates, backends(), preloaded)
        environment, command = {"PATH": _PATH} if root else dict(os.environ), list[str]()
        if self.kind.configure:
            command = self.kind.run_in_root(inside, self.kind.configure(site))
            environment |= preloaded
        elif server == "c":
            command = [str(library.c_server), *self._c(site, settings)]
        for name, text in site.files.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        if site.prepare:
            self._prepare(site)
        self.process: subprocess.Popen[bytes] | Forked
        if not self.kind.configure and server != "c":
            self.process = Forked.begin(self._python(site, settings), library, imports=["resumed"] if settings else [])
        else:
            with (self.directory / "stderr").open("wb") as log:
                self.process = subprocess.Popen(
                    [part.replace("{d}", str(inside)) for part in command],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
                )  # fmt: skip
        try:
            self._await()
        except BaseException:
            self.stop()
            raise

    def _prepare(self, site: Site) -> None:
        command = replace(self.kind, user="root").run_in_root(site.directory, ["/bin/sh", "-ec", site.prepare])
        done = subprocess.run(
            command, check=False, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={"PATH": _PATH},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{self.server} cannot be prepared:\n{done.stdout[-2000:]}")

    def _described(self, site: Site) -> list[dict[str, object]]:
        return [
            {
                "by": host.by,
                "profile": host.name,
                "certificates": [str(path) for path in site.server_files(host)],
                "verify": host.profile.verify,
                "ca": str(site.ca(host)),
                "depth": host.profile.depth,
                "crl": str(site.crl(host)) if host.profile.crl else "",
                "id_context": host.profile.id_context,
                "namespace": host.profile.namespace,
                "per_connection": host.profile.per_connection,
                "location": host.profile.location,
                "partial_chain": host.profile.partial_chain,
                "file": str(self.switch),
            }
            for host in site.hosts
        ]

    def _python(self, site: Site, settings: Settings | None) -> str:
        description = {"stack": self.server, "port": self.port, "hosts": self._described(site)}
        log = str(self.directory / "stderr")
        return json.dumps({**description, "library": settings.arguments() if settings else None, "log": log})

    def _c(self, site: Site, settings: Settings | None) -> list[str]:
        arguments = ["--port", str(self.port), *(settings.options() if settings else [])]
        for host in site.hosts:
            profile = host.profile
            by = f"switch:{self.switch}" if host.by == "switch" else host.by
            arguments += ["--host", by, host.name]
            for path in site.server_files(host):
                arguments += ["--certificate", str(path)]
            arguments += ["--verify", profile.verify, "--ca", str(site.ca(host))] if profile.verify else []
            arguments += ["--depth", str(profile.depth)] if profile.depth is not None else []
            arguments += ["--crl", str(site.crl(host))] if profile.crl else []
            arguments += ["--id-context", profile.id_context] if profile.id_context else []
            arguments += ["--own-namespace", profile.namespace] if profile.namespace else []
            arguments += ["--check-host", profile.check_host] if profile.check_host else []
            level = profile.security_level
            arguments += ["--security-level", str(level)] if level is not None else []
            arguments += ["--location"] if profile.location else []
            arguments += ["--per-connection"] if profile.per_connection else []
        return arguments

    def _await(self) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port)):
                    if self.process.poll() is None:
                        return
            except OSError:
                pass
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.server} did not start:\n{self.log()}")
            if time.monotonic() > end:
                raise RuntimeError(f"{self.server} does not listen:\n{self.log()}")
            time.sleep(0.02)

    def log(self) -> str:
        """Return the output of the server and its workers."""
        paths = [self.directory / "stderr", *self.directory.glob("*.log")]
        return "".join(path.read_text(errors="replace")[-4000:] for path in paths if path.exists())

    def stop(self) -> list[str]:
        """End the process and its children; return the lines that the library has written."""
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own group
            self.process.wait()
        if self.kind.root:  # workers that outlive their parent
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        lines = {
            re.sub(r"process \d+", "process", line)[:200] for line in self.log().splitlines() if "resumed:" in line
        }
        shutil.rmtree(self.directory, ignore_errors=True)
        return sorted(lines)


_ports = itertools.count(20_000 + os.getpid() * 131 % 10_000)
_lock = threading.Lock()


def next_port() -> int:
    """Return a port where nothing listens, below those that the system gives to clients, and each one only once."""
    while True:
        with _lock:
            port = next(_ports)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", 20_000 + port % 12_000)):
            return 20_000 + port % 12_000


@cache
def backends() -> tuple[int, int]:
    """Start two HTTP servers for proxies: the service, and what rejected clients get."""
    return tuple(_backend(word) for word in ("served", "redirected"))  # type: ignore[return-value]


def _backend(word: str) -> int:
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: {len(word)}\r\nConnection: close\r\n\r\n{word}".encode()
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(PATIENCE)
                if connection.recv(65536):
                    connection.sendall(answer)
            except OSError:
                pass

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def available(server: str, library: Library) -> bool:
    """Return whether this machine can run a server."""
    return Path(SERVERS[server].program or library.c_server).exists()


def environment_of(library: Library) -> Mapping[str, str]:
    """Return the environment in which Python imports a version of client and server."""
    return {"PYTHONPATH": os.pathsep.join(map(str, library.python))}
