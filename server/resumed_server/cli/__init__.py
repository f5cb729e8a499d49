"""The command `resumed`."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

from resumed_server.storage.registry import extras_for


def _complain(missing: ModuleNotFoundError) -> NoReturn:
    if (missing.name or "").startswith("resumed"):
        raise missing
    extras = ",".join(extras_for(missing.name or ""))
    sys.exit(f"resumed: {missing.name} is missing; pip install 'resumed[{extras}]'")


try:
    import typer

    from resumed_server.cli.commands import register
    from resumed_server.config.settings import takes_settings
    from resumed_server.errors import UserError, print_error
    from resumed_server.preflight import verified
except ModuleNotFoundError as missing:
    _complain(missing)

# No pretty exceptions: they show local variables, and so keys and values.
app = typer.Typer(pretty_exceptions_enable=False)
_CommandLineError: Any = typer.BadParameter.__mro__[2]  # ClickException, which typer brings along without naming it


def main() -> None:
    """Run the command; whatever the user got wrong is one line and exit status 2."""
    try:
        sys.exit(app(prog_name="resumed", standalone_mode=False))
    except UserError as error:
        print_error(error)
        sys.exit(2)
    except _CommandLineError as error:
        print_error(UserError(f"{' '.join(error.format_message().split())} (see resumed --help)"))
        sys.exit(2)
    except ModuleNotFoundError as missing:
        _complain(missing)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"resumed {version('resumed')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _resumed(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A central TLS session store: any frontend resumes a session that any other negotiated."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
@takes_settings
def serve(
    check: Annotated[
        bool, typer.Option("--check", envvar="RESUMED_CHECK", help="Only check the settings, show them and exit.")
    ] = False,
    **given: Any,
) -> None:
    """Serve sessions over gRPC until SIGTERM or SIGINT."""
    settings = verified(**given)
    if check:
        for name, value in settings.shown().items():
            typer.echo(f"{name.replace('_', '-'):<24} {value}")
        return
    # gRPC's core, which reads this when it is loaded, would write a line of its own for each odd request.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from resumed import forbid_core_dumps  # noqa: PLC0415 - the other commands start faster without
    from resumed_server.main import run  # noqa: PLC0415 - gRPC's server

    if not settings.core_dumps:
        forbid_core_dumps()
    raise typer.Exit(run(settings))


register(app)
