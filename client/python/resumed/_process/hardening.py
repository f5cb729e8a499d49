"""Keeps the memory of this process out of core dumps and away from debuggers."""

from __future__ import annotations

import ctypes
import resource

_PR_SET_DUMPABLE = 4  # <linux/prctl.h>


def forbid_core_dumps() -> None:
    """Have the kernel write no core dump of this process and of those that it forks from now on.

    For programs that hold a keyring: call it when they start, after they have changed their user, which undoes it. On
    Linux no other process of the same user can attach a debugger or read this one's memory either, and the files of
    /proc/PID belong to root (prctl(2), PR_SET_DUMPABLE). It is the whole process that changes, so install() leaves that
    to the application.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # also holds for programs that this one executes
    # The limit does not keep a dump from a program named in core_pattern (core(5)); this does.
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
