"""The embedded engine: sessions in an LMDB file that several processes on one machine share.

Three tables, keyed so that LMDB's order is the order that is needed:

    sessions    namespace 00 key         -> expiry, value     (an empty value is a tombstone)
    expiries    expiry, namespace 00 key -> (nothing)         live sessions, the soonest to expire first
    tombstones  expiry, namespace 00 key -> (nothing)         removed and taken ones, likewise
    changes     number                   -> what, namespace 00 key    the last ones; the first entry names the store

An expiry is 8 bytes, big endian, in milliseconds since the epoch. A full store drops the first of `expiries`, never a
tombstone: a late Put would bring back what was removed.
"""

from __future__ import annotations

import contextlib
import struct
import time
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import lmdb
import structlog

from resumed_server.engines.base import (
    UNKNOWN_TOMBSTONE_SECONDS,
    AlreadyExists,
    Change,
    Engine,
    EngineBroken,
    EngineError,
    EngineFull,
    EngineUnavailable,
    Get,
    Put,
    Remove,
    StoredSession,
    Take,
    Totals,
)
from resumed_server.engines.changelog import ChangeLog
from resumed_server.engines.directory import DAMAGE, DatabaseDirectory
from resumed_server.engines.gate import CLOSED, Gate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from resumed_server.engines.base import Clock, Operation, Outcome

_T = TypeVar("_T")
_Transaction: TypeAlias = Any
"""An lmdb.Transaction, whose stubs do not know that it returns memoryviews with `buffers=True` only, else bytes."""

_TABLES = (b"sessions", b"expiries", b"tombstones", b"changes")
_EXPIRY_BYTES = 8
_milliseconds = struct.Struct(">Q").unpack_from
_END_OF_TIME = b"\xff" * _EXPIRY_BYTES
_MOST_PAGES = 16
"""More than storing a session can take beside its own bytes, however many pages of the tables it splits."""
_HEADROOM_BYTES = 64 << 20
_CHANGES_BYTES = 1 << 20
_MOST_CHANGES, _CAPACITY_PER_CHANGE = 1 << 16, 2048  # so the log takes a twentieth of the capacity at most
_OUT_OF_PAGES_RETRIES = 3
_OUT_OF_PAGES_ROOM = 1 << 20

_DAMAGED = "the database is damaged; a restart sets it aside"

_log = structlog.get_logger()


