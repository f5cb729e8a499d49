"""Common parts of the benchmarks: processor time and memory of processes, cores, and figures as text and tables."""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


def cpu_seconds(processes: Iterable[int]) -> float:
    """Return the processor time of `processes` in seconds, in user mode and in the kernel."""
    # The clock id of a process, as clock_getcpuclockid(3) computes it; /proc/PID/stat has hundredths of seconds only.
    return sum(time.clock_gettime(~process << 3 | 2) for process in processes)


def process_tree(process: int) -> list[int]:
    """Return a process and its descendants, such as the supervisor of a server and its workers."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii").split()
    return [process, *(each for child in children for each in process_tree(int(child)))]


def resident_bytes(process: int | str = "self") -> int:
    """Return the resident memory of a process in bytes."""
    return int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


@contextlib.contextmanager
def bind_to_cores(cores: set[int]) -> Iterator[None]:
    """Bind this thread, and all processes that it starts during the context, to `cores`."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def p99(figures: Sequence[float]) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(figures, n=100)[98] if len(figures) > 1 else figures[0]


def percentiles(seconds: Sequence[float]) -> str:
    """Return the median and the 99th percentile in milliseconds."""
    return f"{statistics.median(seconds) * 1e3:.2f} / {p99(seconds) * 1e3:.2f}" if seconds else "-"


def spread(figures: Sequence[float], digits: int = 2, *, factor: float = 1, unit: str = "") -> str:
    """Return the median and the range of `figures` multiplied by `factor`."""
    if not figures:
        return "-"
    low, middle, high = (factor * each(figures) for each in (min, statistics.median, max))
    return f"{middle:,.{digits}f}{unit} ({low:,.{digits}f} to {high:,.{digits}f})"


def new_console() -> Console:
    """Return a console for the output; where that is no terminal, no cell of a table is wrapped."""
    return Console(width=None if os.isatty(1) else 1000)


def build_table(*headings: str, markdown: bool, title: str | None = None) -> Table:
    """Return an empty table, in Markdown without its title."""
    return Table(*headings, title=None if markdown else title, box=box.MARKDOWN if markdown else box.HEAVY_HEAD)
