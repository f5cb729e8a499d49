"""Prints as JSON the coverage of each source file by all inputs of some targets: `python fuzz/replay.py NAME`.

The exit status is 1 if an input still breaks its target; its path is then printed to standard error.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import coverage

HERE = Path(__file__).parent
ROOTS = [HERE.parent / "client" / "python", HERE.parent / "server"]

sys.path.extend(str(HERE.parent / folder) for folder in ("tests", "."))


def main() -> int:
    """Run all stored inputs; return 1 if one of them fails."""
    logging.disable()
    measured = coverage.Coverage(data_file=None, branch=True, source_pkgs=["resumed", "resumed_server"])
    measured.start()
    from fuzz.targets import TARGETS

    broken = 0
    chosen = [TARGETS[name] for name in sys.argv[1:]]
    for target in chosen:
        check = target.prepare()
        for folder in (target.corpus, HERE.parent / ".build" / "fuzz" / target.name):
            for path in sorted(folder.glob("*")):
                try:
                    check(path.read_bytes())
                except Exception as error:  # noqa: BLE001 - any exception is a failure
                    broken += 1
                    print(f"{path}: {error!r}", file=sys.stderr)  # noqa: T201
    measured.stop()
    shares = {}
    for name in dict.fromkeys(file for target in chosen for file in target.covers):
        [path] = [root / name for root in ROOTS if (root / name).exists()]
        numbers = measured._analyze(str(path)).numbers
        shares[name] = f"{numbers.pc_covered:.0f} % of {numbers.n_statements} lines and {numbers.n_branches} branches"
    print(json.dumps(shares))  # noqa: T201
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
