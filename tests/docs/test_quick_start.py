"""README's first steps lead to a frontend of one's own, two processes of which resume each other's sessions."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from functools import partial
from pathlib import Path

from docs.quick_start import Shell, answers, steps
from support.tls import PATIENCE
from support.waiting import until

ON_A_NEW_MACHINE = re.compile(r"sudo apt-get|git clone|make demo|\. \.venv")
"""Steps for stopwatch.py."""


def test_two_processes_resume(tmp_path: Path) -> None:
    said = {}
    environment = {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shell = Shell(["bash"], cwd=tmp_path, env=environment)
    with contextlib.closing(shell):
        for text, program in steps():
            if program:
                # A busy machine's look-ups are not late.
                (tmp_path / text).write_text(program.replace("keyring=", f"deadline={PATIENCE}, keyring="))
            elif not ON_A_NEW_MACHINE.match(text):
                status, said[text] = shell.run(text)
                assert "s_client" in text or status == 0, said[text]
                if listening := re.match(r"(?:python frontend\.py |resumed serve .*127\.0\.0\.1:)(\d+)", text):
                    until(partial(answers, listening[1]))
    first, second = (printed for text, printed in said.items() if "s_client" in text)
    assert "full handshake" in first, first
    assert "resumed" in second, second
