"""The options with which a command connects to the store over TLS, as frontends do."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import grpc
import typer

import resumed
from resumed_server.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class TlsOptions:
    """Files and a name for TLS to the store; without any of them the connection is plaintext."""

    ca: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Connect over TLS, and trust these authorities (PEM)."),
    ] = None
    cert: Annotated[
        str | None, typer.Option(metavar="FILE", help="Connect over TLS with this client certificate (PEM).")
    ] = None
    key: Annotated[
        str | None, typer.Option(metavar="FILE", help="Private key of --cert (PEM), unless that file contains it.")
    ] = None
    server_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Connect over TLS, and expect this name in the store's certificate. Default: the host of TARGET.",
        ),
    ] = None

    def credentials(self) -> resumed.Credentials | None:
        """Return the client's credentials, None for plaintext.

        Raises:
            CredentialsError: A file cannot be used.
            UserError: The options contradict each other.
        """
        if not (self.ca or self.cert or self.key or self.server_name):
            return None
        try:
            return resumed.Credentials(ca=self.ca, cert=self.cert, key=self.key, server_name=self.server_name)
        except ValueError as error:
            raise UserError(str(error)) from None

    def channel(self, target: str) -> grpc.Channel:
        """Return a channel of grpcio, for services that the client does not call.

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


def takes_tls(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `tls` of a typer command with one option for each field of TlsOptions."""
    fields = get_type_hints(TlsOptions, include_extras=True)

    @wraps(command)
    def with_tls(*arguments: Any, **given: Any) -> None:
        command(*arguments, tls=TlsOptions(**{name: given.pop(name) for name in fields if name in given}), **given)

    own = [each for each in inspect.signature(command, eval_str=True).parameters.values() if each.name != "tls"]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in fields.items()
    ]
    with_tls.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined] # typer reads it
    with_tls.__annotations__ = {}
    return with_tls
