"""The plots of the bench, as SVG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib import pyplot as plt

from benchmarks.bench.frontends import COLUMNS
from benchmarks.bench.growth import MEASURED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from benchmarks.bench.results import Results

_STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",  # or the text is lost on a dark page
    "font.size": 9,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "svg.hashsalt": "resumed",  # the same figures give the same file
}
_GREY = "#9aa0a6"
_COLOURS = {
    "full, shim": "#5f6368",
    "locally": "#b08fd8",
    "shared": "#d9822b",
    "dictionary": "#b08fd8",
    "mirror": "#2a9d6f",
    "resumed, call": "#4a90d9",
    "grpcio": "#4a90d9",
    "native": "#1f4e8c",
}
"""The colour of a kind, by a part of its name."""


def draw(directory: Path, found: Mapping[str, Results]) -> None:
    """Draw the plot of each section that has figures."""
    with plt.rc_context(_STYLE):
        for name, results in found.items():
            if name in _PLOTS and results.figures:
                figure = _PLOTS[name](results.figures)
                figure.savefig(directory / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
                plt.close(figure)


def _by_stack(figures: Mapping[str, Mapping[str, float]], label: str) -> Any:
    """Draw a panel for each stack, with a group of bars for each version and key."""
    stacks = list(dict.fromkeys(case.split(", ")[0] for case in figures))
    kinds = list(next(iter(figures.values())))
    figure, panels = plt.subplots(1, len(stacks), figsize=(11, 3.8), sharey=True, squeeze=False)
    for panel, stack in zip(panels[0], stacks, strict=True):
        cases = sorted(case for case in figures if case.startswith(f"{stack}, "))
        _groups(panel, [figures[case] for case in cases], kinds)
        panel.set_xticks(range(len(cases)), ["\n".join(case.split(", ")[1:]) for case in cases])
        panel.set_title("pyOpenSSL" if stack == "pyopenssl" else stack)
    panels[0][0].set_ylabel(label)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(kinds), loc="upper center", bbox_to_anchor=(0.5, 0.02))
    return figure


def _groups(panel: Any, groups: Sequence[Mapping[str, float]], kinds: Sequence[str]) -> None:
    width = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        places = [place + (number - (len(kinds) - 1) / 2) * width for place in range(len(groups))]
        panel.bar(places, [group.get(kind, 0) for group in groups], width * 0.92, label=kind, color=_colour(kind))
    panel.grid(visible=False, axis="x")


def _colour(kind: str) -> str:
    return next((colour for name, colour in _COLOURS.items() if name in kind), _GREY)


def _sources(figures: Mapping[str, Mapping[str, float]]) -> Any:
    return _by_stack(figures, "ms, p50")


def _throughput(figures: Mapping[str, Mapping[str, float]]) -> Any:
    return _by_stack(figures, "connections a second")


def _peers(figures: Mapping[str, Mapping[str, Sequence[float | None]]]) -> Any:
    cases = [case for case in figures if "P-256" in case]
    figure, panels = plt.subplots(1, len(cases), figsize=(11, 3.4), sharey=True, squeeze=False)
    for panel, case in zip(panels[0], cases, strict=True):
        names = list(figures[case])[::-1]
        for number, name in enumerate(names):
            full, resumed = figures[case][name]
            ours = name.startswith("resumed")
            panel.barh(number + 0.2, full, 0.38, color=_GREY, label="full")
            if resumed is None:
                panel.text(0, number - 0.2, " nothing resumed", va="center", fontsize=8)
            else:
                colour = _COLOURS["mirror" if ours else "grpcio"]
                panel.barh(number - 0.2, resumed, 0.38, color=colour, label=f"resumed, {'ours' if ours else 'Apache'}")
        panel.set_yticks(range(len(names)), names)
        panel.set_title(case)
        panel.set_xlabel("ms until the end of the handshake, p50")
        panel.grid(visible=False, axis="y")
    handles, labels = panels[0][0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.02))
    return figure


def _frontends(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Any:
    figure, panels = plt.subplots(len(figures), 1, figsize=(11, 6), squeeze=False, gridspec_kw={"hspace": 0.3})
    for panel, (version, stacks) in zip(panels[:, 0], figures.items(), strict=True):
        _groups(
            panel, list(stacks.values()), [kind for kind in COLUMNS if any(kind in found for found in stacks.values())]
        )
        panel.set_xticks(range(len(stacks)), list(stacks))
        panel.set_title(version)
        panel.set_ylabel("ms, p50")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="upper center", bbox_to_anchor=(0.5, 0.06))
    return figure


def _growth(figures: Mapping[str, Mapping[str, float]]) -> Any:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3))
    for panel, unit in zip(panels, ("us", "ms"), strict=True):
        kinds = [kind for kind in MEASURED if kind.endswith(unit)]
        for kind, colour in zip(kinds, (_COLOURS["native"], _COLOURS["mirror"]), strict=True):
            counts = [int(name.replace(",", "")) for name in figures[kind]]
            panel.plot(counts, list(figures[kind].values()), "o-", color=colour, label=kind.rsplit(",", 1)[0])
        panel.set_xscale("log")
        panel.set_ylim(bottom=0)
        panel.set_xlabel("sessions")
        panel.set_ylabel(f"{unit}, p50")
        panel.legend()
    return figure


TITLES = {
    "sources": "Handshakes by where the session comes from",
    "throughput": "Connections a second",
    "peers": "Apache's session caches and resumed's",
    "frontends": "Handshakes of frontends in all languages",
    "growth": "Look-ups and handshakes by the number of sessions",
}
"""The subject of each plot, as the text alternative of its image."""
_PLOTS: dict[str, Callable[[Any], Any]] = {
    "sources": _sources,
    "throughput": _throughput,
    "peers": _peers,
    "frontends": _frontends,
    "growth": _growth,
}
