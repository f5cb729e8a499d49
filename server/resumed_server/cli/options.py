"""Options that several commands have, and those of `resumed serve`, which are made from its settings."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from resumed_server.config.settings import Settings, flag
from resumed_server.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

_Value = TypeVar("_Value")

Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET", help="Address of the store: 127.0.0.1:7400, dns:///store:7400 or unix:/run/resumed.sock."
    ),
]
Deadline = Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="Time limit of each call.")]
Keyring = Annotated[
    str | None, typer.Option(metavar="FILE", help="Keyring of the fleet. Without it a temporary key is used.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def parse_option(name: str, text: str, parse: Callable[[str], _Value]) -> _Value:
    """Return the value of an option or argument; raise UserError with its name if `parse` raises ValueError."""
    try:
        return parse(text)
    except ValueError as problem:
        raise UserError(f"{name}: {problem}") from None


def print_change(change: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print what a command has changed, as JSON or as text."""
    typer.echo(json.dumps(change, indent=2) if as_json else text)


def logs_start_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Have a typer command with the option --log-format print errors in that format.

    They are text on a terminal, and with --check.
    """

    @wraps(command)
    def with_log(*arguments: Any, **given: Any) -> None:
        try:
            command(*arguments, **given)
        except UserError as error:
            if given["log_format"] != "json" or given.get("check") or sys.stderr.isatty():
                raise
            from resumed_server.observability.logging import print_start_error  # noqa: PLC0415 - only for errors

            print_start_error(error)
            raise typer.Exit(error.status) from None

    return with_log


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command with `**given` one option for each setting, before its own options."""
    options = [
        inspect.Parameter(
            setting.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=setting.metadata["default"],
            annotation=Annotated[
                list[str] if isinstance(setting.metadata["default"], list) else type(setting.metadata["default"]),
                typer.Option(
                    flag(setting.name),
                    envvar=f"RESUMED_{setting.name.upper()}",
                    metavar=setting.metadata["metavar"] or None,
                    rich_help_panel=setting.metadata["panel"],
                    help=setting.metadata["help"],
                ),
            ],
        )
        for setting in dataclasses.fields(Settings)
    ]
    own = [
        parameter
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    command.__signature__ = inspect.Signature([*options, *own])  # type: ignore[attr-defined] # typer reads it
    return command
