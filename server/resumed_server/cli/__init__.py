"""The command `resumed`."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, NoReturn

from resumed_server.errors import ExitStatus, UserError, print_error
from resumed_server.storage.registry import extras_for


def _exit_without(missing: ModuleNotFoundError) -> NoReturn:
    if (missing.name or "").startswith("resumed"):
        raise missing
    extras = ",".join(extras_for(missing.name or ""))
    sys.exit(f"resumed: {missing.name} is missing; pip install 'resumed[{extras}]'")


try:
    import typer

    from resumed_server.cli.lazy_group import EPILOG, LazyGroup
except ModuleNotFoundError as missing:
    _exit_without(missing)

# No pretty exceptions: they show local variables, and so keys and values.
app = typer.Typer(cls=LazyGroup, pretty_exceptions_enable=False, epilog=EPILOG)
_CommandLineError: Any = typer.BadParameter.__mro__[2]  # ClickException, which typer does not export


def main() -> None:
    """Run the command; an error that it expects is one line on standard error, and has an exit status."""
    if "serve" not in sys.argv[1:2]:  # which reads the lines that gRPC's core writes to standard error
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        sys.exit(app(prog_name="resumed", standalone_mode=False))
    except UserError as error:
        print_error(error)
        sys.exit(error.status)
    except _CommandLineError as error:
        print_error(UserError(f"{' '.join(error.format_message().split())} (see resumed --help)"))
        sys.exit(ExitStatus.USAGE)
    except ModuleNotFoundError as missing:
        _exit_without(missing)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415 - takes as long as a tenth of the start of a server

        typer.echo(f"resumed {version('resumed')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _resumed(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A central TLS session store: any frontend resumes a session that any other negotiated."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
