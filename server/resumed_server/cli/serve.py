"""`resumed serve`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from resumed_server import _structlog  # noqa: F401 - before all modules that log
from resumed_server.cli.options import logs_start_errors, takes_settings
from resumed_server.preflight import verify_settings


@takes_settings
@logs_start_errors
def serve(
    check: Annotated[
        bool, typer.Option("--check", envvar="RESUMED_CHECK", help="Only check the settings, print them and exit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --check: print JSON instead of text.")] = False,
    **given: Any,
) -> None:
    """Serve sessions over gRPC until SIGTERM or SIGINT."""
    if check:
        shown = {name.replace("_", "-"): value for name, value in verify_settings(**given).as_text().items()}
        text = "\n".join(f"{name:<24} {value}" for name, value in shown.items())
        typer.echo(json.dumps(shown, indent=2) if as_json else text)
        return
    settings = verify_settings(**given)
    from resumed._process.hardening import forbid_core_dumps  # noqa: PLC0415 - without the rest of the client
    from resumed_server.main import run  # noqa: PLC0415 - loads gRPC

    if not settings.core_dumps:
        forbid_core_dumps()
    raise typer.Exit(run(settings))
