"""Files that the server reloads while it runs: certificates, keys and grants; each reload is logged."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import structlog

import resumed._reload as files
from resumed_server.errors import exception_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_UNUSABLE = "reload failed, keeping the previous configuration"

_Value = TypeVar("_Value")

log = structlog.get_logger()


class Followed(files.Followed[_Value]):
    """The value of related files: of their current content, or of the last valid one.

    Args:
        name: The name of the files in the log and in metrics, such as "grants".
        paths: The files.
        parse: Parses their contents; raises ValueError with one problem per line, and no secret.

    Raises:
        ValueError: The files cannot be read, or are invalid.
    """

    def __init__(self, name: str, paths: Sequence[str], parse: Callable[[Sequence[bytes]], _Value]) -> None:
        def log_rejection(error: Exception) -> None:
            expected = isinstance(error, ValueError)
            details = {"problem": "; ".join(str(error).splitlines())} if expected else exception_fields(error)
            log.error(_UNUSABLE, files=name, **details)

        self.name = name
        super().__init__(
            paths,
            lambda read: parse([bytes(file.content) for file in read]),
            lambda _: log.info("reloaded", files=name),
            log_rejection,
        )
