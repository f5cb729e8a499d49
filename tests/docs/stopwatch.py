"""Times README's first steps, from an empty machine to a frontend of one's own resuming across two processes.

    python tests/docs/stopwatch.py [--debian SUITE] [--markdown]

Without `--debian` the machine is this one, with a new directory, a new HOME and so no cache of pip's; with it an empty
Debian, made by mmdebstrap and entered with chroot, as root. Either clones this tree instead of the one on the network.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

TREE = Path(__file__).parents[2]
sys.path[:0] = [str(TREE / "tests")]

from docs.quick_start import Shell, Step, answers, steps  # noqa: E402
from support.waiting import until  # noqa: E402

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PIP = {name: value for name, value in os.environ.items() if name in {"PIP_INDEX_URL", "PIP_DEFAULT_TIMEOUT"}}
"""How pip reaches its index from this machine: not the reader's business."""
CERTIFICATES = Path(os.environ.get("PIP_CERT", ""))

_ENTER = """
set -e
cd "$1"
mount --rbind /proc proc
mount -t tmpfs tmpfs dev
for name in null zero random urandom tty full; do touch dev/$name; mount --bind /dev/$name dev/$name; done
ln -s /proc/self/fd dev/fd
mkdir dev/shm; mount -t tmpfs tmpfs dev/shm
shift
exec chroot . /usr/bin/env -i "$@"
"""


class Lap(NamedTuple):
    """A step, and the seconds that it took."""

    step: Step
    seconds: float


def laps(shell: Shell, directory: Path, *, debian: bool) -> list[Lap]:
    """Go through the steps; raise RuntimeError if one fails, or the sessions do not cross."""
    done, said = [], []
    for step in steps():
        text = re.sub(
            r"https://\S+/resumed\b", "/srv/resumed.git" if debian else str(directory / "srv/resumed.git"), step.text
        )
        if step.program:
            (directory / "resumed" / text).write_text(step.program)
            done.append(Lap(step, 0.0))
            continue
        if text.startswith("sudo "):
            if not debian:
                continue
            text = f"apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive {text.removeprefix('sudo ')}"
        started = time.monotonic()
        status, printed = shell.run(text)
        if status and "s_client" not in text:
            raise RuntimeError(f"{text}: exit status {status}\n{printed}")
        if listening := re.match(r"python frontend\.py (\d+)", text):
            until(lambda port=listening[1]: answers(port))  # type: ignore[misc]
        said.append(printed)
        done.append(Lap(step, time.monotonic() - started))
    if "full handshake" not in said[-2] or "resumed" not in said[-1]:
        raise RuntimeError(f"not resumed:\n{said[-2]}\n{said[-1]}")
    return done


def new_machine(directory: Path, suite: str | None) -> tuple[Shell, Path]:
    """Return a shell, and the directory that it is in."""
    if not suite:
        subprocess.run(["git", "clone", "--quiet", "--bare", str(TREE), str(directory / "srv/resumed.git")], check=True)
        pip = PIP | ({"PIP_CERT": str(CERTIFICATES)} if CERTIFICATES.is_file() else {})
        return Shell(["bash"], cwd=directory, env={"HOME": str(directory), "PATH": PATH, **pip}), directory
    root = directory / "root"
    root.mkdir()
    subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", suite, f"{directory}/root.tar"], check=True)
    subprocess.run(["tar", "-xf", f"{directory}/root.tar", "-C", root, "--exclude=./dev/*"], check=True)
    subprocess.run(["git", "clone", "--quiet", "--bare", str(TREE), str(root / "srv/resumed.git")], check=True)
    (root / "etc/resolv.conf").write_bytes(Path("/etc/resolv.conf").read_bytes())
    pip = dict(PIP)
    if CERTIFICATES.is_file():
        (root / "etc/pip.crt").write_bytes(CERTIFICATES.read_bytes())
        pip["PIP_CERT"] = "/etc/pip.crt"
    environment = [f"{name}={value}" for name, value in {"HOME": "/root", "PATH": PATH, **pip}.items()]
    enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _ENTER, "enter", str(root)]
    return Shell([*enter, *environment, "bash", "-c", "cd && exec bash"]), root / "root"


def main() -> None:
    """Print the laps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debian", metavar="SUITE", help="on an empty Debian, such as bookworm; as root")
    parser.add_argument("--markdown", action="store_true", help="print a table for benchmarks/results/measurements.md")
    given = parser.parse_args()
    with contextlib.ExitStack() as held:
        directory = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="stopwatch-")))
        shell, home = new_machine(directory, given.debian)
        held.callback(shell.close)
        done = laps(shell, home, debian=bool(given.debian))
    row = "| `{}` | {:.1f} |" if given.markdown else "{:<100.100} {:6.1f} s"
    for step, seconds in done:
        print(row.format(step.text, seconds))  # noqa: T201 - a tool prints
    total = sum(lap.seconds for lap in done)
    print(f"{len(done)} steps, {total / 60:.1f} minutes")  # noqa: T201


if __name__ == "__main__":
    main()
