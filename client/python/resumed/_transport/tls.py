"""Credentials: how a frontend trusts the store, and proves to it who it is."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from resumed._exceptions import CredentialsError
from resumed._reload import Followed, Unreadable

if TYPE_CHECKING:
    import os

_log = logging.getLogger("resumed")


class Credentials:
    """TLS to the store, from PEM files that are read again when they change. Thread-safe.

    A change is used once the files have looked the same in two looks, which are a second apart; a call under way is not
    disturbed. Files that cannot be used, such as a key that does not fit its certificate, are reported in the log, and
    the previous ones stay in use.

    Args:
        ca: Certificates of the authorities that the store's certificate must come from; None for the system's.
        cert: The frontend's own certificate, with its chain.
        key: The private key of `cert`; None if it is in the same file.
        server_name: The name that the store's certificate must have; None for the host of the target.

    Raises:
        CredentialsError: A file cannot be read, or has the wrong content; the message names it.
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
        paths = [path for path in (self._ca, self._cert, self._key) if path]
        try:
            self._files = Followed(paths, lambda _: self._read(), _log_change, _log_error)
        except Unreadable as error:
            raise CredentialsError(str(error)) from None

    def __repr__(self) -> str:
        """Show the paths, never their content."""
        return f"Credentials(ca={str(self._ca)!r}, cert={str(self._cert)!r})"

    def context(self) -> ssl.SSLContext:
        """Return the TLS context of connections that begin now; another one once the files have changed."""
        return self._files.latest()

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


def _log_change(_: ssl.SSLContext) -> None:
    _log.info("credentials of the store read again")


def _log_error(error: Exception) -> None:
    _log.error("credentials of the store not read again, those read before stay: %s", error)


def _no_password() -> str:
    """Refuse an encrypted key instead of asking for its password on the terminal."""
    return ""
