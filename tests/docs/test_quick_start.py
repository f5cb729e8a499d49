"""README's first steps lead to a frontend of one's own, two processes of which resume each other's sessions."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from docs.markdown import TREE
from docs.quick_start import Shell, steps
from support.tls import until

if TYPE_CHECKING:
    import pytest

ON_A_NEW_MACHINE = re.compile(r"sudo apt-get|git clone|make demo|\. \.venv")
"""Steps for stopwatch.py."""


def free_port() -> int:
    """Return a port that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def answers(port: str) -> bool:
    """Tell whether somebody listens."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), 1.0):
        return True
    return False


def test_two_processes_resume(tmp_path: Path) -> None:
    """As they stand there, but for the ports."""
    ports = {port: str(free_port()) for port in ("7400", "8443", "8444")}
    said = {}
    environment = {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shell = Shell(["bash"], cwd=tmp_path, env=environment | {"RESUMED_LISTEN": f"127.0.0.1:{ports['7400']}"})
    with contextlib.closing(shell):
        for text, program in steps():
            for port, ours in ports.items():
                text, program = (each.replace(f"127.0.0.1:{port}", f"127.0.0.1:{ours}") for each in (text, program))
            if program:
                (tmp_path / text).write_text(program)
            elif not ON_A_NEW_MACHINE.match(text):
                here = re.sub(r"frontend\.py (\d+)", lambda match: f"frontend.py {ports[match[1]]}", text)
                status, said[text], _ = shell.run(here)
                assert text.startswith("openssl s_client") or status == 0, said[text]
                if here.endswith("&") and (listening := re.search(r"frontend\.py (\d+)", here)):
                    until(lambda port=listening[1]: answers(port))
    first, second = (printed for text, printed in said.items() if "s_client" in text)
    assert "full handshake" in first, first
    assert "resumed" in second, second
