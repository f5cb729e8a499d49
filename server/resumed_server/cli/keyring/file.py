"""A keyring file for its operator: the ids of the keys, in order, with their ages. Keys are never printed.

The ages are in comments, which frontends do not read:

    # 8f3a12bc, made 2026-11-25T13:50:12Z, sealing since 2026-11-25T14:00:00Z:
    # 51e0c7d9, made 2026-08-01T09:00:00Z, sealing since 2026-08-01T09:10:00Z until 2026-11-25T14:00:00Z:
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from resumed import Keyring, KeyringError
from resumed_server.cli.atomic_file import write_atomically
from resumed_server.errors import UserError

_ABOUT = """\
# A keyring of resumed. With it the TLS sessions of the fleet can be opened: copy it to every frontend, nowhere else.
# The first key seals, every key opens. `resumed keyring --help` lists the commands that change it.
"""
_NOTE = re.compile(r"# ([0-9a-f]{8}), made (\S+?)(?:, sealing since (\S+?))?(?:,? until (\S+?))?:?\s*")
_TIME = "%Y-%m-%dT%H:%M:%SZ"


def now() -> datetime:
    """Return the current time in whole seconds."""
    return datetime.now(timezone.utc).replace(microsecond=0)


@dataclass(repr=False)
class Key:
    """One key of a file. It has no repr: the line is the key.

    Attributes:
        id: Its id, 8 hex digits.
        made: Time of its creation; None if the file does not record it.
        since: Time when it became the first key; None if it never did, or the file does not record it.
        until: Time when another key became the first; None as for `since`.
    """

    id: str
    line: str
    made: datetime | None = None
    since: datetime | None = None
    until: datetime | None = None
    comments: list[str] = field(default_factory=list)
    """Lines before it that the operator wrote."""

    @classmethod
    def generate(cls) -> Key:
        """Create a key."""
        line = Keyring.generate()
        (key_id,) = Keyring.from_keys([base64.b64decode(line)]).key_ids
        return cls(key_id, line, made=now())

    def lines(self) -> list[str]:
        """Return the lines of the file for this key."""
        note = []
        if self.made or self.since or self.until:
            made = f"{self.made:{_TIME}}" if self.made else "?"
            since = f", sealing since {self.since:{_TIME}}" if self.since else ""
            until = f"{'' if since else ','} until {self.until:{_TIME}}" if self.until else ""
            note = [f"# {self.id}, made {made}{since}{until}:"]
        return [*self.comments, *note, self.line]


class KeyringFile:
    """The keys of a file, which can be changed and written.

    Raises:
        UserError: The file cannot be used as a keyring.
    """

    def __init__(self, path: str) -> None:
        # The target of a link: write() must not replace the link by a file.
        self.path = Path(path).resolve()
        try:
            ids = Keyring.load(self.path).key_ids
            lines = self.path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except (KeyringError, OSError) as error:
            raise UserError(str(error)) from None
        self._head: list[str] = []
        self.keys: list[Key] = []
        comments: list[str] = []
        for line in lines:
            if not line.partition("#")[0].strip():
                comments.append(line)
                continue
            key = Key(ids[len(self.keys)], line)
            key.comments = [comment for comment in comments if not _read_note(key, comment)]
            if not self.keys:  # comments above the first key describe the file
                self._head, key.comments = key.comments, []
            self.keys.append(key)
            comments = []
        self._tail = comments

    @classmethod
    def create(cls, path: str, key: Key) -> None:
        """Create a file with one key. Other users can read it at no moment.

        Raises:
            UserError: The file exists, or cannot be created.
        """
        key.since = key.made
        text = _ABOUT + "\n".join(key.lines()) + "\n"
        try:
            file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii")
        except FileExistsError:
            raise UserError(
                f"{path} exists and was not changed: sessions sealed with its keys would be lost; choose another name, "
                "or add a key to it with --append"
            ) from None
        except OSError as error:
            raise UserError(f"{path} cannot be created: {error.strerror}; choose another directory") from None
        try:
            with file:
                file.write(text)
        except OSError as error:
            Path(path).unlink(missing_ok=True)
            raise UserError(f"{path} cannot be written: {error.strerror}; free some space") from None

    def find_key(self, key_id: str) -> Key:
        """Return a key by its id.

        Raises:
            UserError: The file has no such key.
        """
        key = next((key for key in self.keys if key.id == key_id.lower()), None)
        if key is None:
            raise UserError(f"{self.path} has no key {key_id}; it has {', '.join(key.id for key in self.keys)}")
        return key

    def promote(self, key: Key) -> None:
        """Make `key` the first."""
        before, moment = self.keys[0], now()
        before.until, key.since, key.until = moment, moment, None
        self.keys.remove(key)
        self.keys.insert(0, key)

    def write(self) -> None:
        """Replace the file atomically, keeping its owner and mode: no frontend reads half of it.

        Raises:
            UserError: The file cannot be replaced; it is unchanged.
        """
        lines = [*self._head, *(line for key in self.keys for line in key.lines()), *self._tail]
        text = "\n".join(lines) + "\n"
        try:
            write_atomically(self.path, text.encode(errors="surrogateescape"), durable=True)
        except OSError as error:
            raise UserError(f"{self.path} cannot be replaced and is unchanged: {error.strerror}") from None


def _read_note(key: Key, comment: str) -> bool:
    """Set the times of `key` from a comment, and return whether the comment is about this key."""
    note = _NOTE.fullmatch(comment)
    if note is None or note[1] != key.id:
        return False
    key.made, key.since, key.until = map(_time, note.groups()[1:])
    return True


def _time(text: str | None) -> datetime | None:
    for form in (_TIME, "%Y-%m-%d"):
        with contextlib.suppress(ValueError):
            return datetime.strptime(text or "", form).replace(tzinfo=timezone.utc)
    return None