class EmbeddedEngine(Engine):
    """Keeps sessions in the LMDB database of a directory.

    Args:
        path: The directory, made if it is not there; None for a private temporary one, which close() deletes.
        capacity: Bytes of used pages above which the soonest to expire are dropped. On disk there may be half as much
            again, since making room takes pages too; the file looks that long from the start, most of it a hole.
        clock: The present, in Unix seconds. A database outlives its process, so its expiries count from the epoch.
        blame_crashes: Whether a crash of this process means that the file is damaged.

    Raises:
        EngineUnavailable: The directory cannot be used; the message says why.
    """

    def __init__(
        self, path: Path | None, *, capacity: int, clock: Clock = time.time, blame_crashes: bool = False
    ) -> None:
        self._capacity, self._clock = capacity, clock
        try:
            self._open(path, blame_crashes)
        except EngineBroken:  # what opening the file did not show; it is reported by now
            self._directory.close(trusted=False)
            self._open(path, blame_crashes)

    def put(self, namespace: str, key: bytes, value: bytes, ttl: float) -> float:
        """See Engine."""
        address = _address(namespace, key)
        return self._write(lambda txn: self._put(txn, address, value, ttl))

    def get(self, namespace: str, key: bytes) -> StoredSession | None:
        """See Engine."""
        address = _address(namespace, key)
        return self._read(lambda txn: _session(txn.get(address), self._clock()))

    def take(self, namespace: str, key: bytes) -> StoredSession | None:
        """See Engine."""
        address = _address(namespace, key)
        return self._write(lambda txn: self._take(txn, address))

    def remove(self, namespace: str, key: bytes) -> bool:
        """See Engine."""
        address = _address(namespace, key)
        return self._write(lambda txn: self._remove(txn, address))

    def batch(self, operations: Sequence[Operation]) -> list[Outcome]:
        """See Engine. Here the operations are one transaction."""
        if {type(each) for each in operations} == {Get}:
            addresses = [_address(each.namespace, each.key) for each in operations]
            return self._read(lambda txn: self._get_all(txn, addresses))
        try:
            return self._write(lambda txn: [self._carry_out(txn, each) for each in operations])
        except EngineFull:
            # The whole transaction is lost: find out one by one what still fits.
            return [self._carry_out_alone(each) for each in operations]

    def sweep(self, limit: int) -> int:
        """See Engine."""
        now = self._expiry(0)
        indexes = (self._expiries, self._tombstones)
        if not self._read(lambda txn: any(self._first(txn, index, now, 1) for index in indexes)):
            return 0  # as most often, and without a write

        def step(txn: _Transaction) -> int:
            swept = 0
            for index in indexes:
                for entry in self._first(txn, index, now, limit - swept):
                    self._drop(txn, index, entry)
                    swept += 1
            return swept

        return self._write(step)

    def position(self) -> bytes:
        """See Engine."""
        return self._read(self._changes.position)

    def changes(self, after: bytes, until: bytes, limit: int) -> tuple[list[Change], bytes] | None:
        """See Engine."""

        def read(txn: _Transaction) -> tuple[list[Change], bytes] | None:
            logged = self._changes.read(txn, after, until, limit)
            if logged is None:
                return None
            changes, position, size = [], after, 0
            for removed, address, behind in logged:
                if size > _CHANGES_BYTES:
                    break
                if change := self._change(txn, removed, address):
                    changes.append(change)
                    size += len(change.session.value) if change.session else 0
                position = behind
            return changes, position

        return self._read(read)

    def totals(self) -> Totals:
        """See Engine."""
        return self._read(lambda txn: Totals(txn.stat(self._expiries)["entries"], self._used(txn)))

    def probe(self) -> None:
        """See Engine."""
        self._read(lambda txn: txn.get(b"\0"))
        with self._gate:
            self._env.reader_check()  # what a killed process was reading must not pin old pages
            if self._directory.distrusted():
                self._gate.shut(_DAMAGED)
                raise EngineBroken(_DAMAGED)

    def close(self) -> None:
        """See Engine."""
        reason = self._gate.shut(CLOSED)
        if reason != CLOSED:
            self._gate.wait_until_empty()  # LMDB crashes if it is closed under a call
            self._directory.close(trusted=reason is None)

    def _open(self, path: Path | None, blame_crashes: bool) -> None:
        capacity = self._capacity
        self._gate = Gate()
        self._directory = DatabaseDirectory(
            path, _TABLES, map_bytes=capacity + capacity // 2 + _HEADROOM_BYTES, blame_crashes=blame_crashes
        )
        self._env = self._directory.env
        self._sessions, self._expiries, self._tombstones, changes = self._directory.tables
        kept = min(_MOST_CHANGES, capacity // _CAPACITY_PER_CHANGE)
        self._changes = self._write(lambda txn: ChangeLog(txn, changes, kept))
        self._page_bytes = self._env.stat()["psize"]
        self._most_overhead = _MOST_PAGES * self._page_bytes
        self._free: tuple[_Transaction, int] = None, 0

    def _carry_out(self, txn: _Transaction, operation: Operation) -> Outcome:
        address = _address(operation.namespace, operation.key)
        try:
            match operation:
                case Put():
                    return self._put(txn, address, operation.value, operation.ttl)
                case Get():
                    return _session(txn.get(address), self._clock())
                case Take():
                    return self._take(txn, address)
                case Remove():
                    return self._remove(txn, address)
        except AlreadyExists as error:
            return error

    def _change(self, txn: _Transaction, removed: bool, address: bytes) -> Change | None:
        namespace, _, key = address.partition(b"\0")
        session = None if removed else _session(txn.get(address), self._clock())
        return Change(namespace.decode(), key, session) if removed or session else None

    def _carry_out_alone(self, operation: Operation) -> Outcome:
        try:
            return self._write(lambda txn: self._carry_out(txn, operation))
        except EngineError as error:
            return error

    def _put(self, txn: _Transaction, address: bytes, value: bytes, ttl: float) -> float:
        old = self._unexpired(txn, address)
        if old is not None:
            if old[_EXPIRY_BYTES:] != value:
                raise AlreadyExists("the key holds another value, or was removed or taken")
            return self._remaining(old)
        expiry = self._expiry(ttl)
        self._make_room(txn, len(address) + len(value))
        txn.put(address, expiry + value, db=self._sessions)
        txn.put(expiry + address, b"", db=self._expiries)
        self._changes.append(txn, address, removed=False)
        return max(0.0, self._remaining(expiry))

    def _get_all(self, txn: _Transaction, addresses: Sequence[bytes]) -> list[Outcome]:
        now, get = self._clock(), txn.get
        return [_session(get(address), now) for address in addresses]

    def _take(self, txn: _Transaction, address: bytes) -> StoredSession | None:
        entry = txn.get(address)
        session = _session(entry, self._clock())
        if session is not None:
            self._bury(txn, address, entry)
        return session

    def _remove(self, txn: _Transaction, address: bytes) -> bool:
        entry = self._unexpired(txn, address)
        if entry is None:
            expiry = self._expiry(UNKNOWN_TOMBSTONE_SECONDS)
            self._make_room(txn, len(address))
            txn.put(address, expiry, db=self._sessions)
            txn.put(expiry + address, b"", db=self._tombstones)
            self._changes.append(txn, address, removed=True)  # a frontend may still have what the store dropped
            return False
        if len(entry) == _EXPIRY_BYTES:
            return False
        self._bury(txn, address, entry)
        return True

    def _bury(self, txn: _Transaction, address: bytes, entry: bytes) -> None:
        """Leave a tombstone in the place of a live session, until the session's own expiry."""
        expiry = entry[:_EXPIRY_BYTES]
        txn.put(address, expiry)
        txn.delete(expiry + address, db=self._expiries)
        txn.put(expiry + address, b"", db=self._tombstones)
        self._changes.append(txn, address, removed=True)

    def _unexpired(self, txn: _Transaction, address: bytes) -> bytes | None:
        """Return the session or tombstone at `address`; drop one that has expired."""
        entry: bytes | None = txn.get(address, db=self._sessions)
        if entry is None or self._remaining(entry) > 0:
            return entry
        index = self._tombstones if len(entry) == _EXPIRY_BYTES else self._expiries
        self._drop(txn, index, entry[:_EXPIRY_BYTES] + address)
        return None

    def _drop(self, txn: _Transaction, index: Any, entry: bytes) -> None:
        txn.delete(entry, db=index)
        txn.delete(entry[_EXPIRY_BYTES:], db=self._sessions)

    def _first(self, txn: _Transaction, index: Any, until: bytes, limit: int) -> list[bytes]:
        """Return up to `limit` entries of `index` that expire no later than `until`."""
        entries: list[bytes] = []
        for key in txn.cursor(index).iternext(values=False):
            entry = cast("bytes", key)
            if len(entries) == limit or entry[:_EXPIRY_BYTES] > until:
                break
            entries.append(entry)
        return entries

    def _make_room(self, txn: _Transaction, size: int) -> None:
        """Drop sessions, the soonest to expire first, if the store is over its capacity.

        Twice as much as comes in, no more: dropping entries here and there frees no page at once, but makes room in
        many.
        """
        # Counting pages takes as long as storing a session, so within a transaction it is done again only when the
        # most that was stored since then may have used up what was free. No other process writes meanwhile.
        counted, free = self._free
        if counted is txn and free > size:
            self._free = txn, free - size - self._most_overhead
            return
        free = self._capacity - self._used(txn) - size
        if free < 0:
            self._evict(txn, 2 * size)
        self._free = txn, free - self._most_overhead

    def _used(self, txn: _Transaction) -> int:
        """Return the bytes of all used pages."""
        pages: int = 0
        for table in self._directory.tables:
            stat = txn.stat(table)
            pages += stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return pages * cast("int", self._page_bytes)

    def _evict(self, txn: _Transaction, size: int) -> None:
        """Drop expired tombstones, then sessions, the soonest to expire first, until `size` bytes are free."""
        freed = 0
        for index, until in ((self._tombstones, self._expiry(0)), (self._expiries, _END_OF_TIME)):
            while freed < size and (entries := self._first(txn, index, until, 1)):
                freed += len(entries[0]) + len(txn.get(entries[0][_EXPIRY_BYTES:], b"", db=self._sessions))
                self._drop(txn, index, entries[0])
                self.evicted += index is self._expiries
        if not freed:
            raise EngineFull("no room left, and no live session to drop for it")

    def _read(self, step: Callable[[_Transaction], _T]) -> _T:
        try:
            with self._gate, self._env.begin(self._sessions) as txn:
                return step(txn)
        except lmdb.Error as error:
            raise self._translated(error) from error

    def _write(self, step: Callable[[_Transaction], _T]) -> _T:
        """Carry `step` out in a transaction of its own; where the file has no page left, make room and try again."""
        try:
            with self._gate:
                for _ in range(_OUT_OF_PAGES_RETRIES):
                    with contextlib.suppress(lmdb.MapFullError), self._env.begin(self._sessions, write=True) as txn:
                        return step(txn)
                    with self._env.begin(self._sessions, write=True) as txn:
                        self._evict(txn, _OUT_OF_PAGES_ROOM)
        except lmdb.Error as error:
            raise self._translated(error) from error
        raise EngineFull("the database file has no page left")

    def _translated(self, error: lmdb.Error) -> EngineError:
        if isinstance(error, DAMAGE):
            self._gate.shut(_DAMAGED)
            self._directory.report_damage()
            _log.critical("database damaged", cause=type(error).__name__, directory=str(self._directory.path))
            return EngineBroken(_DAMAGED)
        # The write that fills a disk is cut short, which LMDB reports as any other I/O error.
        if isinstance(error, lmdb.MapFullError | lmdb.DiskError) or self._directory.is_full():
            return EngineFull(f"no space left for the database ({type(error).__name__})")
        return EngineUnavailable(f"the database does not answer: {error}")

    def _expiry(self, ttl: float) -> bytes:
        return int((self._clock() + ttl) * 1000).to_bytes(_EXPIRY_BYTES, "big")

    def _remaining(self, entry: bytes) -> float:
        return cast("float", _milliseconds(entry)[0] / 1000 - self._clock())


def _session(entry: bytes | None, now: float) -> StoredSession | None:
    """Return the session in `entry`, None if there is none, or it is a tombstone or over."""
    if entry is None or len(entry) == _EXPIRY_BYTES:
        return None
    ttl = _milliseconds(entry)[0] / 1000 - now
    return StoredSession(entry[_EXPIRY_BYTES:], ttl) if ttl > 0 else None


def _address(namespace: str, key: bytes) -> bytes:
    return b"%b\0%b" % (namespace.encode(), key)
