"""A group of commands whose modules are imported only when one of them runs, so that `resumed --help` is fast."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from resumed_server.errors import EXIT_STATUSES

if TYPE_CHECKING:
    from collections.abc import Mapping

COMMANDS: Mapping[str, tuple[str, str]] = {
    "serve": ("serve:serve", "Serve sessions over gRPC until SIGTERM or SIGINT."),
    "keygen": ("keyring.keygen:keygen", "Create a keyring, or add a key to one."),
    "check": ("diagnose.check:check", "Call every method of a running store."),
    "doctor": ("diagnose.doctor:doctor", "Find out why a frontend does not resume."),
    "purge": ("admin:purge", "End all sessions of a namespace, or those issued before a time."),
    "stats": ("admin:stats", "Count the sessions of each namespace in a running store."),
    "ticket-keys": (
        "ticket_keys.command:ticket_keys",
        "Give Envoy, nginx, HAProxy and Traffic Server the ticket keys of a fleet.",
    ),
    "top": ("top.command:top", "Watch rates, hit rates and latencies of stores and frontends."),
    "demo": ("demo.command:demo", "Watch a store and two frontends resume each other's TLS sessions."),
    "bench": ("bench.command:bench", "Measure full and resumed handshakes per second of any TLS servers."),
    "grants": ("grants:app", "Check a grants file."),
    "keyring": ("keyring.commands:app", "Show and rotate the keys of a keyring (docs/keyrings.md)."),
}
"""By name: the function or typer.Typer, below `resumed_server.cli`, and the line of `resumed --help`."""
EPILOG = "Exit status: " + "; ".join(f"{status:d}, {meaning}" for status, meaning in EXIT_STATUSES.items()) + "."
"""The end of the help of every command."""


class LazyGroup(TyperGroup):
    """The group of COMMANDS. Help and the completion of names use the summaries only."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: TyperCommand(name, help=summary) for name, (_, summary) in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Import the command that the arguments begin with, and return its name, itself and its arguments."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name and command else None, rest


def load(name: str) -> Any:
    """Import a command and return it as typer runs it."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    found = getattr(import_module(f"resumed_server.cli.{module}"), attribute)
    if not isinstance(found, typer.Typer):
        function, found = found, typer.Typer(add_completion=False)
        found.command(name)(function)
    command: Any = typer.main.get_command(found)
    for each in (command, *getattr(command, "commands", {}).values()):
        each.epilog = EPILOG
    return command
