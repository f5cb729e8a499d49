"""Load the Lua scripts of the folder `scripts`.

Each script documents at its head the keys and arguments that it takes and the answer that it returns. Functions that
several scripts need are in `scripts/include`. The constants at the head of a script have the values of the Python
constants of the same meaning; a test compares them.
"""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPTS = files("resumed_server.storage.redis") / "scripts"
_is_include = re.compile(r"-- include ([a-z_{}]+\.lua)").fullmatch


@functools.cache
def load_script(name: str, *, cluster: bool = False) -> str:
    """Return the script `name`.lua as Redis gets it: with its includes, and without comments and empty lines.

    A line `-- include FILE` stands for that file of `scripts/include`, which may include others; each is included once.
    `{topology}` in the name of a file is "cluster" or "server".
    """
    included = set()

    def lines(text: str) -> Iterator[str]:
        for line in text.splitlines():
            if match := _is_include(line):
                part = match[1].format(topology="cluster" if cluster else "server")
                if part not in included:
                    included.add(part)
                    yield from lines((SCRIPTS / "include" / part).read_text())
            elif line and not line.startswith("--"):
                yield line

    return "\n".join(lines((SCRIPTS / f"{name}.lua").read_text()))
