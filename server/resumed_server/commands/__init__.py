"""The commands beside `resumed serve`, for those who set a fleet up. They use the client as its users do.

Here are their options only: what they do is imported when one is run, so that `resumed --help` is quick.
"""

# ruff: noqa: PLC0415
from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (_keygen, _check, _demo):
        app.command(command.__name__.removeprefix("_"))(command)


def _keygen(
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="The file to make; it must not exist. Without it the key is printed."),
    ] = None,
) -> None:
    """Make a keyring: the key with which all frontends of a fleet seal their sessions."""
    from resumed_server.commands.keygen import keygen

    typer.echo(keygen(file))


def _check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="Where the store is: 127.0.0.1:7400, dns:///store:7400 or unix:/run/resumed.sock."
        ),
    ],
    namespace: Annotated[
        str, typer.Option(metavar="NAME", help="The namespace to use; the check leaves nothing in it.")
    ] = "resumed-check",
    keyring: Annotated[
        str | None, typer.Option(metavar="FILE", help="The fleet's keyring; without it a throw-away key.")
    ] = None,
    deadline: Annotated[float, typer.Option(metavar="SECONDS", help="How long each call may take.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Try every call of a running store, and say what to do if one fails (exit status 1)."""
    from resumed_server.commands.check import check

    well = check(target, namespace=namespace, keyring=keyring, deadline=deadline, as_json=as_json)
    raise typer.Exit(0 if well else 1)


def _demo() -> None:
    """Watch a store and two frontends, ssl and pyOpenSSL, resume each other's TLS sessions."""
    from resumed_server.commands.demo import demo

    raise typer.Exit(0 if demo() else 1)
