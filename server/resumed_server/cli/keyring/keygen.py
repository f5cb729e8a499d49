"""`resumed keygen`: makes a key, alone, in a new keyring, or behind the keys of one."""

from __future__ import annotations

from resumed import Keyring
from resumed_server.cli.keyring.file import Key, KeyringFile
from resumed_server.errors import UserError


def keygen(file: str | None, *, append: bool = False) -> str:
    """Make a keyring file with a new key and return what to tell the user; without `file` return the key.

    With `append` the key goes to the end of a file that is there: it opens, and seals nothing before it is promoted.

    Raises:
        UserError: The file exists, or with `append` does not, or cannot be written.
    """
    if file is None:
        if append:
            raise UserError("--append needs the FILE that the key is to be added to")
        return Keyring.generate()
    key = Key.generate()
    if not append:
        KeyringFile.create(file, key)
        return f"{file}: a keyring with the new key {key.id}; every frontend of the fleet needs a copy, nobody else"
    keyring = KeyringFile(file)
    keyring.keys.append(key)
    keyring.write()
    return (
        f"{file}: has the new key {key.id}, which opens and does not seal yet; when every frontend has the file, "
        f"`resumed keyring promote {file}`"
    )
