"""Credentials: how a frontend trusts the store, and proves to it who it is."""

from __future__ import annotations

import logging
import ssl
import time
from pathlib import Path
from typing import TYPE_CHECKING

from resumed.errors import CredentialsError

if TYPE_CHECKING:
    import os

_CHECK_SECONDS = 1.0

_log = logging.getLogger("resumed")


class Credentials:
    """TLS to the store, from PEM files that are read again when they change. Thread-safe.

    A change holds for every call after it, at most a second later; a call under way is not disturbed. Files that cannot
    be used (such as a key that does not fit its certificate, in the middle of a rotation) are reported in the log, and
    what was read before stays.

    Args:
        ca: Certificates of the authorities that the store's certificate must come from; None for the system's.
        cert: The frontend's own certificate, with its chain.
        key: The private key of `cert`; None if it is in the same file.
        server_name: The name that the store's certificate must have; None for the host of the target.

    Raises:
        CredentialsError: A file cannot be read, or is not what it should be; the message says which.
    """

    def __init__(
        self,
        *,
        ca: str | os.PathLike[str] | None = None,
        cert: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        server_name: str | None = None,
    ) -> None:
        if key is not None and cert is None:
            raise ValueError("key goes with cert: give both, or neither")
        self.server_name = server_name
        self._ca, self._cert, self._key = (None if path is None else Path(path) for path in (ca, cert, key))
        self._versions = self._current_versions()
        self._context = self._read()
        self._complaint = ""
        self._next_check = time.monotonic() + _CHECK_SECONDS

    def __repr__(self) -> str:
        """Show the paths, never what is in them."""
        return f"Credentials(ca={str(self._ca)!r}, cert={str(self._cert)!r})"

    def context(self) -> ssl.SSLContext:
        """Return the TLS context of connections that begin now; another one once the files have changed."""
        if time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + _CHECK_SECONDS
            self._reload()
        return self._context

    def _reload(self) -> None:
        try:
            versions = self._current_versions()
            if versions != self._versions:
                self._context, self._versions = self._read(), versions
                _log.info("credentials of the store read again")
            self._complaint = ""
        except CredentialsError as error:
            if str(error) != self._complaint:  # once, not every second
                _log.error("credentials of the store not read again, those read before stay: %s", error)
            self._complaint = str(error)

    def _current_versions(self) -> list[tuple[int, int, int]]:
        try:
            statuses = [path.stat() for path in (self._ca, self._cert, self._key) if path]
        except OSError as error:
            raise CredentialsError(f"{error.filename}: {error.strerror}") from None
        return [(status.st_ino, status.st_size, status.st_mtime_ns) for status in statuses]

    def _read(self) -> ssl.SSLContext:
        try:
            what = f"{self._ca} has no certificates of authorities"
            context = ssl.create_default_context(cafile=self._ca)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.set_alpn_protocols(["h2"])
            if self._cert:
                what = f"{self._cert} and {self._key or 'the key in it'} are no certificate and its key"
                context.load_cert_chain(self._cert, self._key, password=_no_password)
        except ssl.SSLError as error:
            raise CredentialsError(f"{what} ({error.reason or 'malformed'})") from None
        except OSError as error:
            raise CredentialsError(f"{error.filename or self._cert}: {error.strerror}") from None
        return context


def _no_password() -> str:
    """Refuse an encrypted key instead of asking for its password on the terminal."""
    return ""
