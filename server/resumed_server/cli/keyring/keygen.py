"""`resumed keygen`."""

from __future__ import annotations

from typing import Annotated

import typer

from resumed import Keyring
from resumed_server.cli.keyring.file import Key, KeyringFile
from resumed_server.cli.options import AsJson, print_change
from resumed_server.errors import UserError


def keygen(
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="File to create; it must not exist. Without it the key is printed."),
    ] = None,
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            help="Append the key to an existing FILE. It opens sealed sessions at once, and seals only after "
            "`resumed keyring promote`.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Create a keyring: the keys with which all frontends of a fleet seal their sessions."""
    if file is None:
        if append:
            raise UserError("--append needs the FILE to append the key to")
        line = Keyring.generate()
        print_change({"key": line}, line, as_json=as_json)
        return
    key = Key.generate()
    if not append:
        KeyringFile.create(file, key)
        text = f"{file}: created with the new key {key.id}; copy it to every frontend of the fleet, nowhere else"
        print_change({"file": file, "created": key.id}, text, as_json=as_json)
        return
    keyring = KeyringFile(file)
    keyring.keys.append(key)
    keyring.write()
    text = (
        f"{file}: added the key {key.id}, which opens and does not seal yet; when every frontend has the file, "
        f"run `resumed keyring promote {file}`"
    )
    print_change({"file": file, "added": key.id}, text, as_json=as_json)
