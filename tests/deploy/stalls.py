"""Watches how late this machine wakes who sleeps: `python stalls.py FILE` writes a line of JSON for each time it was.

A look-up that is late while a process with nothing to do is woken late says nothing about the store.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

NAP, LATE = 0.005, 0.01
"""Seconds that it sleeps, and how much longer is worth a line."""


def main() -> None:
    """Watch until the process is ended."""
    with Path(sys.argv[1]).open("a", buffering=1) as file:
        while True:
            began = time.monotonic()
            time.sleep(NAP)
            late = time.monotonic() - began - NAP
            if late > LATE:
                file.write(json.dumps({"at": began, "late": late}) + "\n")


if __name__ == "__main__":
    main()
