"""Import structlog without rich and Twisted, which it imports where they are installed.

They take a fifth of the time in which a server starts. Without rich, no traceback shows the values of variables.
"""

import sys

_UNNEEDED = [name for name in ("rich", "twisted") if name not in sys.modules]
sys.modules.update(dict.fromkeys(_UNNEEDED))  # type: ignore[arg-type] # with None, an import fails
import structlog  # noqa: E402, F401

for _name in _UNNEEDED:
    del sys.modules[_name]
