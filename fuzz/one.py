"""Fuzzes one target in this process: `python fuzz/one.py TARGET [libFuzzer's options] CORPUS...`.

A process of its own for each, since libFuzzer ends it at the first crash or hang (and keeps the input).
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import atheris

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "."))

with atheris.instrument_imports(
    include=["resumed", "resumed_server", "hpack", "prometheus_client", "http.server"], enable_loader_override=False
):
    from fuzz.targets import TARGETS

if __name__ == "__main__":
    logging.disable()  # log lines about single inputs are useless
    check = TARGETS[sys.argv[1]].prepare()
    itself = f"{sys.executable} {__file__} {sys.argv[1]}"  # a shell starts it anew to merge corpora
    atheris.Setup([itself, *sys.argv[2:]], check)
    atheris.Fuzz()
