"""Resets state in a forked child.

Servers fork their workers after they created the TLS context. Threads do not survive a fork, one of them may hold a
lock that is never released, and connections are the parent's. So each object that owns such a thing is reset in the
child.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class ForkAware(Protocol):
    """Owns threads, locks or connections."""

    def after_fork_in_child(self) -> None:
        """Forget what belongs to the parent, without touching it, and begin afresh."""


_owners: weakref.WeakSet[ForkAware] = weakref.WeakSet()


def register_after_fork(owner: ForkAware) -> None:
    """Call `owner.after_fork_in_child()` in every child forked while `owner` lives."""
    _owners.add(owner)


def _after_fork_in_child() -> None:
    for owner in list(_owners):
        owner.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
