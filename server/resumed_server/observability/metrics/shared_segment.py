"""Memory that all workers share: each pins what it counted to a place of its own, and anyone reads all of it.

It is made before the workers are, and needs neither files nor a process that must live. A place has two halves, written
in turns and each with its checksum, so that one of them is whole whatever becomes of the writer. The worker that takes
a dead one's place goes on from what is there: counters never go back.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import struct
import threading
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAX_NAMESPACES = 64
"""Namespaces that have figures of their own; those of all others are added up."""

_NAME_BYTES = 64  # a namespace has at most 63, and a zero ends it
_HALF_BYTES = 64 << 10  # three times what MAX_NAMESPACES of the longest names and largest figures take
_HEADER = struct.Struct("<QLL")  # turn, length, checksum


class Board:
    """Places for `workers` processes that are forked later.

    Args:
        workers: How many.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._file = os.memfd_create("resumed-metrics")
        self._places = MAX_NAMESPACES * _NAME_BYTES
        os.truncate(self._file, self._places + workers * 2 * _HALF_BYTES)
        self._memory = mmap.mmap(self._file, 0)
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def admit(self, namespace: str) -> bool:
        """Return whether a namespace is one of the first MAX_NAMESPACES that any worker asked for."""
        if namespace in self._names:
            return True
        if len(self._names) == MAX_NAMESPACES:
            return False
        with self._lock, self._locked():
            self._names = names = set(self._named())
            if namespace in names or len(names) == MAX_NAMESPACES:
                return namespace in names
            start = len(names) * _NAME_BYTES
            self._memory[start : start + _NAME_BYTES] = namespace.encode().ljust(_NAME_BYTES, b"\0")
            names.add(namespace)
            return True

    def pin(self, worker: int, figures: Mapping[str, Any]) -> None:
        """Replace what a worker pinned before; nobody else may write to its place.

        Raises:
            ValueError: It does not fit.
        """
        content = json.dumps(figures, separators=(",", ":")).encode()
        if len(content) > _HALF_BYTES - _HEADER.size:
            raise ValueError(f"{len(content)} bytes of figures do not fit on the board")
        turn = 1 + max((turn for turn, _ in self._halves(worker)), default=0)
        start = self._start(worker, turn)
        header = _HEADER.pack(turn, len(content), zlib.crc32(content))
        self._memory[start : start + len(header) + len(content)] = header + content

    def read(self, worker: int) -> dict[str, Any] | None:
        """Return what a worker pinned last, if it ever did."""
        newest = max(self._halves(worker), default=None)
        return json.loads(newest[1]) if newest else None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes out; threads of this one it keeps not."""
        fcntl.lockf(self._file, fcntl.LOCK_EX)  # let go of whatever ends the process
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _named(self) -> list[str]:
        table = self._memory[: self._places]
        names = (table[start : start + _NAME_BYTES].rstrip(b"\0") for start in range(0, len(table), _NAME_BYTES))
        return [name.decode() for name in names if name]

    def _halves(self, worker: int) -> list[tuple[int, bytes]]:
        """Return those halves of a place that are whole: their turn and content."""
        whole = []
        for half in range(2):
            start = self._start(worker, half)
            turn, length, checksum = _HEADER.unpack_from(self._memory, start)
            content = self._memory[start + _HEADER.size : start + min(_HALF_BYTES, _HEADER.size + length)]
            if content and zlib.crc32(content) == checksum:  # of nothing it is zero, as untouched memory is
                whole.append((turn, content))
        return whole

    def _start(self, worker: int, turn: int) -> int:
        return self._places + (2 * worker + turn % 2) * _HALF_BYTES
