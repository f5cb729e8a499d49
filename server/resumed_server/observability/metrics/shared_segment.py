"""Shared-memory segment through which workers publish their metrics.

It is created before the workers are forked, and needs neither files nor a server process. Each worker has two slots,
which it writes alternately, each with a checksum: one of them is valid even if the worker ends while it writes. A
replacement worker continues from the figures of its predecessor, so counters never decrease.
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
"""Number of namespaces with separate figures; all others are added up."""

_NAME_BYTES = 64  # at most 63 of a namespace, and a terminating zero
_SLOT_BYTES = 128 << 10  # twice the size of the largest figures, with MAX_NAMESPACES of the longest names
_HEADER = struct.Struct("<QLL")  # sequence number, length, checksum


class MetricsSegment:
    """The figures of `workers` processes that are forked later.

    Args:
        workers: The number of workers.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._file = os.memfd_create("resumed-metrics")
        self._names_bytes = MAX_NAMESPACES * _NAME_BYTES
        os.truncate(self._file, self._names_bytes + workers * 2 * _SLOT_BYTES)
        self._memory = mmap.mmap(self._file, 0)
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def register_namespace(self, namespace: str) -> bool:
        """Return whether a namespace is one of the first MAX_NAMESPACES that any worker registered."""
        if namespace in self._names:
            return True
        if len(self._names) == MAX_NAMESPACES:
            return False
        with self._lock, self._lock_file():
            self._names = names = set(self.namespaces())
            if namespace in names or len(names) == MAX_NAMESPACES:
                return namespace in names
            start = len(names) * _NAME_BYTES
            self._memory[start : start + _NAME_BYTES] = namespace.encode().ljust(_NAME_BYTES, b"\0")
            names.add(namespace)
            return True

    def namespaces(self) -> list[str]:
        """Return the registered namespaces."""
        table = self._memory[: self._names_bytes]
        names = (table[start : start + _NAME_BYTES].rstrip(b"\0") for start in range(0, len(table), _NAME_BYTES))
        return [name.decode() for name in names if name]

    def write(self, worker: int, figures: Mapping[str, Any]) -> None:
        """Replace the figures of a worker, which is the only process that may write them.

        Raises:
            ValueError: The figures are too large.
        """
        content = json.dumps(figures, separators=(",", ":")).encode()
        if len(content) > _SLOT_BYTES - _HEADER.size:
            raise ValueError(f"{len(content)} bytes of figures exceed the slot of a worker")
        number = 1 + max((number for number, _ in self._slots(worker)), default=0)
        start = self._start(worker, number)
        header = _HEADER.pack(number, len(content), zlib.crc32(content))
        self._memory[start : start + len(header) + len(content)] = header + content

    def read(self, worker: int) -> dict[str, Any] | None:
        """Return the latest figures of a worker; None before the first."""
        newest = max(self._slots(worker), default=None)
        return json.loads(newest[1]) if newest else None

    @contextlib.contextmanager
    def _lock_file(self) -> Iterator[None]:
        """Exclude other processes, but not other threads of this one."""
        fcntl.lockf(self._file, fcntl.LOCK_EX)  # the kernel releases it when the process ends
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _slots(self, worker: int) -> list[tuple[int, bytes]]:
        """Return the sequence number and content of the valid slots of a worker."""
        valid = []
        for slot in range(2):
            start = self._start(worker, slot)
            number, length, checksum = _HEADER.unpack_from(self._memory, start)
            content = self._memory[start + _HEADER.size : start + min(_SLOT_BYTES, _HEADER.size + length)]
            if content and zlib.crc32(content) == checksum:  # of empty content it is 0, as in untouched memory
                valid.append((number, content))
        return valid

    def _start(self, worker: int, number: int) -> int:
        return self._names_bytes + (2 * worker + number % 2) * _SLOT_BYTES
