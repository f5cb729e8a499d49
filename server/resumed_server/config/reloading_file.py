"""The files that the server reads again while it runs, certificates, keys and grants, with their log."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import structlog

from resumed import _reload as files
from resumed_server.errors import exception_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_UNUSABLE = "changed files cannot be used, what was there before stays"

_Value = TypeVar("_Value")

log = structlog.get_logger()


class Followed(files.Followed[_Value]):
    """The value of some files that belong together, as they are now or were when they last could be used.

    Args:
        name: What they are, for the log, as in "grants".
        paths: Where they are.
        parse: Makes the value of their contents; raises ValueError with what is wrong, a line each, and no secret.

    Raises:
        ValueError: They cannot be read, or make no sense.
    """

    def __init__(self, name: str, paths: Sequence[str], parse: Callable[[Sequence[bytes]], _Value]) -> None:
        def refused(error: Exception) -> None:
            expected = isinstance(error, ValueError)
            details = {"problem": "; ".join(str(error).splitlines())} if expected else exception_fields(error)
            log.error(_UNUSABLE, files=name, **details)

        super().__init__(
            paths,
            lambda read: parse([bytes(file.content) for file in read]),
            lambda _: log.info("changed files taken", files=name),
            refused,
        )
