"""Helpers of the tests of `resumed serve`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from typing import TYPE_CHECKING

import grpc

from support.command import run_command
from support.server import COMMAND, PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from support.server import RunningServer


def complaints_of(*options: str, env: dict[str, str] | None = None, prefix: Sequence[str] = ()) -> list[str]:
    """Run a server that must not start, and return its complaints, whether log lines or text."""
    done = subprocess.run(
        [*prefix, *COMMAND, *options],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    complaints = []
    for line in done.stderr.splitlines():
        if not line.startswith("{"):
            complaints.append(line)
        elif (logged := json.loads(line))["event"] == "cannot start":
            complaints.append(f"resumed: {logged['problem']}")
    assert all(line.startswith("resumed: ") for line in complaints), done.stderr
    return complaints


def read_settings(*options: str, env: dict[str, str] | None = None) -> dict[str, str]:
    """Return the settings that `--check` prints."""
    done = run_command("serve", *options, "--check", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(re.split(r" +", line, maxsplit=1) for line in done.stdout.splitlines())


def is_alive(process: int) -> bool:
    """Return whether the process exists; a zombie does not count."""
    with contextlib.suppress(OSError), open(f"/proc/{process}/stat", encoding="ascii") as state:  # noqa: PTH123
        return state.read().rpartition(")")[2].split()[0] != "Z"
    return False


@contextlib.contextmanager
def open_channel(server: RunningServer) -> Iterator[grpc.Channel]:
    """Yield a new connection."""
    with grpc.insecure_channel(server.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield channel
