"""`resumed serve`."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resumed_server.cli.options import takes_settings
from resumed_server.errors import UserError
from resumed_server.preflight import verified

if TYPE_CHECKING:
    from collections.abc import Iterator


@takes_settings
def serve(
    check: Annotated[
        bool, typer.Option("--check", envvar="RESUMED_CHECK", help="Only check the settings, print them and exit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --check: print JSON instead of text.")] = False,
    **given: Any,
) -> None:
    """Serve sessions over gRPC until SIGTERM or SIGINT."""
    if check:
        shown = {name.replace("_", "-"): value for name, value in verified(**given).shown().items()}
        text = "\n".join(f"{name:<24} {value}" for name, value in shown.items())
        typer.echo(json.dumps(shown, indent=2) if as_json else text)
        return
    with _start_errors(given["log_format"]):
        settings = verified(**given)
        from resumed import forbid_core_dumps  # noqa: PLC0415 - --check and --help do not need the client
        from resumed_server.main import run  # noqa: PLC0415 - loads gRPC

        if not settings.core_dumps:
            forbid_core_dumps()
        status = run(settings)
    raise typer.Exit(status)


@contextlib.contextmanager
def _start_errors(log_format: str) -> Iterator[None]:
    """Log errors of the start as JSON, if that is the format of the log and standard error is no terminal."""
    try:
        yield
    except UserError as error:
        if log_format != "json" or sys.stderr.isatty():
            raise
        from resumed_server.observability import logging  # noqa: PLC0415

        logging.configure(log_format, "info")
        logging.log_start_error(error)
        raise typer.Exit(error.status) from None
