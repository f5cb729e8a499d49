"""The directory of an LMDB database: opens it, shares it among processes, and sets aside a file that cannot be trusted.

While a database is open, the file `in-use` names the boot of the machine. The last process to close the database syncs
it and deletes that file. Where it is found after another boot, the machine went down with pages unwritten. The file
`damaged` says that a process ran into damage. In both cases, and where LMDB itself refuses the file, it is a cache: it
is set aside, loudly, and a new one begun.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb
import structlog

from resumed_server.engines.base import EngineUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

DAMAGE = (
    lmdb.BadDbiError,
    lmdb.CorruptedError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.VersionMismatchError,
)
"""What LMDB raises for a file that it cannot read, or not any more."""

_MAX_READERS = 1024
_SPARE_TRANSACTIONS = 32
_TABLES = 3
_PRIVATE_FILE = 0o600

_log = structlog.get_logger()


class DatabaseDirectory:
    """An open database and the directory it is in.

    Args:
        path: The directory, made if it is not there; None for a private temporary one, which close() deletes.
        map_bytes: How large the file may grow.

    Raises:
        EngineUnavailable: The directory cannot be used; the message says why.
    """

    def __init__(self, path: Path | None, *, map_bytes: int) -> None:
        self._temporary = path is None
        self.path = path or Path(tempfile.mkdtemp(prefix="resumed-"))
        self._map_bytes = map_bytes
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._alone():
                self._set_untrusted_aside()
                self.env = self._open_or_begin_anew()
                self._in_use = self._mark_in_use()
        except (OSError, lmdb.Error) as error:
            cause = error.strerror if isinstance(error, OSError) else str(error)
            raise EngineUnavailable(f"cannot use {self.path} for the database: {cause}") from None

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
        if self._temporary:
            shutil.rmtree(self.path, ignore_errors=True)

    def _open(self) -> lmdb.Environment:
        env = lmdb.open(
            str(self.path),
            map_size=self._map_bytes,
            mode=_PRIVATE_FILE,
            max_dbs=_TABLES,
            max_readers=_MAX_READERS,
            max_spare_txns=_SPARE_TRANSACTIONS,
            # The page cache outlives a killed process; writemap would turn a full disk into SIGBUS.
            sync=False,
            metasync=False,
            # Nothing is read in order: reading ahead would only evict others' pages.
            readahead=False,
        )
        env.reader_check()  # what killed processes were reading must not pin old pages
        file_bytes = (self.path / "data.mdb").stat().st_size
        if file_bytes < (env.info()["last_pgno"] + 1) * env.stat()["psize"] and env.info()["last_txnid"]:
            env.close()
            raise lmdb.InvalidError("the file is shorter than its own index says")
        return env

    def _open_or_begin_anew(self) -> lmdb.Environment:
        try:
            return self._open()
        except DAMAGE as error:
            self._set_aside(type(error).__name__)
            return self._open()

    def _set_untrusted_aside(self) -> None:
        if (self.path / "damaged").exists():
            self._set_aside("a process ran into damage")
        in_use = self.path / "in-use"
        if in_use.exists() and in_use.read_text() not in {"", _boot_id()}:
            self._set_aside("the machine went down while it was in use")

    def _set_aside(self, cause: str) -> None:
        aside = self.path / f"data.mdb.set-aside-{time.time_ns()}"
        with contextlib.suppress(FileNotFoundError):
            (self.path / "data.mdb").rename(aside)
        for name in ("lock.mdb", "damaged", "in-use"):
            (self.path / name).unlink(missing_ok=True)
        _log.error("database set aside, beginning a new one", cause=cause, aside=str(aside))

    def _mark_in_use(self) -> int:
        descriptor = os.open(self.path / "in-use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE_FILE)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.pwrite(descriptor, _boot_id().encode(), 0)
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


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
