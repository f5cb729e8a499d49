"""Measure every promise of resumed about speed, section by section: `make bench`.

Each section writes its results to results.json in the output directory, and the report shows all results of that file:
the results of sections that did not run remain.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import ssl
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import Progress

sys.path.extend(str(Path(__file__).parents[2] / folder) for folder in ("tests", "."))

from benchmarks.bench import report, scripts
from benchmarks.bench.results import Results
from benchmarks.bench.rig import CLIENTS, Options
from benchmarks.bench.scripts import SCRIPTS
from benchmarks.measuring import bind_to_cores, new_console

ROOT = Path(__file__).parents[2]
SECTIONS = ("sources", "throughput", "peers", "frontends", "tickets", "made_up_ids", "growth", *SCRIPTS)

LOAD = round(os.getloadavg()[0], 1)
_QUIET = 0.5


def main() -> int:
    """Measure, write the report, and return 0 if every section ran to its end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="make few turns, for a quick look")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", metavar="DIRECTORY")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: _stop())  # SystemExit ends all child processes
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    failed = 0
    console = Console(stderr=True)
    if LOAD > _QUIET:
        console.print(f"[yellow]Other processes run on this machine (load {LOAD}) and distort the figures.")
    for name in options.only or SECTIONS:
        started = time.monotonic()
        try:
            with Progress(console=console, transient=True) as progress, bind_to_cores({CLIENTS}):
                section = measure_section(name, Options(options.quick, progress))
        except Exception:  # noqa: BLE001  # the other sections continue
            console.print_exception(max_frames=4)
            console.print(f"[red]{name} failed[/red]; its earlier results remain")
            failed += 1
            continue
        section.facts |= {
            "minutes": round((time.monotonic() - started) / 60, 1),
            "quick": options.quick,
            **describe_machine(),
        }
        results[name] = section.as_json()
        file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        console.print(
            f"{name}: {section.facts['minutes']} min, missed {sum(not each.is_met for each in section.verdicts)}"
        )
    all_results = {name: Results.from_json(results[name]) for name in SECTIONS if name in results}
    report.write(options.output, all_results)
    new_console().print(report.verdicts(all_results))
    return int(failed > 0)


def measure_section(name: str, options: Options) -> Results:
    """Measure one section."""
    if name in SCRIPTS:
        return scripts.measure(name, options)
    module: Any = importlib.import_module(f"benchmarks.bench.{name}")
    results: Results = module.measure(options)
    return results


def describe_machine() -> dict[str, Any]:
    """Return the properties of the machine on which the figures depend."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION.split()[1],
        "cores": len(os.sched_getaffinity(0)),
        "load of the machine before": LOAD,
    }


def _stop() -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
