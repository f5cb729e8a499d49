"""`resumed keyring`: shows what a keyring holds, and takes the steps of a rotation when they are safe.

docs/keyrings.md has the procedure, and why each wait is as long as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from resumed_server.cli.keyring.file import KeyringFile, now
from resumed_server.config.types import Duration
from resumed_server.errors import UserError

if TYPE_CHECKING:
    from datetime import datetime

    from resumed_server.cli.keyring.file import Key

_UNITS = (("d", 86_400), ("h", 3_600), ("m", 60))


def show(file: str, *, as_json: bool) -> None:
    """Print the ids and ages of the keys of a file, never a key.

    Raises:
        UserError: It cannot be used as a keyring.
    """
    keyring = KeyringFile(file)
    if as_json:
        keys = [_described(key, first=key is keyring.keys[0]) for key in keyring.keys]
        Console(soft_wrap=True).print_json(data={"file": file, "keys": keys})
        return
    table = Table()
    for column in ("key", "made", "what it does"):
        table.add_column(column, overflow="fold")
    for key in keyring.keys:
        made = f"{key.made:%Y-%m-%d} ({_ago(key.made)})" if key.made else "unknown"
        table.add_row(key.id, made, _role(key, first=key is keyring.keys[0]))
    Console().print(table)


def promote(file: str, key_id: str | None, *, wait: str, force: bool) -> str:
    """Let a key seal from now on, and return what to tell the user. Without `key_id` the one that never did.

    Raises:
        UserError: Not every frontend may have the key yet, unless `force`; or it cannot be done at all.
    """
    keyring = KeyringFile(file)
    first = keyring.keys[0]
    key = keyring.named(key_id) if key_id else _only(keyring, [key for key in keyring.keys if _is_new(key, first)])
    if key is first:
        raise UserError(f"{key.id} is the first key of {file} already")
    left = _duration("--wait", wait) - _age(key.made)
    if left > 0 and not force:
        raise UserError(
            f"{key.id} is only {_ago(key.made)} old: a frontend without it could not open what others seal with it; "
            f"wait another {_spoken(left)}, or give --force if every frontend has it"
        )
    keyring.promote(key)
    keyring.write()
    return (
        f"{file}: {key.id} seals from now on, {first.id} only opens; when every frontend has the file and all older "
        f"sessions have ended, `resumed keyring retire {file}`"
    )


def retire(file: str, key_id: str | None, *, lifetime: str, wait: str, force: bool) -> str:
    """Drop a key, and return what to tell the user. Without `key_id` the one that sealed before.

    Raises:
        UserError: Sessions that it sealed may live, unless `force`; or it cannot be done at all.
    """
    keyring = KeyringFile(file)
    first = keyring.keys[0]
    key = keyring.named(key_id) if key_id else _only(keyring, [key for key in keyring.keys[1:] if key.until])
    if key is first:
        raise UserError(f"{key.id} seals; promote another key first (`resumed keygen --append {file}` makes one)")
    if not force and not _is_new(key, first):
        if key.until is None:
            raise UserError(
                f"{file} does not say until when {key.id} sealed; give --force if that is longer ago than sessions live"
            )
        left = _duration("--lifetime", lifetime) + _duration("--wait", wait) - _age(key.until)
        if left > 0:
            raise UserError(
                f"{key.id} sealed until {_ago(key.until)} ago, and sessions of then may live another {_spoken(left)}; "
                "wait, or give --force to lose them (their clients make a full handshake)"
            )
    keyring.keys = [each for each in keyring.keys if each.id != key.id]
    keyring.write()
    return f"{file}: {key.id} is gone; what it sealed opens nowhere once every frontend has the file"


def _is_new(key: Key, first: Key) -> bool:
    """Return whether a key was made and never sealed, as far as the file knows."""
    return key is not first and key.made is not None and key.since is None and key.until is None


def _only(keyring: KeyringFile, candidates: list[Key]) -> Key:
    if len(candidates) != 1:
        ids = ", ".join(key.id for key in keyring.keys[1:])
        raise UserError(
            f"say which key of {keyring.path}: {ids}"
            if ids
            else f"{keyring.path} has one key only: add one with `resumed keygen --append {keyring.path}`"
        )
    return candidates[0]


def _duration(option: str, text: str) -> float:
    try:
        return Duration.parse(text)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None


def _age(since: datetime | None) -> float:
    """Return seconds; what nobody knows is long ago."""
    return (now() - since).total_seconds() if since else float("inf")


def _ago(since: datetime | None) -> str:
    return _spoken(_age(since))


def _spoken(seconds: float) -> str:
    unit, size = next(((unit, size) for unit, size in _UNITS if seconds >= 2 * size), ("s", 1))
    return f"{-(-seconds // size):g}{unit}"


def _role(key: Key, *, first: bool) -> str:
    if first:
        return "seals and opens" + (f", for {_ago(key.since)}" if key.since else "")
    if key.until:
        return f"opens; sealed until {_ago(key.until)} ago"
    return "opens; has never sealed" if key.made else "opens"


def _described(key: Key, *, first: bool) -> dict[str, Any]:
    times = {name: value and f"{value:%Y-%m-%dT%H:%M:%SZ}" for name, value in _times(key).items()}
    return {"id": key.id, "seals": first, "age_seconds": _age(key.made) if key.made else None, **times}


def _times(key: Key) -> dict[str, datetime | None]:
    return {"made": key.made, "sealing_since": key.since, "sealing_until": key.until}
