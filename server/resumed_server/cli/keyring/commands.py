"""`resumed keyring`: show the keys of a keyring, and rotate them, each step only when it is safe.

docs/keyrings.md has the procedure, and the reason for each wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from resumed_server.cli.keyring.file import KeyringFile, now
from resumed_server.cli.options import AsJson, parse_option, print_change
from resumed_server.config.types import Duration
from resumed_server.errors import ExitStatus, UserError

if TYPE_CHECKING:
    from datetime import datetime

    from resumed_server.cli.keyring.file import Key

_UNITS = (("d", 86_400), ("h", 3_600), ("m", 60))


app = typer.Typer(add_completion=False, help="Show and rotate the keys of a keyring (docs/keyrings.md).")

_File = Annotated[str, typer.Argument(metavar="FILE", help="The keyring file.")]
_KeyId = Annotated[
    str | None,
    typer.Argument(metavar="KEY", help="The key's id, as printed by `show`. Required if several keys could be meant."),
]
_Wait = Annotated[
    str, typer.Option(metavar="DURATION", help="Longest time that a changed file takes to reach the last frontend.")
]


@app.command()
def show(file: _File, as_json: AsJson = False) -> None:
    """Print the ids and ages of a keyring's keys, never the keys."""
    keyring = KeyringFile(file)
    if as_json:
        Console(soft_wrap=True).print_json(data={"file": file, "keys": _describe_all(keyring)})
        return
    table = Table()
    for column in ("key", "created", "use"):
        table.add_column(column, overflow="fold")
    for key in keyring.keys:
        made = f"{key.made:%Y-%m-%d} ({_ago(key.made)})" if key.made else "unknown"
        table.add_row(key.id, made, _role(key, first=key is keyring.keys[0]))
    Console().print(table)


@app.command()
def promote(
    file: _File,
    key_id: _KeyId = None,
    wait: _Wait = "5m",
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Do not wait. Use it if every frontend has the key already.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Seal with another key from now on; the previous one still opens.

    Without KEY it is the one key that has never sealed. Refused while a frontend may not have the key yet.
    """
    keyring = KeyringFile(file)
    first = keyring.keys[0]
    key = keyring.find_key(key_id) if key_id else _only(keyring, [key for key in keyring.keys if _is_new(key, first)])
    if key is first:
        raise UserError(f"{key.id} is the first key of {file} already")
    left = parse_option("--wait", wait, Duration.parse) - _age(key.made)
    if left > 0 and not force:
        raise UserError(
            f"{key.id} is only {_ago(key.made)} old: a frontend without it could not open the sessions of others; "
            f"wait another {_format_seconds(left)}, or give --force if every frontend has it",
            ExitStatus.RETRY,
        )
    keyring.promote(key)
    keyring.write()
    text = (
        f"{file}: {key.id} seals from now on, {first.id} only opens; when every frontend has the file and all "
        f"older sessions have expired, run `resumed keyring retire {file}`"
    )
    print_change({"file": file, "promoted": key.id, "keys": _describe_all(keyring)}, text, as_json=as_json)


@app.command()
def retire(
    file: _File,
    key_id: _KeyId = None,
    lifetime: Annotated[
        str,
        typer.Option(
            metavar="DURATION",
            help="Longest lifetime of a session: the largest `lifetime` of the frontends, or the store's --max-ttl.",
        ),
    ] = "24h",
    wait: _Wait = "5m",
    *,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Do not wait. Sessions sealed with this key can no longer be resumed. Use it after a key compromise.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a key that no longer seals, once all sessions sealed with it have expired.

    Without KEY it is the one key that sealed before.
    """
    keyring = KeyringFile(file)
    first = keyring.keys[0]
    key = keyring.find_key(key_id) if key_id else _only(keyring, [key for key in keyring.keys[1:] if key.until])
    if key is first:
        raise UserError(f"{key.id} seals; promote another key first (`resumed keygen --append {file}` creates one)")
    if not force and not _is_new(key, first):
        if key.until is None:
            raise UserError(
                f"{file} does not record until when {key.id} sealed; give --force if that is longer ago than the "
                "lifetime of sessions"
            )
        kept = parse_option("--lifetime", lifetime, Duration.parse) + parse_option("--wait", wait, Duration.parse)
        left = kept - _age(key.until)
        if left > 0:
            raise UserError(
                f"{key.id} sealed until {_ago(key.until)} ago, and sessions from that time may live another "
                f"{_format_seconds(left)}; wait, or give --force to lose them (their clients make a full handshake)",
                ExitStatus.RETRY,
            )
    keyring.keys = [each for each in keyring.keys if each.id != key.id]
    keyring.write()
    text = f"{file}: deleted {key.id}; sessions sealed with it resume nowhere once every frontend has the file"
    print_change({"file": file, "retired": key.id, "keys": _describe_all(keyring)}, text, as_json=as_json)


def _is_new(key: Key, first: Key) -> bool:
    """Return whether the file records that a key was created, and not that it ever sealed."""
    return key is not first and key.made is not None and key.since is None and key.until is None


def _only(keyring: KeyringFile, candidates: list[Key]) -> Key:
    if len(candidates) != 1:
        ids = ", ".join(key.id for key in keyring.keys[1:])
        raise UserError(
            f"{keyring.path}: name the key, one of {ids}"
            if ids
            else f"{keyring.path} has only one key: add one with `resumed keygen --append {keyring.path}`"
        )
    return candidates[0]


def _age(since: datetime | None) -> float:
    """Return the seconds since a time, infinity if it is unknown."""
    return (now() - since).total_seconds() if since else float("inf")


def _ago(since: datetime | None) -> str:
    return _format_seconds(_age(since))


def _format_seconds(seconds: float) -> str:
    unit, size = next(((unit, size) for unit, size in _UNITS if seconds >= 2 * size), ("s", 1))
    return f"{-(-seconds // size):g}{unit}"


def _role(key: Key, *, first: bool) -> str:
    if first:
        return "seals and opens" + (f", for {_ago(key.since)}" if key.since else "")
    if key.until:
        return f"opens; sealed until {_ago(key.until)} ago"
    return "opens; has never sealed" if key.made else "opens"


def _describe_all(keyring: KeyringFile) -> list[dict[str, Any]]:
    return [_describe(key, first=key is keyring.keys[0]) for key in keyring.keys]


def _describe(key: Key, *, first: bool) -> dict[str, Any]:
    times = {"made": key.made, "sealing_since": key.since, "sealing_until": key.until}
    texts = {name: time and f"{time:%Y-%m-%dT%H:%M:%SZ}" for name, time in times.items()}
    return {"id": key.id, "seals": first, "age_seconds": _age(key.made) if key.made else None, **texts}
