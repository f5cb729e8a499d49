"""The directory of an LMDB database: open and share the database, and quarantine a file that may be damaged.

While a database is open, the file `in-use` has the boot id of the machine. The last process that closes the database
syncs it and deletes that file. A file `in-use` of another boot means that the machine stopped with unwritten pages. The
file `damaged` means that a process found damage. The file `crash` has the report of a process that crashed: LMDB does
not check its pages, so damage that it does not notice can end in a SIGSEGV, SIGBUS or SIGABRT. In all these cases, and
if LMDB itself rejects the file, the process that opens the database renames the file, logs an error, and creates a new
database: its contents are a cache. The same happens to a file with the table layout of another version. The last
quarantined file is kept.

A SIGABRT in a thread outside of the engine does not blame the file: gRPC's core aborts a process, and systemd aborts
one that seems to hang.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import fcntl
import mmap
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb
import structlog

from resumed_server.storage.engine import EngineUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DAMAGE = (
    lmdb.BadDbiError,
    lmdb.BadTxnError,  # raised by a read whose table is missing
    lmdb.CorruptedError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.VersionMismatchError,
)
"""The errors of LMDB for a damaged or foreign file."""

_LAYOUT = b"layout"
"""A key of the main table, which has the names of the tables."""
_MAX_READERS = 1024
_LOCK_FILE_BYTES = 128 << 10  # more than the 64 bytes that LMDB needs for each reader
_SPARE_TRANSACTIONS = 32
_PRIVATE_FILE = 0o600
_PATIENCE = 3.0
"""Seconds to wait for other processes to close a database before it is quarantined. They notice within one second."""

_HERE = f"{Path(__file__).parent}/".encode()
"""The beginning of the paths of this package in a report of faulthandler."""

_log = structlog.get_logger()


class _LayoutChanged(lmdb.VersionMismatchError):
    """The file has the table layout of another version."""


class DatabaseDirectory:
    """An open database and its directory.

    Args:
        path: The directory, created if it is missing; None for a private temporary one, which close() deletes.
        tables: The names of the tables.
        layout: The version of the table layout; a file with another one, or none, is quarantined.
        map_bytes: The maximum size of the file.
        quarantine_after_crash: Whether a crash of this process means that the file is damaged.

    Raises:
        EngineUnavailable: The directory cannot be used; the message gives the reason.
    """

    def __init__(
        self,
        path: Path | None,
        tables: Sequence[bytes],
        *,
        layout: bytes,
        map_bytes: int,
        quarantine_after_crash: bool = False,
    ) -> None:
        self._temporary = path is None
        self._quarantines_after_crash, self._crash = quarantine_after_crash, contextlib.ExitStack()
        self._names, self._layout, self._map_bytes = tables, layout, map_bytes
        self.path = path or Path(tempfile.gettempdir())  # for the error message
        try:
            if path is None:
                self.path = Path(tempfile.mkdtemp(prefix="resumed-"))
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._exclusive_lock():
                self._quarantine_untrusted()
                self.env, self.tables = self._open_or_recreate()
                self._inode = self._file.stat().st_ino
                self._in_use = self._create_in_use_file()
        except (OSError, lmdb.Error) as error:
            if path is None and self.path.name.startswith("resumed-"):
                shutil.rmtree(self.path, ignore_errors=True)
            cause = error.strerror if isinstance(error, OSError) else str(error)
            if (
                cause and os.strerror(errno.EAGAIN) in cause
            ):  # from a robust mutex whose owner is in another PID namespace
                cause += ": a process in another container uses it, and containers do not share locks"
            raise EngineUnavailable(
                f"cannot use {self.path} for the database: {cause}; free it or choose another"
            ) from None

    def is_full(self) -> bool:
        """Return whether the disk has less free space than a page."""
        with contextlib.suppress(OSError):  # the directory is gone
            return shutil.disk_usage(self.path).free < mmap.PAGESIZE
        return False

    def is_stale_or_damaged(self) -> bool:
        """Return whether another process found damage, crashed, or has quarantined the file already."""
        if self._quarantine_cause():
            return True
        with contextlib.suppress(FileNotFoundError):  # deleted by another program; the open file stays usable
            return self._file.stat().st_ino != self._inode
        return False

    def report_damage(self) -> None:
        """Mark the database, so that the next process which opens it creates a new one."""
        with contextlib.suppress(OSError):
            (self.path / "damaged").touch(_PRIVATE_FILE)

    def close(self, *, trusted: bool) -> None:
        """Close the database.

        Args:
            trusted: Whether the file may be used again; if so, the last process that closes it syncs it to disk.
        """
        if trusted and not self._temporary:
            with contextlib.suppress(OSError, lmdb.Error), self._exclusive_lock():
                # Fails while another process uses the database, which then does this when it closes it.
                fcntl.flock(self._in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.env.sync(True)
                (self.path / "in-use").unlink(missing_ok=True)
        self.env.close()
        os.close(self._in_use)
        self._crash.close()
        if self._temporary:
            shutil.rmtree(self.path, ignore_errors=True)

    @property
    def _file(self) -> Path:
        return self.path / "data.mdb"

    def _open_or_recreate(self) -> tuple[Any, list[Any]]:
        try:
            return self._open()
        except DAMAGE as error:
            self._quarantine(str(error) if isinstance(error, _LayoutChanged) else type(error).__name__)
            return self._open()

    def _open(self) -> tuple[Any, list[Any]]:
        """Return the LMDB environment and its tables."""
        if self._quarantines_after_crash:
            self._watch_for_crash()
        self._allocate_lock_file()
        env = lmdb.open(
            str(self.path),
            # At least the size of the file: without a free page, even a deletion fails.
            map_size=max(self._map_bytes, self._file.stat().st_size if self._file.exists() else 0),
            mode=_PRIVATE_FILE,
            max_dbs=len(self._names),
            max_readers=_MAX_READERS,
            max_spare_txns=_SPARE_TRANSACTIONS,
            # The page cache survives a killed process. With writemap, a full disk would cause a SIGBUS.
            sync=False,
            metasync=False,
            # Access is random; readahead would only evict other pages.
            readahead=False,
        )
        try:
            env.reader_check()  # readers of killed processes must not pin old pages
            self._check_length(env)
            self._check_layout(env)
            tables = [env.open_db(name) for name in self._names]
        except BaseException:
            env.close()
            raise
        return env, tables

    def _watch_for_crash(self) -> None:
        """Write the stacks of all threads, without values, to the file `crash` if this process crashes."""
        self._crash.close()
        file = self._crash.enter_context((self.path / "crash").open("ab", buffering=0))
        os.fchmod(file.fileno(), _PRIVATE_FILE)
        faulthandler.enable(file)
        self._crash.callback(faulthandler.disable)

    def _allocate_lock_file(self) -> None:
        """Allocate the lock file before LMDB maps it: on a full disk, a missing page would cause a SIGBUS.

        Only once, since closing the file here would release the POSIX locks of an open environment of this process.
        """
        path = self.path / "lock.mdb"
        if path.exists() and path.stat().st_size >= _LOCK_FILE_BYTES:
            return
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE_FILE)
        try:
            os.posix_fallocate(descriptor, 0, _LOCK_FILE_BYTES)
        finally:
            os.close(descriptor)

    def _check_length(self, env: Any) -> None:
        """Raise an error of DAMAGE if the file was truncated: a read beyond its end would cause a SIGBUS.

        LMDB leaves the file shorter than its number of pages if the last pages are free. The file gets its full length
        here, as a hole, before the first write, so that it does not look truncated later.
        """
        with env.begin(write=True):  # no other process can extend the file in the meantime
            info, length = env.info(), self._file.stat().st_size
            if length < (info["last_pgno"] + 1) * env.stat()["psize"] and info["last_txnid"]:
                raise lmdb.CorruptedError("the file was truncated")
            if length < info["map_size"]:
                os.truncate(self._file, info["map_size"])

    def _check_layout(self, env: Any) -> None:
        """Write the layout into a new file; raise an error of DAMAGE if an existing file has another one."""
        with env.begin(write=True) as txn:
            if not env.info()["last_txnid"]:
                txn.put(_LAYOUT, self._layout)
            elif txn.get(_LAYOUT) != self._layout:
                raise _LayoutChanged("another version of resumed wrote it")

    def _quarantine_untrusted(self) -> None:
        if cause := self._quarantine_cause():
            self._quarantine(cause)
        in_use = self.path / "in-use"
        if in_use.exists() and in_use.read_bytes() != _boot_id():
            self._quarantine("the machine stopped while the database was in use")

    def _quarantine_cause(self) -> str:
        """Return the reason that another process gave for a quarantine, if any."""
        if (self.path / "damaged").exists():
            return "a process found damage"
        return "a process that used it crashed" if self._has_crashed() else ""

    def _has_crashed(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return _is_crash_of_engine((self.path / "crash").read_bytes())
        return False

    def _quarantine(self, cause: str) -> None:
        self.report_damage()
        self._wait_until_unused()
        for older in self.path.glob("data.mdb.set-aside-*"):
            older.unlink()
        aside = self.path / f"data.mdb.set-aside-{time.time_ns()}"
        with contextlib.suppress(FileNotFoundError):
            self._file.rename(aside)
        if self._has_crashed():
            (self.path / "crash").rename(f"{aside}.crash")
        for name in ("lock.mdb", "damaged", "crash", "in-use"):
            (self.path / name).unlink(missing_ok=True)
        _log.error("database quarantined, creating a new one", cause=cause, aside=str(aside))

    def _wait_until_unused(self) -> None:
        """Wait until no other process uses the database: it would return sessions that are removed from the new one."""
        end = time.monotonic() + _PATIENCE
        with contextlib.suppress(FileNotFoundError), (self.path / "in-use").open("rb") as in_use:
            while time.monotonic() < end:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                time.sleep(0.01)
            _log.error("a process keeps a database open that has to be quarantined", directory=str(self.path))

    def _create_in_use_file(self) -> int:
        descriptor = os.open(self.path / "in-use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE_FILE)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.pwrite(descriptor, _boot_id(), 0)
        os.fsync(descriptor)  # or a power failure could lose this file and leave an incomplete database
        directory = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return descriptor

    @contextlib.contextmanager
    def _exclusive_lock(self) -> Iterator[None]:
        """Keep other processes from opening or closing the database during the context."""
        descriptor = os.open(self.path / "opening", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE_FILE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _is_crash_of_engine(reports: bytes) -> bool:
    """Return whether a damaged file may have caused any of the crashes that faulthandler reported."""
    _, *crashes = reports.split(b"Fatal Python error: ")
    for crash in crashes:
        _, _, thread = crash.partition(b"Current thread")  # absent if the crashed thread has no Python state
        if not crash.startswith(b"Aborted") or _HERE in thread.partition(b"\n\n")[0]:
            return True
    return bool(reports) and not crashes


def _boot_id() -> bytes:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    return b""
