"""Prints as JSON how much of each source file all inputs of some targets reach: `python fuzz/replay.py NAME`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import coverage

HERE = Path(__file__).parent
ROOTS = [HERE.parent / "client" / "python", HERE.parent / "server"]

sys.path.insert(0, str(HERE.parent))


def main() -> None:
    """Run all inputs that are kept."""
    logging.disable()
    measured = coverage.Coverage(data_file=None, branch=True, source_pkgs=["resumed", "resumed_server"])
    measured.start()
    from fuzz.targets import TARGETS

    chosen = [TARGETS[name] for name in sys.argv[1:]]
    for target in chosen:
        check = target.prepare()
        for folder in (target.corpus, HERE.parent / ".build" / "fuzz" / target.name):
            for path in sorted(folder.glob("*")):
                check(path.read_bytes())
    measured.stop()
    shares = {}
    for name in dict.fromkeys(file for target in chosen for file in target.covers):
        [path] = [root / name for root in ROOTS if (root / name).exists()]
        numbers = measured._analyze(str(path)).numbers
        shares[name] = f"{numbers.pc_covered:.0f} % of {numbers.n_statements} lines and {numbers.n_branches} branches"
    print(json.dumps(shares))  # noqa: T201


if __name__ == "__main__":
    main()
