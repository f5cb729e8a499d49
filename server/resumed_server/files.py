"""Files that are read again while the server runs: certificates, keys, grants.

What is read is taken once it looks the same twice in a row, so that nobody takes the middle of a change: a Kubernetes
Secret being swapped, a certificate copied before its key, an editor that has written half. What cannot be used is
ignored, with one line in the log, and what was there before stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

import structlog

from resumed_server.logs import described

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LARGEST = 1 << 20
"""Bytes that are read of a file, at most."""

_UNUSABLE = "changed files cannot be used, what was there before stays"

_Value = TypeVar("_Value")

log = structlog.get_logger()


class Followed(Generic[_Value]):
    """What `parse` makes of some files that belong together, as they are now or were when they last made sense.

    Args:
        name: What they are, for the log, as in "grants".
        paths: Where they are.
        parse: Makes the value of their contents; raises ValueError with what is wrong, a line each, and no secret.

    Raises:
        ValueError: They cannot be read, or make no sense.
    """

    def __init__(self, name: str, paths: Sequence[str], parse: Callable[[Sequence[bytes]], _Value]) -> None:
        self._name = name
        self._paths = paths
        self._parse = parse
        self._seen = self._judged = self._look()
        self.value = self._parsed(self._seen)

    def follow(self) -> None:
        """Look once, and take what changed and has settled. Never raises."""
        try:
            seen, before = self._look(), self._seen
            self._seen = seen
            if seen != before or seen == self._judged:
                return
            self._judged = seen
            self.value = self._parsed(seen)
        except Exception as error:  # noqa: BLE001 - the server goes on with what it has, whatever that was
            expected = isinstance(error, ValueError)
            details = {"problem": "; ".join(str(error).splitlines())} if expected else described(error)
            log.error(_UNUSABLE, files=self._name, **details)  # noqa: TRY400 - a traceback may show a secret
        else:
            log.info("changed files taken", files=self._name)

    def _look(self) -> Sequence[bytes] | str:
        """Return the contents, or what is wrong with the files."""
        contents = []
        for path in self._paths:
            try:
                with open(path, "rb") as file:  # noqa: PTH123 - as the user wrote it
                    contents.append(file.read(LARGEST + 1))
            except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
                return f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
            if len(contents[-1]) > LARGEST:
                return f"{path} is larger than {LARGEST} bytes"
        return contents

    def _parsed(self, seen: Sequence[bytes] | str) -> _Value:
        if isinstance(seen, str):
            raise ValueError(seen)  # noqa: TRY004 - it is what the files are, not what a caller gave
        return self._parse(seen)
