"""A machine that systemd boots in a container of systemd-nspawn: with this machine's /usr, all else new and empty."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from docs.quick_start import Shell
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Mapping

TREE = Path(__file__).parents[2]
_PROGRAM = """#!/bin/sh
export LD_LIBRARY_PATH=/opt/python/lib PYTHONPATH=/opt/tree/server:/opt/tree/client/python:/opt/packages
exec /opt/python/bin/python3 {} "$@"
"""


class Machine:
    """A machine with resumed in /opt/resumed, as if it were installed there, and the tree in /opt/tree.

    Args:
        directories: Further directories of this machine by their places in the other; nothing there can be changed.
    """

    def __init__(self, directories: Mapping[str, str]) -> None:
        with contextlib.ExitStack() as stack:
            programs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="machine-")))
            programs.chmod(0o755)
            for name, arguments in {"resumed": "-m resumed_server", "python": ""}.items():
                program = programs / name
                program.write_text(_PROGRAM.format(arguments))
                program.chmod(0o755)
            places = {
                "/opt/tree": str(TREE),
                "/opt/python": sys.base_prefix,
                "/opt/packages": sysconfig.get_path("purelib"),
                "/opt/resumed/bin": str(programs),
                **directories,
            }
            self._process = subprocess.Popen(
                [
                    *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--directory=/", "--volatile=yes"),
                    *("--private-network", f"--machine=resumed-{os.getpid()}", "--console=pipe"),
                    *(f"--bind-ro={source}:{target}" for target, source in places.items()),
                    *("--boot", "systemd.unit=basic.target", "systemd.mask=systemd-networkd-wait-online.service"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            stack.callback(self._process.wait)
            stack.callback(self._process.kill)
            until(lambda: self._process.poll() is not None or self.run("systemctl is-active basic.target")[0] == 0)
            assert self._process.poll() is None, "systemd-nspawn has ended; its error is above"
            self._stack = stack.pop_all()

    def close(self) -> None:
        """End it at once."""
        self._stack.close()

    def shell(self, directory: str) -> Shell:
        """Return a shell of root in a directory of the machine."""
        return Shell([*self._enter, "bash", "-c", f"mkdir -p {directory}; cd {directory} && exec bash"])

    def run(self, command: str) -> tuple[int, str]:
        """Run a command of a shell; return its exit status and output."""
        done = subprocess.run(
            [*self._enter, "bash", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    @property
    def _enter(self) -> tuple[str, ...]:
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        namespaces = ("--mount", "--net", "--pid", "--uts", "--ipc")
        return ("nsenter", f"--target={self._leader}", *namespaces, "env", "-i", path, "HOME=/root")

    @property
    def _leader(self) -> str:
        """The first process of the machine; at the start it has others before it."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return children[0] if children else "0"


def is_possible() -> bool:
    """Return whether this machine can run another one: as root, with systemd-nspawn, and with control groups."""
    probe = ("--quiet", "--register=no", "--keep-unit", "--directory=/", "--volatile=yes", "--console=pipe", "true")
    return (
        os.geteuid() == 0
        and shutil.which("systemd-nspawn") is not None
        and subprocess.run(["systemd-nspawn", *probe], capture_output=True, check=False).returncode == 0
    )
