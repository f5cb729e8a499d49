"""A hash table of numbers in memory that a process shares with the processes it forks."""

from __future__ import annotations

import mmap
import os
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_SLOTS = 1 << 13
"""More slots than names are in use at the same time."""
_PROBES = 8
_KEY_BYTES = 16
_NUMBER_BYTES = 8


class SharedSlots:
    """Slots, each with the hash of its name (0: none) and one number in every column.

    No lock guards them. Two processes that write the same slot at the same moment may lose one of the two updates.

    Args:
        formats: The columns: "d" for one of floats, "q" for one of signed integers.

    Attributes:
        names: The hashes of names, by slot.
        columns: The columns, each by slot.
    """

    def __init__(self, formats: str) -> None:
        self._key = os.urandom(_KEY_BYTES)
        size = _NUMBER_BYTES * _SLOTS
        memory = memoryview(mmap.mmap(-1, size * (1 + len(formats))))  # anonymous, so shared with forked processes
        parts: list[Any] = [memory[start : start + size] for start in range(0, len(memory), size)]
        self.names, *self.columns = (part.cast(kind) for part, kind in zip(parts, "Q" + formats, strict=True))

    def hash_name(self, name: str) -> int:
        """Return the hash of a name. Without the random key, a caller cannot choose names that collide with others."""
        return int.from_bytes(blake2b(name.encode(), digest_size=8, key=self._key).digest(), "big")

    def find(self, name: int) -> int | None:
        """Return the slot of a name, None if it has none."""
        return next((slot for slot in _candidates(name) if self.names[slot] == name), None)

    def claim(self, name: int, is_free: Callable[[int], bool]) -> int:
        """Return the slot of a name; assign one of those that `is_free` accepts if it has none.

        Without a free slot, the name shares one with another name. That takes thousands of names in use.
        """
        slot = self.find(name)
        if slot is not None:
            return slot
        for slot in _candidates(name):
            if is_free(slot):
                self.names[slot] = name
                return slot
        return name % _SLOTS


def _candidates(name: int) -> list[int]:
    return [(name + step) % _SLOTS for step in range(_PROBES)]
