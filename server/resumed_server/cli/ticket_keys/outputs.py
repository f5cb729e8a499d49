"""The forms in which TLS servers take ticket keys. Each output publishes a KeySet to the instances of one program.

The layouts differ: nginx takes name, HMAC and AES key, HAProxy name, AES and HMAC key, and each marks the key that
encrypts in its own way.
"""

from __future__ import annotations

import base64
import re
import socket
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from resumed_server.cli.atomic_file import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from resumed._crypto.ticket_secret import TicketSecret
    from resumed_server.cli.ticket_keys.key_set import KeySet

FILE = "ticket-keys"
"""Name of the file in the directory of an output."""
_NAME_BYTES, _HMAC_BYTES = 16, 32
_SOCKET_SECONDS = 5.0
_LARGEST_ANSWER = 1 << 16


class OutputError(Exception):
    """An output did not take the keys. The text says why and what to do, and has no key."""


class Output(ABC):
    """Publishes keys to the instances of one program.

    Attributes:
        name: Its name in logs and metrics.
        needs_reload: Whether the program reads the keys only when it reloads its configuration.
    """

    name: str
    needs_reload = True

    @abstractmethod
    def publish(self, keys: KeySet) -> None:
        """Publish keys in the place of those before.

        Raises:
            OSError: A file cannot be written.
            OutputError: The program did not take the keys.
        """

    @abstractmethod
    def has_keys(self) -> bool:
        """Return whether the program has keys, from this agent or an earlier one."""


class NginxFiles(Output):
    """A file for each key, and a configuration file to include; the first directive of it encrypts."""

    name = "nginx"
    CONFIG = f"{FILE}.conf"

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def publish(self, keys: KeySet) -> None:
        """Write the keys, the configuration, and then delete the files of other keys."""
        paths = {self._directory / f"{name}.key": key for name, key in zip(keys.names, keys.all, strict=True)}
        for path, key in paths.items():
            write_atomically(path, key.openssl)
        lines = [f'ssl_session_ticket_key "{path}";\n' for path in paths]
        head = "# The first key encrypts. Written by `resumed ticket-keys`; changes are lost.\n"
        write_atomically(self._directory / self.CONFIG, (head + "".join(lines)).encode())
        for path in self._directory.iterdir():
            if path not in paths and re.fullmatch(r"[0-9a-f]{32}\.key", path.name):
                path.unlink(missing_ok=True)

    def has_keys(self) -> bool:
        """Return whether there is a configuration."""
        return (self._directory / self.CONFIG).exists()


class HaproxyFile(Output):
    """The file of `tls-ticket-keys`: three keys in base64, of which HAProxy encrypts with the second.

    Args:
        directory: Where the file is.
        needs_reload: Whether no HaproxySocket updates the running HAProxy, so that it has to be reloaded.
    """

    name = "haproxy"

    def __init__(self, directory: Path, *, needs_reload: bool) -> None:
        self.path = directory / FILE
        self.needs_reload = needs_reload

    def publish(self, keys: KeySet) -> None:
        """Write the file."""
        write_atomically(self.path, b"".join(line + b"\n" for line in haproxy_lines(keys)))

    def has_keys(self) -> bool:
        """Return whether the file exists."""
        return self.path.exists()


class HaproxySocket(Output):
    """A runtime socket of HAProxy, through which its keys change without a reload.

    Args:
        socket_path: The path of the socket (`stats socket PATH level admin`).
        file: The path of the file of `tls-ticket-keys` in HAProxy's configuration: HAProxy names its keys by it.
    """

    needs_reload = False

    def __init__(self, socket_path: str, file: Path) -> None:
        self.name = f"haproxy-socket {socket_path}"
        self._socket_path, self._file = socket_path, str(file)

    def publish(self, keys: KeySet) -> None:
        """Send all three keys: each of them drops the oldest that HAProxy has."""
        commands = [f"set ssl tls-key {self._file} {line.decode()}" for line in haproxy_lines(keys)]
        answers = self._ask("; ".join(commands)).split("\n")
        updated = sum(answer == "TLS ticket key updated!" for answer in answers)
        if updated != len(commands):
            raise OutputError(self._explain())

    def has_keys(self) -> bool:
        """Return True: HAProxy does not start without the file."""
        return True

    def _explain(self) -> str:
        """Return why HAProxy did not take the keys. Its own answer is not shown, since it could repeat a command."""
        references = re.findall(r"^\d+ \((.*)\)$", self._ask("show tls-keys"), re.MULTILINE)
        if self._file in references:
            return "HAProxy refused the keys; the socket needs `level admin`"
        used = ", ".join(references) or "none"
        return (
            f"HAProxy has no `tls-ticket-keys {self._file}` in a `bind` line (it has: {used}), or the socket has no "
            "`level admin`; add it and reload HAProxy"
        )

    def _ask(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_SOCKET_SECONDS)
            connection.connect(self._socket_path)
            connection.sendall(command.encode() + b"\n")
            answer = b""
            while len(answer) < _LARGEST_ANSWER and (part := connection.recv(_LARGEST_ANSWER)):
                answer += part
        return answer.decode(errors="replace")


class TrafficServerFile(Output):
    """The file of `proxy.config.ssl.server.ticket_key.filename`: keys of 48 bytes, of which the first encrypts."""

    name = "trafficserver"

    def __init__(self, path: Path) -> None:
        self._path = path

    def publish(self, keys: KeySet) -> None:
        """Write the file."""
        write_atomically(self._path, b"".join(key.raw48 for key in keys.all))

    def has_keys(self) -> bool:
        """Return whether the file exists."""
        return self._path.exists()


def haproxy_lines(keys: KeySet) -> list[bytes]:
    """Return the three keys of HAProxy in base64: the previous, the encrypting and the next one."""
    return [base64.b64encode(_haproxy_form(key)) for key in (keys.previous, keys.encrypting, keys.next)]


def _haproxy_form(key: TicketSecret) -> bytes:
    hmac_end = _NAME_BYTES + _HMAC_BYTES
    return key.openssl[:_NAME_BYTES] + key.openssl[hmac_end:] + key.openssl[_NAME_BYTES:hmac_end]
