"""README's first steps lead to a frontend of one's own, two processes of which resume each other's sessions."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from functools import partial
from pathlib import Path

from docs.quick_start import Shell, answers, steps
from support.tls import PATIENCE, until

ON_A_NEW_MACHINE = re.compile(r"sudo apt-get|git clone|make demo|\. \.venv")
"""Steps for stopwatch.py."""


def free_port() -> int:
    """Return a port that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def test_two_processes_resume(tmp_path: Path) -> None:
    """As they stand there, but for ports and patience."""
    ports = {port: str(free_port()) for port in ("7400", "8443", "8444")}
    said = {}
    environment = {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shell = Shell(["bash"], cwd=tmp_path, env=environment | {"RESUMED_LISTEN": f"127.0.0.1:{ports['7400']}"})
    with contextlib.closing(shell):
        for step in steps():
            text, program = (_elsewhere(part, ports) for part in step)
            if program:
                # A busy machine's look-ups are not late.
                (tmp_path / text).write_text(program.replace("keyring=", f"deadline={PATIENCE}, keyring="))
            elif not ON_A_NEW_MACHINE.match(text):
                status, said[text] = shell.run(text)
                assert "s_client" in text or status == 0, said[text]
                if listening := re.match(r"python frontend\.py (\d+)", text):
                    until(partial(answers, listening[1]))
    first, second = (printed for text, printed in said.items() if "s_client" in text)
    assert "full handshake" in first, first
    assert "resumed" in second, second


def _elsewhere(text: str, ports: dict[str, str]) -> str:
    return re.sub(r"(127\.0\.0\.1:|frontend\.py )(\d+)", lambda found: found[1] + ports[found[2]], text)
