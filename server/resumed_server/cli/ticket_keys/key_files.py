"""Directories of ticket keys: in memory instead of on a disk."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from resumed_server.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

_MOUNTS = "/proc/self/mountinfo"
_IN_MEMORY = {"tmpfs", "ramfs"}


def verify_directory(option: str, directory: Path, *, allow_disk: bool) -> None:
    """Verify that a directory can hold keys, before the first one exists.

    Raises:
        UserError: There is no such directory, this user cannot write there, or it is on a disk.
    """
    if not directory.is_dir():
        raise UserError(
            f"{option}: there is no directory {directory}; create it, readable by this user only (mode 0700)"
        )
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(
            f"{option}: this user cannot write to {directory}; change its owner or choose another directory"
        )
    kind = file_system(directory)
    if kind not in _IN_MEMORY and not allow_disk:
        raise UserError(
            f"{option}: {directory} is on a disk ({kind}), where a key can be recovered after its end, with all "
            "connections of TLS 1.2 that were recorded; use a directory below /run or /dev/shm, or mount one: "
            f"`mount -t tmpfs -o size=1m,mode=0700 tmpfs {directory}` (Kubernetes: an emptyDir with `medium: Memory`); "
            "--allow-disk writes there nevertheless"
        )


def file_system(path: Path) -> str:
    """Return the type of the file system of a path, as in proc(5); "unknown" where the system does not show it."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError), open(_MOUNTS, encoding="utf-8", errors="replace") as mounts:  # noqa: PTH123
        for line in mounts:
            mount, _, file_system = line.partition(" - ")
            if mount.split()[2] == number:
                return file_system.split()[0]
    return "unknown"
