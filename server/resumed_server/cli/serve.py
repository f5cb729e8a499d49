"""`resumed serve`."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from resumed_server.cli.options import takes_settings
from resumed_server.preflight import verified


@takes_settings
def serve(
    check: Annotated[
        bool, typer.Option("--check", envvar="RESUMED_CHECK", help="Only check the settings, print them and exit.")
    ] = False,
    **given: Any,
) -> None:
    """Serve sessions over gRPC until SIGTERM or SIGINT."""
    settings = verified(**given)
    if check:
        for name, value in settings.shown().items():
            typer.echo(f"{name.replace('_', '-'):<24} {value}")
        return
    # gRPC's core reads this when it is loaded; without it the core logs a line for each malformed request.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from resumed import forbid_core_dumps  # noqa: PLC0415 - --check and --help do not need the client
    from resumed_server.main import run  # noqa: PLC0415 - loads gRPC

    if not settings.core_dumps:
        forbid_core_dumps()
    raise typer.Exit(run(settings))
