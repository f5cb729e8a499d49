from __future__ import annotations

import base64
import contextlib
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from resumed_server.cli.ticket_keys.key_set import KeySet
from resumed_server.cli.ticket_keys.outputs import (
    HaproxyFile,
    HaproxySocket,
    NginxFiles,
    OutputError,
    TrafficServerFile,
    haproxy_lines,
)
from support.ticket_secrets import secret_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

OLD, NOW, NEXT, LATER = (secret_of(number) for number in range(4))
KEYS = KeySet(NOW, (NEXT, OLD))
ROTATED = KeySet(NEXT, (LATER, NOW))


def test_nginx_gets_a_file_for_each_key_and_the_encrypting_one_first(tmp_path: Path) -> None:
    output = NginxFiles(tmp_path)
    assert not output.has_keys()
    output.publish(KEYS)
    assert output.has_keys()
    directives = [line for line in (tmp_path / "ticket-keys.conf").read_text().splitlines() if line[0] != "#"]
    assert directives == [f'ssl_session_ticket_key "{tmp_path}/{key.name.hex()}.key";' for key in (NOW, NEXT, OLD)]
    for key in KEYS.all:
        assert (tmp_path / f"{key.name.hex()}.key").read_bytes() == key.openssl


def test_nginx_keeps_no_file_of_a_key_that_ended(tmp_path: Path) -> None:
    (tmp_path / "own.key").touch()
    output = NginxFiles(tmp_path)
    output.publish(KEYS)
    output.publish(ROTATED)
    names = {f"{key.name.hex()}.key" for key in ROTATED.all}
    assert {each.name for each in tmp_path.iterdir()} == {*names, "ticket-keys.conf", "own.key"}


def test_haproxy_gets_the_aes_key_before_the_hmac_key_and_encrypts_with_the_last_but_one(tmp_path: Path) -> None:
    output = HaproxyFile(tmp_path, needs_reload=True)
    output.publish(KEYS)
    lines = [base64.b64decode(line, validate=True) for line in (tmp_path / "ticket-keys").read_bytes().splitlines()]
    assert [line[:16] for line in lines] == [OLD.name, NOW.name, NEXT.name]
    assert lines[1] == NOW.name + NOW.openssl[48:] + NOW.openssl[16:48]


def test_haproxy_gets_three_keys_where_there_are_fewer() -> None:
    assert len(haproxy_lines(KeySet(NOW))) == 3
    assert haproxy_lines(KeySet(NOW, (OLD,)))[1] == haproxy_lines(KEYS)[1]


def test_traffic_server_gets_48_bytes_a_key_and_the_encrypting_one_first(tmp_path: Path) -> None:
    TrafficServerFile(tmp_path / "keys").publish(KEYS)
    assert (tmp_path / "keys").read_bytes() == NOW.raw48 + NEXT.raw48 + OLD.raw48


@contextlib.contextmanager
def haproxy(path: Path, answer: Callable[[str], str]) -> Iterator[list[str]]:
    """A runtime socket that answers one command in each connection; yields the commands."""
    commands: list[str] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, connection.makefile("rw") as lines:
                        commands.append(lines.readline().rstrip("\n"))
                        lines.write(answer(commands[-1]))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield commands
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_runtime_socket_gets_three_keys_in_one_command(tmp_path: Path) -> None:
    with haproxy(tmp_path / "socket", lambda _: "TLS ticket key updated!\n\n" * 3) as commands:
        HaproxySocket(str(tmp_path / "socket"), tmp_path / "ticket-keys").publish(KEYS)
    assert commands == [
        "; ".join(f"set ssl tls-key {tmp_path}/ticket-keys {line.decode()}" for line in haproxy_lines(KEYS))
    ]


def test_the_error_about_a_haproxy_without_the_file_names_those_that_it_has(tmp_path: Path) -> None:
    references = "# id (file)\n0 (/etc/haproxy/other-keys)\n\n"
    answers = {"show tls-keys": references}
    with haproxy(tmp_path / "socket", lambda command: answers.get(command, "'set ssl tls-key' unable to locate\n")):
        output = HaproxySocket(str(tmp_path / "socket"), tmp_path / "ticket-keys")
        with pytest.raises(OutputError, match=f"no `tls-ticket-keys {tmp_path}/ticket-keys`.*/etc/haproxy/other-keys"):
            output.publish(KEYS)


def test_an_error_of_haproxy_shows_no_key(tmp_path: Path) -> None:
    with haproxy(tmp_path / "socket", lambda command: f"Unknown command: '{command}'\n"):
        output = HaproxySocket(str(tmp_path / "socket"), tmp_path / "ticket-keys")
        with pytest.raises(OutputError) as raised:
            output.publish(KEYS)
    assert all(line.decode() not in str(raised.value) for line in haproxy_lines(KEYS))
