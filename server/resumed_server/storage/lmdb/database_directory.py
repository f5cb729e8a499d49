"""The directory of an LMDB database: opens it, shares it among processes, and sets aside a file that cannot be trusted.

While a database is open, the file `in-use` names the boot of the machine. The last process to close the database syncs
it and deletes that file. Where it is found after another boot, the machine went down with pages unwritten. The file
`damaged` says that a process ran into damage, and `crash` what a process did that crashed: LMDB follows pages without a
doubt, so damage that it does not notice can end in a SIGSEGV, SIGBUS or SIGABRT. In all these cases, and where LMDB
itself refuses the file, it is a cache: it is set aside, loudly, and a new one begun. So is one whose tables are laid
out in another way, which an older or a newer version wrote. Of files set aside the last one is kept.

A SIGABRT means something else where it hits a thread outside of the engine: gRPC's core ends a process so, and systemd
one that it takes for hung.
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
    lmdb.BadTxnError,  # how a read begins whose table cannot be found
    lmdb.CorruptedError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.VersionMismatchError,
)
"""What LMDB raises for a file that it cannot read, or not any more."""

_LAYOUT = b"layout"
"""A key beside the names of the tables."""
_MAX_READERS = 1024
_LOCK_FILE_BYTES = 128 << 10  # more than the 64 bytes that LMDB needs for each reader
_SPARE_TRANSACTIONS = 32
_PRIVATE_FILE = 0o600
_PATIENCE = 3.0
"""Seconds that the other processes have to leave a database that is to be set aside: they notice within one."""

_HERE = f"{Path(__file__).parent}/".encode()
"""How the paths of this package begin in a report of faulthandler."""

_log = structlog.get_logger()


class _OtherLayout(lmdb.VersionMismatchError):
    """The tables of a file hold something else."""


class DatabaseDirectory:
    """An open database and the directory it is in.

    Args:
        path: The directory, made if it is not there; None for a private temporary one, which close() deletes.
        tables: The names of the tables, begun empty.
        layout: What the tables hold; a file with another one, or none, is set aside.
        map_bytes: How large the file may grow.
        blame_crashes: Whether a crash of this process means that the file is damaged.

    Raises:
        EngineUnavailable: The directory cannot be used; the message says why.
    """

    def __init__(
        self,
        path: Path | None,
        tables: Sequence[bytes],
        *,
        layout: bytes,
        map_bytes: int,
        blame_crashes: bool = False,
    ) -> None:
        self._temporary = path is None
        self._blames_crashes, self._crash = blame_crashes, contextlib.ExitStack()
        self._names, self._layout, self._map_bytes = tables, layout, map_bytes
        self.path = path or Path(tempfile.gettempdir())  # for the message, if that cannot be used
        try:
            if path is None:
                self.path = Path(tempfile.mkdtemp(prefix="resumed-"))
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._alone():
                self._set_untrusted_aside()
                self.env, self.tables = self._open_or_begin_anew()
                self._inode = self._file.stat().st_ino
                self._in_use = self._mark_in_use()
        except (OSError, lmdb.Error) as error:
            if path is None and self.path.name.startswith("resumed-"):
                shutil.rmtree(self.path, ignore_errors=True)
            cause = error.strerror if isinstance(error, OSError) else str(error)
            if cause and os.strerror(errno.EAGAIN) in cause:  # of a robust mutex whose owner this process cannot see
                cause += ": a process in another container uses it, whose locks do not reach into this one"
            raise EngineUnavailable(
                f"cannot use {self.path} for the database: {cause}; free it or choose another"
            ) from None

    def is_full(self) -> bool:
        """Return whether the disk has no room for another page."""
        with contextlib.suppress(OSError):  # the directory is gone
            return shutil.disk_usage(self.path).free < mmap.PAGESIZE
        return False

    def distrusted(self) -> bool:
        """Return whether another process ran into damage or crashed, or has set the file aside already."""
        if self._reported():
            return True
        with contextlib.suppress(FileNotFoundError):  # deleted under us: as good as before
            return self._file.stat().st_ino != self._inode
        return False

    def report_damage(self) -> None:
        """See to it that the next process to open the database begins a new one."""
        with contextlib.suppress(OSError):
            (self.path / "damaged").touch(_PRIVATE_FILE)

    def close(self, *, trusted: bool) -> None:
        """Close the database.

        Args:
            trusted: Whether its file may be used again; if so, the last one to close it writes it to disk.
        """
        if trusted and not self._temporary:
            with contextlib.suppress(OSError, lmdb.Error), self._alone():
                # Fails while another process uses the database: that one will see to it.
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

    def _open_or_begin_anew(self) -> tuple[Any, list[Any]]:
        try:
            return self._open()
        except DAMAGE as error:
            self._set_aside(str(error) if isinstance(error, _OtherLayout) else type(error).__name__)
            return self._open()

    def _open(self) -> tuple[Any, list[Any]]:
        """Return the LMDB environment and its tables."""
        if self._blames_crashes:
            self._watch_for_crash()
        self._allocate_lock_file()
        env = lmdb.open(
            str(self.path),
            # Never less than before: where a smaller capacity leaves no free page, nothing could be deleted either.
            map_size=max(self._map_bytes, self._file.stat().st_size if self._file.exists() else 0),
            mode=_PRIVATE_FILE,
            max_dbs=len(self._names),
            max_readers=_MAX_READERS,
            max_spare_txns=_SPARE_TRANSACTIONS,
            # The page cache outlives a killed process; writemap would turn a full disk into SIGBUS.
            sync=False,
            metasync=False,
            # Nothing is read in order: reading ahead would only evict others' pages.
            readahead=False,
        )
        try:
            env.reader_check()  # what killed processes were reading must not pin old pages
            self._check_length(env)
            self._check_layout(env)
            tables = [env.open_db(name) for name in self._names]
        except BaseException:
            env.close()
            raise
        return env, tables

    def _watch_for_crash(self) -> None:
        """Have a crash write which threads were where in the source, and no values."""
        self._crash.close()
        file = self._crash.enter_context((self.path / "crash").open("ab", buffering=0))
        os.fchmod(file.fileno(), _PRIVATE_FILE)
        faulthandler.enable(file)
        self._crash.callback(faulthandler.disable)

    def _allocate_lock_file(self) -> None:
        """Give the lock file its space before LMDB maps it: on a full disk, a page missing there would be a SIGBUS.

        Never again after that: to close it here would end the POSIX locks of an environment in this process.
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
        """Raise an error of DAMAGE if the file was cut off: to read beyond its end would be a SIGBUS.

        LMDB leaves the file shorter than its pages are many when the last ones are free. So that this cannot be taken
        for a file cut off, it gets its full length here, as a hole, before anything is written.
        """
        with env.begin(write=True):  # no other process lets it grow meanwhile
            info, length = env.info(), self._file.stat().st_size
            if length < (info["last_pgno"] + 1) * env.stat()["psize"] and info["last_txnid"]:
                raise lmdb.CorruptedError("the file was cut off")
            if length < info["map_size"]:
                os.truncate(self._file, info["map_size"])

    def _check_layout(self, env: Any) -> None:
        """Write the layout into a new file; raise an error of DAMAGE if another one has a different layout."""
        with env.begin(write=True) as txn:
            if not env.info()["last_txnid"]:
                txn.put(_LAYOUT, self._layout)
            elif txn.get(_LAYOUT) != self._layout:
                raise _OtherLayout("another version of resumed wrote it")

    def _set_untrusted_aside(self) -> None:
        if cause := self._reported():
            self._set_aside(cause)
        in_use = self.path / "in-use"
        if in_use.exists() and in_use.read_bytes() != _boot_id():
            self._set_aside("the machine went down while it was in use")

    def _reported(self) -> str:
        """Return what a process that used the database has left word of, if any has."""
        if (self.path / "damaged").exists():
            return "a process ran into damage"
        return "a process that used it crashed" if self._crashed() else ""

    def _crashed(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return _blames_engine((self.path / "crash").read_bytes())
        return False

    def _set_aside(self, cause: str) -> None:
        self.report_damage()
        self._wait_until_left()
        for older in self.path.glob("data.mdb.set-aside-*"):
            older.unlink()
        aside = self.path / f"data.mdb.set-aside-{time.time_ns()}"
        with contextlib.suppress(FileNotFoundError):
            self._file.rename(aside)
        if self._crashed():
            (self.path / "crash").rename(f"{aside}.crash")
        for name in ("lock.mdb", "damaged", "crash", "in-use"):
            (self.path / name).unlink(missing_ok=True)
        _log.error("database set aside, beginning a new one", cause=cause, aside=str(aside))

    def _wait_until_left(self) -> None:
        """Wait until no other process uses the database: it would go on serving what is removed from the new one."""
        end = time.monotonic() + _PATIENCE
        with contextlib.suppress(FileNotFoundError), (self.path / "in-use").open("rb") as in_use:
            while time.monotonic() < end:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                time.sleep(0.01)
            _log.error("a process does not leave a database that is to be set aside", directory=str(self.path))

    def _mark_in_use(self) -> int:
        descriptor = os.open(self.path / "in-use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE_FILE)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.pwrite(descriptor, _boot_id(), 0)
        os.fsync(descriptor)  # or a power failure would take the mark and leave half a database
        directory = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return descriptor

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from opening or closing the database meanwhile."""
        descriptor = os.open(self.path / "opening", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE_FILE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _blames_engine(reports: bytes) -> bool:
    """Return whether any of faulthandler's reports is of a crash that a damaged file may have caused."""
    _, *crashes = reports.split(b"Fatal Python error: ")
    for crash in crashes:
        _, _, thread = crash.partition(b"Current thread")  # there is none where no thread of Python's crashed
        if not crash.startswith(b"Aborted") or _HERE in thread.partition(b"\n\n")[0]:
            return True
    return bool(reports) and not crashes


def _boot_id() -> bytes:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    return b""
