"""The LMDB engine: sessions in a file that several processes of one machine share.

Its tables are in session_table.py, change_log.py and purge_table.py. Each operation is one transaction, and so is a
batch.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import lmdb
import structlog

from resumed_server.storage.call_gate import CLOSED, CallGate
from resumed_server.storage.engine import (
    LONGEST_TTL_SECONDS,
    UNKNOWN_TOMBSTONE_SECONDS,
    AlreadyExists,
    Change,
    Engine,
    EngineBroken,
    EngineError,
    EngineFull,
    EngineUnavailable,
    Get,
    Kept,
    NamespacePurged,
    NamespaceUsage,
    NoTombstone,
    Put,
    Remove,
    StoredSession,
    StoreTotals,
    Take,
)
from resumed_server.storage.lmdb.change_log import PURGED, REMOVED, STORED, ChangeLog
from resumed_server.storage.lmdb.database_directory import DAMAGE, DatabaseDirectory
from resumed_server.storage.lmdb.purge_table import TIME_BYTES, PurgeTable, is_timed
from resumed_server.storage.lmdb.session_table import (
    SessionTable,
    is_purged,
    is_tombstone,
    issue_time,
    session_in,
    time_bytes,
    value_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from resumed_server.storage.engine import Clock, Operation, Outcome

_T = TypeVar("_T")
_Transaction: TypeAlias = Any
"""An lmdb.Transaction. It returns memoryviews with `buffers=True` only, and bytes otherwise, unlike its stubs."""

_TABLES = (b"sessions", b"expiries", b"pinned", b"tombstones", b"removals", b"changes", b"purges")
_LAYOUT = b"3"
"""Changes with the contents of the tables, so that another version creates a new file and misreads none."""
_MOST_PAGES = 16
"""More pages than a Put can take beside those of its own bytes, even if it splits pages of all tables."""
_HEADROOM_BYTES = 64 << 20
_CHANGES_BYTES = 1 << 20
_MOST_CHANGES, _CAPACITY_PER_CHANGE = 1 << 16, 2048  # so the log takes at most a twentieth of the capacity
_OUT_OF_PAGES_RETRIES = 3
_OUT_OF_PAGES_ROOM = 1 << 20
_COUNT_BATCH = 500
_PAUSE_FACTOR = 2.0
"""Pause after each step of a count, as a multiple of the duration of the step."""

_DAMAGED = "the database is damaged; a restart creates a new one"

_log = structlog.get_logger()


class LmdbEngine(Engine):
    """Storage in the LMDB database of a directory.

    Args:
        path: The directory, created if it is missing; None for a private temporary one, which close() deletes.
        capacity: Bytes of used pages above which the sessions that expire first are evicted. The file can take half as
            much again, since evictions need pages too; it has that length from the start, mostly as a hole.
        clock: The present, in Unix seconds. Expiries count from the epoch, since a database outlives its process.
        quarantine_after_crash: Whether a crash of this process means that the file is damaged.

    Raises:
        EngineUnavailable: The directory cannot be used; the message gives the reason.
    """

    def __init__(
        self, path: Path | None, *, capacity: int, clock: Clock = time.time, quarantine_after_crash: bool = False
    ) -> None:
        self._capacity, self._clock = capacity, clock
        try:
            self._open(path, quarantine_after_crash)
        except EngineBroken:  # damage that the directory did not notice; it is marked by now
            self._directory.close(trusted=False)
            self._open(path, quarantine_after_crash)

    def put(
        self,
        namespace: str,
        key: bytes,
        value: bytes,
        ttl: float,
        issued_at: float | None = None,
        *,
        pinned: bool = False,
    ) -> float:
        """See Engine."""
        put = Put(namespace, key, value, ttl, issued_at, pinned)
        return self._write(lambda txn: self._put(txn, put))

    def get(self, namespace: str, key: bytes) -> StoredSession | None:
        """See Engine."""
        name, address = _locate(namespace, key)
        return self._read(lambda txn: self._get(txn, name, address))

    def take(self, namespace: str, key: bytes) -> StoredSession | None:
        """See Engine."""
        name, address = _locate(namespace, key)
        return self._write(lambda txn: self._take(txn, name, address))

    def remove(self, namespace: str, key: bytes, *, ttl: float | None = None, tombstone: bool = True) -> bool | None:
        """See Engine."""
        remove = Remove(namespace, key, ttl, tombstone)
        return self._write(lambda txn: self._remove(txn, remove))

    def batch(self, operations: Sequence[Operation]) -> list[Outcome]:
        """See Engine. All operations are in one transaction."""
        if {type(each) for each in operations} == {Get}:
            return self._read(lambda txn: self._get_all(txn, operations))
        try:
            return self._write(lambda txn: [self._carry_out(txn, each) for each in operations])
        except EngineFull:
            # The whole transaction was rolled back: carry the operations out one by one.
            return [self._carry_out_alone(each) for each in operations]

    def sweep(self, limit: int) -> int:
        """See Engine."""
        now = self._table.expiry(0)

        def is_due(txn: _Transaction) -> bool:
            return self._table.has_expired(txn, now) or self._purges.has_work(txn, now)

        def step(txn: _Transaction) -> int:
            swept = self._table.delete_expired(txn, now, limit)
            self._purges.expire(txn, now)
            return swept + self._delete_purged(txn, limit - swept)

        return self._write(step) if self._read(is_due) else 0  # usually there is nothing to sweep, and no write

    def purge(self, namespace: str, issued_before: float | None) -> float:
        """See Engine."""
        name, address = _locate(namespace, b"")

        def step(txn: _Transaction) -> bytes:
            # Sessions that were stored in this microsecond were stored before.
            now = _microseconds(self._clock()) + 1
            time = now if issued_before is None else min(now, _microseconds(issued_before))
            mark = self._purges.mark(txn, name)
            if issued_before is not None and time_bytes(time) <= mark[:TIME_BYTES]:
                return mark  # without a change, or mirrors would search their sessions in vain
            before = b"" if issued_before is None else time_bytes(time)
            number = self._changes.append(txn, PURGED, address + time_bytes(now) + before)
            end = self._table.expiry(LONGEST_TTL_SECONDS)
            return self._purges.set(txn, name, time_bytes(time), number if issued_before is None else None, end)

        return _seconds(self._write(step))

    def removals(self, namespace: str, limit: int) -> Iterator[list[Change]]:
        """See Engine. Each part is a transaction of its own, so that no reader pins old pages."""
        _, prefix = _locate(namespace, b"")
        start: bytes | None = prefix
        while start is not None:
            found, start = self._read(partial(self._table.scan_removals, start=start, prefix=prefix, limit=limit))
            left = [(address, self._table.remaining(expiry)) for address, expiry in found]
            yield [Change(namespace, address[len(prefix) :], None, ttl) for address, ttl in left if ttl > 0]

    def last_purge(self, namespace: str) -> NamespacePurged | None:
        """See Engine."""
        name, _ = _locate(namespace, b"")

        def read(txn: _Transaction) -> NamespacePurged | None:
            mark = self._purges.mark(txn, name)
            if not mark:
                return None
            if not is_timed(mark):
                return NamespacePurged(namespace, None, _seconds(mark))
            end = int.from_bytes(self._purges.end(txn, name), "big") / 1e3
            return NamespacePurged(namespace, _seconds(mark), end - LONGEST_TTL_SECONDS)

        return self._read(read)

    def usage(self, namespace: str | None) -> dict[str, NamespaceUsage]:
        """See Engine."""
        counted: dict[str, NamespaceUsage] = {}
        start: bytes | None = b""
        if namespace is not None:
            name, start = _locate(namespace, b"")
            counted[namespace] = self._read(lambda txn: _usage(self._purges.mark(txn, name)))
        while start is not None:
            begun = time.monotonic()
            start = self._read(partial(self._count, counted, start, only=namespace))
            time.sleep(_PAUSE_FACTOR * (time.monotonic() - begun))
        return counted

    def position(self) -> bytes:
        """See Engine."""
        return self._read(self._changes.position)

    def changes(
        self, after: bytes, until: bytes, limit: int, *, removals_only: bool = False
    ) -> tuple[list[Change | NamespacePurged], bytes] | None:
        """See Engine."""

        def read(txn: _Transaction) -> tuple[list[Change | NamespacePurged], bytes] | None:
            logged = self._changes.read(txn, after, until, limit)
            if logged is None:
                return None
            changes: list[Change | NamespacePurged] = []
            position, size = after, 0
            for what, address, behind in logged:
                if size > _CHANGES_BYTES:
                    break
                if what == STORED and removals_only:
                    position = behind
                    continue
                if change := self._change(txn, what, address):
                    changes.append(change)
                    size += len(change.session.value) if isinstance(change, Change) and change.session else 0
                position = behind
            return changes, position

        return self._read(read)

    def totals(self) -> StoreTotals:
        """See Engine."""

        def read(txn: _Transaction) -> StoreTotals:
            table = self._table
            return StoreTotals(table.count(txn), self._used_bytes(txn), table.evicted(txn), table.count_removals(txn))

        return self._read(read)

    def probe(self) -> None:
        """See Engine."""
        self._read(lambda txn: txn.get(b"\0"))
        self._write(lambda _txn: None)  # blocks if a stopped process has the lock of writers
        with self._gate:
            self._env.reader_check()  # readers of killed processes must not pin old pages
            if self._directory.is_stale_or_damaged():
                self._gate.close(_DAMAGED)
                raise EngineBroken(_DAMAGED)

    def close(self) -> None:
        """See Engine."""
        reason = self._gate.close(CLOSED)
        if reason != CLOSED:
            if self._gate.wait_until_empty():
                self._directory.close(trusted=reason is None)
            else:  # LMDB crashes if it is closed during a call; the end of the process closes it as well
                _log.warning(
                    "the database stays open: a running call does not end", directory=str(self._directory.path)
                )

    def _open(self, path: Path | None, quarantine_after_crash: bool) -> None:
        capacity = self._capacity
        self._gate = CallGate()
        self._directory = DatabaseDirectory(
            path,
            _TABLES,
            layout=_LAYOUT,
            map_bytes=capacity + capacity // 2 + _HEADROOM_BYTES,
            quarantine_after_crash=quarantine_after_crash,
        )
        self._env = self._directory.env
        *entries, changes, purges = self._directory.tables
        self._sessions = entries[0]
        self._table = SessionTable(*entries, counters=self._env.open_db(), clock=self._clock)
        self._purges = PurgeTable(purges)
        kept = min(_MOST_CHANGES, capacity // _CAPACITY_PER_CHANGE)
        self._changes = self._write(lambda txn: ChangeLog(txn, changes, kept))
        self._page_bytes = self._env.stat()["psize"]
        self._most_overhead = _MOST_PAGES * self._page_bytes
        self._free: tuple[_Transaction, int] = None, 0

    def _carry_out(self, txn: _Transaction, operation: Operation) -> Outcome:
        where = _locate(operation.namespace, operation.key)
        try:
            match operation:
                case Put():
                    return self._put(txn, operation)
                case Get():
                    return self._get(txn, *where)
                case Take():
                    return self._take(txn, *where)
                case Remove():
                    return self._remove(txn, operation)
        except (AlreadyExists, NoTombstone) as error:
            return error

    def _change(self, txn: _Transaction, what: bytes, address: bytes) -> Change | NamespacePurged | None:
        name, _, key = address.partition(b"\0")
        if what == PURGED:
            before = key[TIME_BYTES:]
            return NamespacePurged(name.decode(), _seconds(before) if before else None, _seconds(key))
        if what == REMOVED:
            expiry = self._table.removal(txn, address)
            ttl = self._table.remaining(expiry) if expiry else 0.0
            return Change(name.decode(), key, None, ttl if ttl > 0 else None)
        if session := self._get(txn, name, address):
            session.issued_at = issue_time(txn.get(address))
            return Change(name.decode(), key, session)
        return None

    def _carry_out_alone(self, operation: Operation) -> Outcome:
        try:
            return self._write(lambda txn: self._carry_out(txn, operation))
        except EngineError as error:
            return error

    def _put(self, txn: _Transaction, put: Put) -> float:
        name, address = _locate(put.namespace, put.key)
        table, mark = self._table, self._purges.mark(txn, name)
        old = table.get_unexpired(txn, address, mark)
        if old is not None:
            if value_of(old) != put.value:
                raise AlreadyExists
            return Kept(table.remaining(old))
        now = self._clock()
        issued = now if put.issued_at is None else min(put.issued_at, now)
        issued_bytes = time_bytes(_microseconds(issued))
        if issued_bytes < mark[:TIME_BYTES]:
            raise AlreadyExists
        # At most a week from its issue: after that, the mark that would refuse it may have expired.
        ttl = min(put.ttl, issued + LONGEST_TTL_SECONDS - now)
        if ttl <= 0:
            return 0.0
        expiry = table.expiry(ttl)
        self._make_room(txn, len(address) + len(put.value))
        number = self._changes.append(txn, STORED, address)
        table.add(txn, address, expiry, issued_bytes + number + put.value, pinned=put.pinned)
        return max(0.0, table.remaining(expiry))

    def _get(self, txn: _Transaction, name: bytes, address: bytes) -> StoredSession | None:
        entry: bytes | None = txn.get(address)
        return None if entry is None else session_in(entry, self._clock(), self._purges.mark(txn, name))

    def _get_all(self, txn: _Transaction, operations: Sequence[Operation]) -> list[Outcome]:
        now, get = self._clock(), txn.get
        marks = {name: self._purges.mark(txn, name.encode()) for name in {each.namespace for each in operations}}
        return [
            session_in(get(_locate(each.namespace, each.key)[1]), now, marks[each.namespace]) for each in operations
        ]

    def _take(self, txn: _Transaction, name: bytes, address: bytes) -> StoredSession | None:
        session = self._get(txn, name, address)
        if session is not None:
            entry = txn.get(address)
            self._bury(txn, address, entry, entry[:TIME_BYTES], lasting=False)
        return session

    def _bury(self, txn: _Transaction, address: bytes, old: bytes | None, expiry: bytes, *, lasting: bool) -> None:
        self._table.put_tombstone(txn, address, old, expiry, lasting=lasting)
        self._changes.append(txn, REMOVED, address)  # a mirror may have the session even if it was evicted here

    def _remove(self, txn: _Transaction, remove: Remove) -> bool | None:
        name, address = _locate(remove.namespace, remove.key)
        table, lasting = self._table, remove.ttl is not None
        old = table.get_unexpired(txn, address, self._purges.mark(txn, name))
        if old is None:
            if not remove.tombstone:
                raise NoTombstone
            self._make_room(txn, len(address))
            expiry = table.expiry(max(UNKNOWN_TOMBSTONE_SECONDS, remove.ttl or 0.0))
            self._bury(txn, address, None, expiry, lasting=lasting)
            return False
        expiry = max(old[:TIME_BYTES], table.expiry(remove.ttl or 0.0))
        if not is_tombstone(old):
            self._bury(txn, address, old, expiry, lasting=lasting)
            return True
        if lasting and table.removal(txn, address) != expiry:  # it becomes a lasting one, or a longer one
            self._make_room(txn, len(address))
            self._bury(txn, address, old, expiry, lasting=True)
        return None

    def _delete_purged(self, txn: _Transaction, limit: int) -> int:
        """Examine up to `limit` entries of purged namespaces, delete purged sessions, return how many were examined."""
        looked = 0
        while looked < limit and (unfinished := self._purges.next_pending(txn)):
            name, start = unfinished
            mark = self._purges.mark(txn, name)
            entries, rest = self._table.scan(txn, start, name + b"\0", limit - looked)
            for address, entry in entries:
                if is_purged(entry, mark):
                    self._table.delete(txn, address, entry)
            self._purges.advance(txn, name, rest or b"")
            looked += len(entries)
        return looked

    def _count(
        self, counted: dict[str, NamespaceUsage], start: bytes, txn: _Transaction, *, only: str | None
    ) -> bytes | None:
        """Count some entries from an address on, of one namespace or all; return the next address, if any."""
        prefix = b"" if only is None else _locate(only, b"")[1]
        entries, rest = self._table.scan(txn, start, prefix, _COUNT_BATCH)
        marks: dict[str, bytes] = {}
        for address, entry in entries:
            if self._table.remaining(entry) <= 0:
                continue
            name = address[: address.index(b"\0")]
            namespace = name.decode()
            if namespace not in marks:
                marks[namespace] = self._purges.mark(txn, name)
            usage = counted.setdefault(namespace, _usage(marks[namespace]))
            if is_tombstone(entry):
                usage.tombstones += 1
            elif is_purged(entry, marks[namespace]):
                usage.pending_deletion += 1
            else:
                usage.sessions += 1
                usage.value_bytes += len(value_of(entry))
        return rest

    def _make_room(self, txn: _Transaction, size: int) -> None:
        """Evict sessions in the order of their expiry if the database is over its capacity.

        Twice the size of the new entry and no more: evictions of scattered entries free no page at once, but make room
        in many pages.
        """
        # Counting pages takes as long as storing a session. So a transaction counts again only when its writes since
        # then may have used up the free pages; no other process writes during the transaction.
        counted, free = self._free
        if counted is txn and free > size:
            self._free = txn, free - size - self._most_overhead
            return
        free = self._capacity - self._used_bytes(txn) - size
        if free < 0:
            self._table.evict(txn, 2 * size)
        self._free = txn, free - self._most_overhead

    def _used_bytes(self, txn: _Transaction) -> int:
        """Return the bytes of all used pages."""
        pages: int = 0
        for table in self._directory.tables:
            stat = txn.stat(table)
            pages += stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return pages * cast("int", self._page_bytes)

    def _read(self, step: Callable[[_Transaction], _T], *, again: bool = True) -> _T:
        try:
            with self._gate, self._env.begin(self._sessions) as txn:
                return step(txn)
        except lmdb.Error as error:
            if again and isinstance(error, lmdb.MapResizedError):
                self._follow_map()
                return self._read(step, again=False)
            raise self._translate_error(error) from error

    def _write(self, step: Callable[[_Transaction], _T], *, again: bool = True) -> _T:
        """Run `step` in a write transaction; if the file has no free page, evict sessions and try again."""
        try:
            with self._gate:
                for _ in range(_OUT_OF_PAGES_RETRIES):
                    with contextlib.suppress(lmdb.MapFullError), self._env.begin(self._sessions, write=True) as txn:
                        return step(txn)
                    with self._env.begin(self._sessions, write=True) as txn:
                        self._table.evict(txn, _OUT_OF_PAGES_ROOM)
        except lmdb.Error as error:
            if again and isinstance(error, lmdb.MapResizedError):
                self._follow_map()
                return self._write(step, again=False)
            raise self._translate_error(error) from error
        raise EngineFull("the database file has no page left")

    def _follow_map(self) -> None:
        """Adopt the size of a file that another process, with a larger capacity, has extended beyond the map."""
        with self._gate.exclusive():  # LMDB allows no transaction of this process during this call
            self._env.set_mapsize(0)

    def _translate_error(self, error: lmdb.Error) -> EngineError:
        if isinstance(error, DAMAGE):
            self._gate.close(_DAMAGED)
            self._directory.report_damage()
            _log.critical("database damaged", cause=type(error).__name__, directory=str(self._directory.path))
            return EngineBroken(_DAMAGED)
        # The write that fills a disk is incomplete, and LMDB reports it as an I/O error.
        if isinstance(error, lmdb.MapFullError | lmdb.DiskError) or self._directory.is_full():
            return EngineFull(f"no space left for the database ({type(error).__name__})")
        return EngineUnavailable(f"the database does not answer: {error}")


def _locate(namespace: str, key: bytes) -> tuple[bytes, bytes]:
    """Return the encoded namespace and the address of a session."""
    name = namespace.encode()
    return name, b"%b\0%b" % (name, key)


def _microseconds(seconds: float) -> int:
    return int(seconds * 1e6)


def _seconds(mark: bytes) -> float:
    return int.from_bytes(mark[:TIME_BYTES], "big") / 1e6


def _usage(mark: bytes) -> NamespaceUsage:
    return NamespaceUsage(issued_before=_seconds(mark) if mark else None)
