"""README's first steps, as a reader types them: from nothing to a frontend of one's own."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from docs.markdown import blocks, commands
from support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Sequence

README = Path("README.md")
_LAST = "-sess_in session.pem"
_MARK = "the command is done:"


class Step(NamedTuple):
    """Something to type; `program` is what to save as frontend.py instead."""

    text: str
    program: str = ""


def steps() -> list[Step]:
    """Return the steps in their order, with ports that are free in place of those that README has."""
    parts = [(command.line, command.text, "") for command in commands(README) if command.typed]
    program = next(block for block in blocks(README) if block.language == "python")
    parts.append((program.line, "frontend.py", "\n".join(program.lines) + "\n"))
    ports = {port: str(free_port()) for port in ("7400", "8443", "8444")}
    found = []
    for _, text, program_text in sorted(parts):
        found.append(Step(_moved(text, ports), _moved(program_text, ports)))
        if text.endswith(_LAST):
            break
    return found


def _moved(text: str, ports: dict[str, str]) -> str:
    text = re.sub(r"(127\.0\.0\.1:|frontend\.py )(\d+)", lambda found: found[1] + ports[found[2]], text)
    return re.sub(r"^resumed serve", f"resumed serve --listen 127.0.0.1:{ports['7400']}", text)


def answers(port: str) -> bool:
    """Return whether a server accepts connections."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), 1.0):
        return True
    return False


class Shell:
    """A shell that is typed into; all that it started ends with it.

    Args:
        command: What starts a POSIX shell that reads commands.
    """

    def __init__(self, command: Sequence[str], **options: object) -> None:
        self._process = subprocess.Popen(  # type: ignore[call-overload]
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
        )

    def run(self, text: str) -> tuple[int, str]:
        """Run a command; return its exit status and output."""
        # Without braces around it a job is the program itself, and ends with it.
        job = f"{text.removesuffix('&')} < /dev/null &" if text.endswith("&") else f"{{ {text}\n}} < /dev/null"
        self._process.stdin.write(f"{job}\n")
        self._process.stdin.write(f"echo '{_MARK}' $?\n")
        self._process.stdin.flush()
        printed = ""
        for line in self._process.stdout:
            before, mark, status = line.partition(_MARK)
            printed += before
            if mark:
                return int(status), printed
        raise AssertionError(f"the shell has ended: {printed}")

    def close(self) -> None:
        """End the shell and its jobs."""
        self._process.stdin.write("kill $(jobs -p); wait\n")
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
