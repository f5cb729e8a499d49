"""Files that are read again when they change, while a process runs: keyrings, certificates, grants.

A change is used once the files look the same twice in a row, so that no half of a change is used: a Kubernetes Secret
that is being swapped, a certificate that is copied before its key, an editor that has written the first line. Files
that cannot be used are reported once, and the value of before stays.

The client and the server follow their files with this one module.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from resumed._process.fork import register_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LARGEST = 1 << 20
"""Bytes that a file may have."""
CHECK_SECONDS = 1.0
"""Seconds between two looks of latest()."""

_Value = TypeVar("_Value")


class File(NamedTuple):
    """A file as it was read."""

    path: str
    content: bytes
    """Its bytes; their repr does not show them."""
    mode: int
    """Its permissions."""
    owner: int
    """The user that owns it."""

    def __repr__(self) -> str:
        """Show the path, never the content."""
        return f"File({self.path!r})"


class Unreadable(ValueError):
    """A file that cannot be read.

    Attributes:
        reason: Why, in the system's words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} cannot be read: {reason}")
        self.reason = reason


class Followed(Generic[_Value]):
    """The value of some files that belong together, as they are now, or as they were when they last could be used.

    Args:
        paths: The files.
        parse: Makes the value of the content; raises an exception that describes the defect and shows no secret. It
            may read the files itself: a value is discarded if the files have changed behind it.
        on_change: Called with each new value.
        on_error: Called with the reason why changed files cannot be used, once for each change.

    Attributes:
        value: The value.
        reload_succeeded: Whether the files as they are now could be used.
        reloaded_at: Time in Unix seconds when files that can be used were last read.

    Raises:
        Unreadable: A file cannot be read. What `parse` raises passes as well.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        parse: Callable[[Sequence[File]], _Value],
        on_change: Callable[[_Value], object],
        on_error: Callable[[Exception], object],
    ) -> None:
        self._paths = [os.fspath(path) for path in paths]
        self._parse, self._on_change, self._on_error = parse, on_change, on_error
        files = self._read()
        self._seen = self._judged = _digest(files)
        self.value = self._parsed(files)
        self.reload_succeeded, self.reloaded_at = True, time.time()
        self._next_look = time.monotonic() + CHECK_SECONDS
        self._looking = threading.Lock()
        register_after_fork(self)

    def latest(self) -> _Value:
        """Return the value; look at the files first if that was not done for a second. Thread-safe.

        One call suffices for a change that is older than a second.
        """
        if time.monotonic() >= self._next_look and self._looking.acquire(blocking=False):
            try:
                self._next_look = time.monotonic() + CHECK_SECONDS
                self.follow()
                if self._seen != self._judged and self._are_old():
                    self.follow()
            finally:
                self._looking.release()
        return self.value

    def follow(self) -> None:
        """Look once, and use a change that has settled. Never raises; for one thread."""
        try:
            files = self._read()
            seen, before = _digest(files), self._seen
            self._seen = seen
            if seen != before or seen == self._judged:
                return
            value = self._parsed(files)
            self._seen = _digest(self._read())
            if self._seen != seen:
                return
        except Exception as error:  # noqa: BLE001 - the process goes on with the value that it has
            self._judged, self.reload_succeeded = seen, False
            self._on_error(error)
        else:
            self._judged, self.value = seen, value
            self.reload_succeeded, self.reloaded_at = True, time.time()
            self._on_change(value)

    def after_fork_in_child(self) -> None:
        """Forget that another thread was looking."""
        self._looking = threading.Lock()

    def _read(self) -> Sequence[File] | Unreadable:
        """Return the files, or the reason why they cannot be read."""
        files = []
        for path in self._paths:
            try:
                with open(path, "rb") as file:  # noqa: PTH123 - as the user wrote it
                    status = os.fstat(file.fileno())
                    files.append(
                        File(path, _Hidden(file.read(LARGEST + 1)), stat.S_IMODE(status.st_mode), status.st_uid)
                    )
            except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
                return Unreadable(path, getattr(error, "strerror", None) or str(error))
            if len(files[-1].content) > LARGEST:
                return Unreadable(path, f"it is larger than {LARGEST} bytes")
        return files

    def _parsed(self, files: Sequence[File] | Unreadable) -> _Value:
        if isinstance(files, Unreadable):
            raise files
        return self._parse(files)

    def _are_old(self) -> bool:
        """Return whether no file was changed within the last second, by its own account."""
        try:
            return all(time.time() - os.stat(path).st_ctime >= CHECK_SECONDS for path in self._paths)  # noqa: PTH116
        except (OSError, ValueError):
            return False


class _Hidden(bytes):
    """Bytes that do not show, not even in a traceback that has the values of variables."""

    def __repr__(self) -> str:
        return "<content>"


def _digest(files: Sequence[File] | Unreadable) -> str:
    """Return a digest that distinguishes two looks and shows no secret."""
    if isinstance(files, Unreadable):
        return str(files)
    return repr([(hashlib.sha256(file.content).hexdigest(), file.mode, file.owner) for file in files])
