"""`resumed keygen`: makes a keyring."""

from __future__ import annotations

import base64
import os
from datetime import datetime, timezone
from pathlib import Path

from resumed import Keyring
from resumed_server.config import UserError

_ABOUT = """\
# A keyring of resumed. Whoever has it can open the TLS sessions of its fleet: every frontend needs it, nobody else.
# The first key seals, every key opens.
"""


def keygen(file: str | None) -> str:
    """Make a keyring file with a new key and return what to tell the user; without `file` return the key.

    Raises:
        UserError: The file exists, or cannot be made.
    """
    line = Keyring.generate()
    if file is None:
        return line
    (key_id,) = Keyring.from_keys([base64.b64decode(line)]).key_ids
    today = datetime.now(timezone.utc).date()
    _create(Path(file), f"{_ABOUT}# {key_id}, made {today}:\n{line}\n")
    return f"{file}: a keyring with the new key {key_id}; every frontend of the fleet needs a copy, nobody else"


def _create(path: Path, text: str) -> None:
    """Write a file that was not there before and that nobody else can read, not even while it is written."""
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii")
    except FileExistsError:
        raise UserError(
            f"{path} exists and stays as it is: sessions sealed with its keys would be lost; choose another name"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be made: {error.strerror}; choose another place") from None
    try:
        with file:
            file.write(text)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}; make room or choose another place") from None
