"""How the commands get to a store: over TLS where files are given, as frontends do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import grpc

import resumed
from resumed_server.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Tls(NamedTuple):
    """PEM files for TLS to the store; without any it is plaintext."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    server_name: str | None = None

    def credentials(self) -> resumed.Credentials | None:
        """Return the client's credentials.

        Raises:
            CredentialsError: A file cannot be used.
            UserError: One is missing.
        """
        if not (self.ca or self.cert or self.key):
            return None
        try:
            return resumed.Credentials(ca=self.ca, cert=self.cert, key=self.key, server_name=self.server_name)
        except ValueError as error:
            raise UserError(str(error)) from None

    def channel(self, target: str) -> grpc.Channel:
        """Return a channel of gRPC's own, for the services that the client does not call.

        Raises:
            CredentialsError: A file cannot be used.
        """
        if self.credentials() is None:
            return grpc.insecure_channel(target)
        ca, cert, key = (
            Path(path).read_bytes() if path else None for path in (self.ca, self.cert, self.key or self.cert)
        )
        options: Sequence[tuple[str, str]] = (
            [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []
        )
        return grpc.secure_channel(target, grpc.ssl_channel_credentials(ca, key, cert), options)
